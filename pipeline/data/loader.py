"""Which sample is trained on when, and by whom: an order that every rank computes alone, without a collective.

Last stop of the data path before the model: packed data set -> StepBatch, whose micro-batches are Batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipeline.data.batch import Batch, batch_of
from pipeline.data.packed_dataset import PackedDataset
from pipeline.data.packing import Ints, seeded_order
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


def place_at(position: int, *, samples: int, seed: int, held_out: int = 0) -> Place:
    """The `position`-th sample that training sees: every sample that is not held out once per epoch, each epoch in an
    order of its own."""
    epoch, row = divmod(position, samples - held_out)
    return Place(epoch, int(_epoch_order(samples, seed, epoch, held_out)[row]))


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
def _epoch_order(samples: int, seed: int, epoch: int, held_out: int) -> Ints:
    order = seeded_order(samples, seed=seed, stream=epoch)
    return order[~np.isin(order, held_out_samples(samples, seed=seed, held_out=held_out))]


@dataclass(frozen=True, eq=False)
class MicroBatches:
    """This rank's batches of a step, read from disk when they are iterated over."""

    dataset: PackedDataset
    samples: tuple[int, ...]
    """Of this DP replica, in order."""
    sp_rank: int
    sp: int
    cross_document_attention: bool

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Batch]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Batch:
        return batch_of(
            self.dataset,
            self.samples[number],
            sp_rank=self.sp_rank,
            sp=self.sp,
            cross_document_attention=self.cross_document_attention,
        )


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
    start: Cursor = Cursor()
    """Where this job goes on."""
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
        return place_at(position, samples=self.dataset.samples, seed=self.seed, held_out=self.held_out)

    def step(self, step: int) -> StepBatch:
        """Step number `step`, whichever was read before it."""
        first = self.cursor(step).position
        places = [self.sample_at(first + offset) for offset in range(self.samples_per_step)]
        samples = tuple(place.sample for place in places)
        known = [self.dataset.sample(sample) for sample in samples]
        costs = [sample.n_tokens**2 if self.cross_document_attention else sample.cost for sample in known]
        return StepBatch(
            step=step,
            epoch=places[0].epoch,
            micro_batches=MicroBatches(
                self.dataset, samples[self.dp_rank :: self.dp], self.sp_rank, self.sp, self.cross_document_attention
            ),
            valid_tokens=sum(sample.n_valid for sample in known),
            tokens=sum(sample.n_tokens for sample in known),
            sum_len_squared=sum(costs),
            samples=samples,
        )
