"""When a loss or a gradient is not finite: the update is left out, and the run ends saying where it came from.

DeepSpeed leaves the update out by itself (`run_step` does at stage 0), so the weights are those of the step before.
Every rank learns of it from the step's own reduction, and all of them come here.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.data.documents import PlacedDocument, documents_within
from pipeline.data.loader import StepBatch
from pipeline.data.packed_dataset import PackedDataset
from pipeline.errors import RunError
from pipeline.files import write_json
from pipeline.model.anatomy import lm_head
from pipeline.parallel.shard import Layout
from pipeline.plan.run_dir import RunDir
from pipeline.train.step import StepResult, Trainee, model_inputs

NAMED = 3  # documents and ranks in the message; the record has all


class NotFiniteError(RunError):
    """A loss or a gradient norm is nan or infinite."""


@dataclass(frozen=True)
class Suspect:
    """Where a rank's loss stopped being finite."""

    rank: int
    micro_batch: int
    """Of the step, from 0."""
    sample: int
    """Index in the packed data set."""
    documents: tuple[PlacedDocument, ...]
    """Of this rank's shard: those whose hidden states are not finite, or all of them if every one is."""


@dataclass(frozen=True, eq=False)
class Guard:
    """Ends the run at the first step that is not finite."""

    trainee: Trainee
    dataset: PackedDataset
    run_dir: RunDir
    save_aside: Callable[[int], Path | None]
    """Called on every rank with the step that failed, counted from 1, before the run ends; where its state is now."""

    def check(self, batch: StepBatch, result: StepResult) -> None:
        """Raises NotFiniteError, on every rank, if loss or gradient norm is not finite. Collective then."""
        if math.isfinite(result.loss) and (result.grad_norm is None or math.isfinite(result.grad_norm)):
            return
        suspects = self._suspects(batch, result)
        step, record = batch.step + 1, self.run_dir.nan_record(batch.step + 1)
        if self.trainee.mesh.rank == 0:
            record.parent.mkdir(exist_ok=True)
            write_json(record, _record(batch, result, suspects))
        state = self.save_aside(step)
        aside = "" if state is None else f"; the state: {state}"
        raise NotFiniteError(_message(batch, result, suspects) + f". All of it: {record}{aside}")

    def _suspects(self, batch: StepBatch, result: StepResult) -> list[Suspect]:
        """Of every rank whose loss is not finite. All ranks go through the same forward again."""
        bad = [micro_batch for micro_batch in result.first_not_finite if micro_batch is not None]
        mine: list[Suspect] = []
        for micro_batch in sorted(set(bad)):
            positions = self._positions_not_finite(batch, micro_batch)
            if result.first_not_finite[self.trainee.mesh.rank] == micro_batch:
                mine.append(self._suspect(batch, micro_batch, positions))
        found: list[list[Suspect]] = [[] for _ in range(self.trainee.mesh.world_size)]
        dist.all_gather_object(found, mine)
        return [suspect for of_rank in found for suspect in of_rank]

    def _positions_not_finite(self, batch: StepBatch, micro_batch: int) -> torch.Tensor:
        """Positions among this rank's tokens, int64 [n], at which the head gets hidden states that are not finite."""
        found: list[torch.Tensor] = []

        def look(_: Any, arguments: tuple[Any, ...]) -> None:
            hidden_states = arguments[0]  # [1, local_seq_len, hidden]
            found.append((~torch.isfinite(hidden_states[0]).all(-1)).nonzero()[:, 0].cpu())

        engine = self.trainee.engine
        hook = lm_head(engine.module).register_forward_pre_hook(look)
        with torch.no_grad():
            engine(**model_inputs(batch.micro_batches[micro_batch], self.trainee))
        hook.remove()
        return found[0]

    def _suspect(self, batch: StepBatch, micro_batch: int, positions: torch.Tensor) -> Suspect:
        mesh, plan = self.trainee.mesh, self.trainee.plan
        layout = Layout(self.dataset.seq_len, mesh.sp, plan.chunk_tokens)
        sample = batch.micro_batches.samples[micro_batch]
        documents: list[Any] = []
        guilty: list[Any] = []
        for shard, place in zip(layout.shards(mesh.sp_rank), layout.local, strict=True):
            here = documents_within(self.dataset, sample, start=shard.start, stop=shard.stop)
            bad = positions[(positions >= place.start) & (positions < place.stop)] - place.start + shard.start
            documents += here
            guilty += [d for d in here if ((bad >= d.start) & (bad < d.stop)).any()]
        return Suspect(mesh.rank, micro_batch, sample, tuple(dict.fromkeys(guilty or documents)))


def _record(batch: StepBatch, result: StepResult, suspects: list[Suspect]) -> dict[str, Any]:
    """As JSON values; numbers that are not finite as words."""
    return {
        "step": batch.step + 1,
        "epoch": batch.epoch,
        "loss": _plain(result.loss),
        "grad_norm": _plain(result.grad_norm),
        "update_applied": result.update_applied,
        "samples": list(batch.samples),
        "suspects": [asdict(suspect) for suspect in suspects],
    }


def _plain(number: float | None) -> float | str | None:
    return number if number is None or math.isfinite(number) else str(number)


def _message(batch: StepBatch, result: StepResult, suspects: list[Suspect]) -> str:
    weights = "the weights hold this step's update" if result.update_applied else "the weights are those before it"
    head = f"step {batch.step + 1}: loss {result.loss:.6g}, gradient norm {result.grad_norm}; {weights}. "
    if not suspects:
        return head + f"Every rank's loss is finite, so it arose in backward, on samples {list(batch.samples)}"
    return head + "Not finite on " + "; ".join(_shortened([_told(suspect) for suspect in suspects]))


def _told(suspect: Suspect) -> str:
    names = _shortened([f"{d.name} (tokens {d.start:,} to {d.stop:,})" for d in suspect.documents])
    return f"rank {suspect.rank}, micro-batch {suspect.micro_batch}, sample {suspect.sample}: {', '.join(names)}"


def _shortened(texts: list[str]) -> list[str]:
    more = len(texts) - NAMED
    return [*texts[:NAMED], f"and {more} more"] if more > 0 else texts
