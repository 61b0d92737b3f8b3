"""The loss on packed samples that training never sees, every so many steps and at the end."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.data.batch import Batch, batch_of
from pipeline.data.loader import held_out_samples
from pipeline.data.packed_dataset import PackedDataset
from pipeline.errors import DataError
from pipeline.plan.job import JobPlan
from pipeline.train.step import Trainee, model_inputs


@dataclass(frozen=True)
class Evaluation:
    """What one pass over the held-out samples found."""

    loss: float
    """Mean over all their valid tokens, in nats; nan without one."""
    seconds: float


@dataclass(frozen=True, eq=False)
class HeldOut:
    """The samples of an evaluation."""

    dataset: PackedDataset
    samples: tuple[int, ...]

    @property
    def valid_tokens(self) -> int:
        """Labels that count, of all of them."""
        return sum(self.dataset.sample(sample).n_valid for sample in self.samples)


def open_held_out(plan: JobPlan, dataset: PackedDataset) -> HeldOut | None:
    """What the recipe asks to evaluate on, out of `dataset` or of the data set it names; None without evaluation.

    Raises DataError if it cannot be evaluated on.
    """
    recipe = plan.recipe.evaluation
    if recipe is None:
        return None
    other = None if recipe.packed is None else PackedDataset.open(Path(recipe.packed))
    if other is None:
        chosen = held_out_samples(dataset.samples, seed=plan.recipe.data.seed, held_out=recipe.samples)
        return HeldOut(dataset, tuple(chosen.tolist()))
    _check_fits(other, plan, dataset)
    return HeldOut(other, tuple(range(min(recipe.samples, other.samples))))


def _check_fits(other: PackedDataset, plan: JobPlan, dataset: PackedDataset) -> None:
    if other.seq_len != plan.seq_len:
        raise DataError(
            f"evaluation.packed = {other.folder}: its samples have {other.seq_len:,} tokens, and those of training "
            f"{plan.seq_len:,}; pack it with data.seq_len={plan.seq_len}"
        )
    if other.manifest.tokenizer_hash != dataset.manifest.tokenizer_hash:
        raise DataError(
            f"evaluation.packed = {other.folder}: it was packed with another tokenizer than the training data; pack it "
            f"with data.tokenizer={dataset.folder / 'tokenizer'}"
        )


def is_due(plan: JobPlan, step: int) -> bool:
    """Whether an evaluation follows `step`, counted from 1."""
    recipe = plan.recipe.evaluation
    return recipe is not None and (step % recipe.every_steps == 0 or step == plan.recipe.train.steps)


def evaluations_after(plan: JobPlan, step: int) -> int:
    """How many are still to come after `step`, counted from 1, and the evaluation that may follow it."""
    recipe, last = plan.recipe.evaluation, plan.recipe.train.steps
    if recipe is None or step >= last:
        return 0
    return last // recipe.every_steps - step // recipe.every_steps + (last % recipe.every_steps > 0)


def evaluate(trainee: Trainee, held_out: HeldOut) -> Evaluation:
    """One pass. Collective; leaves weights, gradients and the optimizer as they were."""
    began = time.perf_counter()
    engine = trainee.engine
    total = torch.zeros((), dtype=torch.float64, device=trainee.device)
    engine.eval()
    with torch.no_grad():
        for batch, counts in _own_batches(trainee, held_out):
            loss_sum = engine(**model_inputs(batch, trainee)).double()
            total += loss_sum if counts else 0.0
    engine.train()
    dist.all_reduce(total)
    valid_tokens = held_out.valid_tokens
    loss = float(total) / valid_tokens if valid_tokens else float("nan")
    return Evaluation(loss, time.perf_counter() - began)


def _own_batches(trainee: Trainee, held_out: HeldOut) -> Iterator[tuple[Batch, bool]]:
    """(this rank's shard of a sample, whether it counts). Every DP replica gets as many, because ZeRO-3 gathers
    weights in each: one that has no sample left runs the last one again, uncounted."""
    mesh, samples = trainee.mesh, held_out.samples
    for first in range(0, len(samples), mesh.dp):
        number = first + mesh.dp_rank
        sample = samples[min(number, len(samples) - 1)]
        batch = batch_of(
            held_out.dataset,
            sample,
            sp_rank=mesh.sp_rank,
            sp=mesh.sp,
            chunk_tokens=trainee.plan.chunk_tokens,
            cross_document_attention=trainee.plan.recipe.data.cross_document_attention,
        )
        yield batch, number < len(samples)
