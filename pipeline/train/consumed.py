"""How much a run has trained on, over all its starts: a function of its place in the data, so nothing is kept."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pipeline.data.loader import PackedLoader, StepBatch


@dataclass(frozen=True)
class Consumed:
    """Since step 1; a document that is split over samples counts in each, a sample once per epoch."""

    samples: int = 0
    documents: int = 0
    tokens: int = 0

    def after(self, batch: StepBatch, loader: PackedLoader) -> "Consumed":
        """With the step's samples as well."""
        return self._with(batch.samples, loader)

    def _with(self, samples: Iterable[int], loader: PackedLoader) -> "Consumed":
        index, rows = loader.dataset.index, np.fromiter(samples, np.int64)
        documents = np.diff(index.cu_offsets)[rows] - 1
        return Consumed(
            self.samples + len(rows),
            self.documents + int(documents.sum()),
            self.tokens + int(index.n_tokens[rows].sum()),
        )


def consumed_before(loader: PackedLoader) -> Consumed:
    """What earlier starts have trained on, up to where this one goes on."""
    done = (loader.sample_at(position).sample for position in range(loader.start.position))
    return Consumed()._with(done, loader)
