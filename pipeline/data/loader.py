"""Which sample is trained on when, and by whom: an order that every rank computes alone, without a collective.

Last stop of the data path before the model: packed data set -> StepBatch, whose micro-batches are Batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Literal

import numpy as np

from pipeline.data.batch import Batch, batch_of
from pipeline.data.order import LikeCosts, by_cost
from pipeline.data.packed_dataset import PackedDataset
from pipeline.data.packing import Ints, seeded_order
from pipeline.data.prefetch import BatchReader
from pipeline.errors import DataError


@dataclass(frozen=True)
class Cursor:
    """How far training has come in its data; all that a resume needs to know, at whatever dp."""

    step: int = 0
    """Steps done."""
    position: int = 0
    """Positions of the training order that are done."""


@dataclass(frozen=True)
class Place:
    """Where a position of the training order falls."""

    epoch: int
    sample: int
    """Index in the packed data set."""


def place_at(
    position: int, *, samples: int, seed: int, held_out: int = 0, like_costs: LikeCosts | None = None
) -> Place:
    """The `position`-th sample that training sees: every sample that is not held out once per epoch, each epoch in an
    order of its own."""
    epoch, row = divmod(position, samples - held_out)
    return Place(epoch, int(_epoch_order(samples, seed, epoch, held_out, like_costs)[row]))


def held_out_samples(samples: int, *, seed: int, held_out: int) -> Ints:
    """The samples [held_out] that training never sees: those that would come last in the first epoch, so that holding
    them out changes nothing in what comes before.

    Raises DataError if none would be left to train on.
    """
    if held_out >= samples:
        raise DataError(
            f"evaluation.samples = {held_out}: the packed data set has {samples}, and training needs at least one of "
            "them; hold out fewer, give more data, or set evaluation: null"
        )
    return seeded_order(samples, seed=seed)[samples - held_out :]


@lru_cache(maxsize=2)  # a step can span the border of two epochs
def _epoch_order(samples: int, seed: int, epoch: int, held_out: int, like_costs: LikeCosts | None) -> Ints:
    order = seeded_order(samples, seed=seed, stream=epoch)
    order = order[~np.isin(order, held_out_samples(samples, seed=seed, held_out=held_out))]
    return by_cost(order, like_costs, seed=seed, epoch=epoch) if like_costs else order


@dataclass(frozen=True, eq=False)
class MicroBatches:
    """This rank's batches of a step, read from disk when they are iterated over."""

    reader: BatchReader
    samples: tuple[int, ...]
    """Of this DP replica, in order."""
    following: tuple[int, ...]
    """Of the next step, to be read ahead."""

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Batch]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Batch:
        return self.reader.batch(self.samples[number], upcoming=self.samples[number + 1 :] + self.following)


@dataclass(frozen=True, eq=False)
class StepBatch:
    """An optimizer step: this rank's micro-batches, and counts over all DP replicas and micro-batches of the step."""

    step: int
    """From 0."""
    epoch: int
    """Of the step's first sample, from 0."""
    micro_batches: MicroBatches
    valid_tokens: int
    """Labels that count."""
    tokens: int
    """Without padding."""
    sum_len_squared: int
    """Over what attends to itself: documents, or with cross-document attention samples."""
    samples: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class PackedLoader:
    """The steps of a run as one rank sees them. A step takes dp × grad_accumulation samples, in the seeded order.

    Micro-batch m of DP replica r takes the (m × dp + r)-th sample of its step. A step that needs more samples than
    the epoch has left goes on with the next epoch.
    """

    dataset: PackedDataset
    sp_rank: int
    sp: int
    dp_rank: int
    dp: int
    grad_accumulation: int
    steps: int
    """Of the whole run."""
    seed: int
    cross_document_attention: bool = False
    chunk_tokens: int | None = None
    """As in Layout."""
    start: Cursor = Cursor()
    """Where this job goes on."""
    order: Literal["shuffled", "by_cost"] = "shuffled"
    prefetch: int = 0
    """Micro-batches read ahead."""
    verify: bool = True
    """Check what is read."""
    held_out: int = 0
    """Samples that are never trained on: `held_out_samples`."""

    def __len__(self) -> int:
        return self.steps - self.start.step

    def __iter__(self) -> Iterator[StepBatch]:
        for step in range(self.start.step, self.steps):
            yield self.step(step)

    @property
    def samples_per_step(self) -> int:
        return self.dp * self.grad_accumulation

    def cursor(self, step: int) -> Cursor:
        """After `step` steps of the run; not before this job's start."""
        return Cursor(step, self.start.position + (step - self.start.step) * self.samples_per_step)

    def sample_at(self, position: int) -> Place:
        """The sample at a position of the training order; a pure function of data set and seed."""
        return place_at(
            position,
            samples=self.dataset.samples,
            seed=self.seed,
            held_out=self.held_out,
            like_costs=self._like_costs,
        )

    @cached_property
    def _like_costs(self) -> LikeCosts | None:
        return LikeCosts(self._costs, self.samples_per_step) if self.order == "by_cost" else None

    @cached_property
    def _costs(self) -> Ints:
        """[samples], of what attends to itself."""
        index = self.dataset.index
        return index.n_tokens**2 if self.cross_document_attention else index.cost

    @cached_property
    def _reader(self) -> BatchReader:
        read = partial(
            batch_of,
            self.dataset,
            sp_rank=self.sp_rank,
            sp=self.sp,
            chunk_tokens=self.chunk_tokens,
            cross_document_attention=self.cross_document_attention,
            verify=self.verify,
        )
        return BatchReader(read, ahead=self.prefetch)

    def _places(self, step: int) -> list[Place]:
        first = self.cursor(step).position
        return [self.sample_at(first + offset) for offset in range(self.samples_per_step)]

    def step(self, step: int) -> StepBatch:
        """Step number `step`, whichever was read before it."""
        places = self._places(step)
        samples = tuple(place.sample for place in places)
        following = tuple(place.sample for place in self._places(step + 1)) if step + 1 < self.steps else ()
        known = [self.dataset.sample(sample) for sample in samples]
        return StepBatch(
            step=step,
            epoch=places[0].epoch,
            micro_batches=MicroBatches(
                self._reader, samples[self.dp_rank :: self.dp], following[self.dp_rank :: self.dp]
            ),
            valid_tokens=sum(sample.n_valid for sample in known),
            tokens=sum(sample.n_tokens for sample in known),
            sum_len_squared=int(self._costs[list(samples)].sum()),
            samples=samples,
        )
