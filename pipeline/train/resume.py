"""Going on: the newest checkpoint that is whole, brought into the engine of whatever mesh this job has."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.data.loader import Cursor
from pipeline.errors import DataError, RunError, UserError
from pipeline.metrics.console import warn
from pipeline.parallel.mesh import Mesh
from pipeline.plan import checkpoint_dir
from pipeline.plan.checkpoint_dir import DEEPSPEED_NAME, Checkpoint
from pipeline.plan.job import JobPlan
from pipeline.plan.run_dir import RunDir
from pipeline.train.checkpoint import random_file
from pipeline.train.state import set_random_state

TAIL_LINES = 15


@dataclass(frozen=True)
class Resume:
    """Where a job goes on."""

    checkpoint: Checkpoint
    universal: bool
    """It was saved by another number of ranks: DeepSpeed's universal format goes between."""

    @property
    def cursor(self) -> Cursor:
        return Cursor(self.checkpoint.record.step, self.checkpoint.record.samples_seen)


def find_resume(plan: JobPlan, run_dir: RunDir, mesh: Mesh) -> Resume | None:
    """The newest whole checkpoint of the run, or None if there is none. Collective.

    Damaged ones are set aside, loudly. Raises UserError if it belongs to other data.
    """
    if mesh.rank == 0:
        checkpoint_dir.remove_unfinished(run_dir.checkpoints)
    while (path := _from_rank_0(_newest(run_dir, mesh))) is not None:
        checkpoint, error = _checked(path, plan, mesh)
        if checkpoint is not None and error is None:
            _check_same_data(checkpoint, plan)
            check_same_layout(checkpoint, plan)
            other_ranks = checkpoint.record.world_size != plan.world_size
            # Stage 0 has no partitions: its one file suits any number of ranks.
            return Resume(checkpoint, universal=other_ranks and plan.recipe.zero.stage != 0)
        if mesh.rank == 0:
            aside = checkpoint_dir.set_aside(path)
            warn(f"checkpoint {path.name} is damaged: {error}; it is now {aside}, and the one before it is taken")
    return None


def load(resume: Resume, engine: Any, run_dir: RunDir, mesh: Mesh) -> None:
    """Weights, moments and random generators as they were. Collective; the engine was made for `resume.universal`."""
    checkpoint = resume.checkpoint
    folder = checkpoint.path
    if resume.universal:
        folder = run_dir.checkpoints / f".universal-{folder.name}"
        if error := _from_rank_0(_convert(checkpoint.path, folder, mesh)):
            raise RunError(f"{checkpoint.path} could not be converted for {mesh.world_size} ranks: {error}")
    asked = [{name: value for name, value in group.items() if name != "params"} for group in _groups(engine)]
    loaded, _ = engine.load_checkpoint(str(folder), tag=DEEPSPEED_NAME)
    if loaded is None:
        raise RunError(f"DeepSpeed did not load {checkpoint.path}, though its files are whole")
    # Weight decay and the like are what the plan says now, not what it said when this was saved; and from a universal
    # checkpoint at stage 3 DeepSpeed gives every group the first one's.
    for group, options in zip(_groups(engine), asked, strict=True):
        group.update(options)
    _separate_step_counts(engine)
    if resume.universal:
        dist.barrier()
        if mesh.rank == 0:
            checkpoint_dir.remove_unfinished(run_dir.checkpoints)
    if checkpoint.record.world_size == mesh.world_size:  # other ranks have no generators that could go on
        set_random_state(torch.load(checkpoint.path / random_file(mesh.rank), weights_only=False))


def _groups(engine: Any) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = engine.optimizer.param_groups
    return groups


def _separate_step_counts(engine: Any) -> None:
    """From a universal checkpoint at stage 3 DeepSpeed gives all flat parameters one step tensor, and Adam counts it up
    once for each of them."""
    for state in getattr(engine.optimizer, "optimizer", engine.optimizer).state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def _newest(run_dir: RunDir, mesh: Mesh) -> Path | None:
    return next(iter(checkpoint_dir.step_folders(run_dir.checkpoints)), None) if mesh.rank == 0 else None


def _from_rank_0(value: Any) -> Any:
    """Rank 0's value, on every rank: folders on a shared disk need not look the same everywhere at once."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _checked(path: Path, plan: JobPlan, mesh: Mesh) -> tuple[Checkpoint | None, str | None]:
    """The checkpoint, or what is wrong with it; each rank reads its share of the files."""
    checkpoint, error = None, None
    try:
        checkpoint = checkpoint_dir.read_checkpoint(path)
        recipe = plan.recipe.checkpoint
        error = checkpoint_dir.damage(
            checkpoint, checksums=recipe is None or recipe.verify, share=mesh.rank, shares=mesh.world_size
        )
    except DataError as unreadable:
        error = str(unreadable)
    errors: list[str | None] = [None] * mesh.world_size
    dist.all_gather_object(errors, error)
    return checkpoint, next((error for error in errors if error is not None), None)


def _check_same_data(checkpoint: Checkpoint, plan: JobPlan) -> None:
    record = checkpoint.record
    if (record.packing_key, record.sample_order) != (plan.packing_key, plan.sample_order):
        raise UserError(
            f"{checkpoint.path} was trained on packed data {record.packing_key} ({record.sample_order}), the plan says "
            f"{plan.packing_key} ({plan.sample_order}): its place in the data means nothing there; set data.* and "
            "evaluation.samples as they were, or start a new run"
        )


def check_same_layout(checkpoint: Checkpoint, plan: JobPlan) -> None:
    """Raises UserError if ZeRO's files of the checkpoint's stage are not those that the plan's stage can read."""
    saved, stage = checkpoint.record.zero_stage, plan.recipe.zero.stage
    if saved != stage and {saved, stage} != {1, 2}:
        raise UserError(
            f"{checkpoint.path} was saved at zero.stage {saved}, the plan says {stage}: DeepSpeed writes other "
            f"files there (1 and 2 share theirs); set zero.stage={saved}, or export the weights and start a new run"
        )


def _convert(source: Path, target: Path, mesh: Mesh) -> str | None:
    """On rank 0: DeepSpeed's own conversion, in a process of its own. Returns what went wrong, or None."""
    if mesh.rank != 0:
        return None
    workers = str(max(1, (os.cpu_count() or 2) // 2))
    options = ["--num_extract_workers", workers, "--num_merge_workers", workers, "--inject_missing_state"]
    folders = ["--input_folder", str(source / DEEPSPEED_NAME), "--output_folder", str(target / DEEPSPEED_NAME)]
    command = [sys.executable, "-P", "-m", "deepspeed.checkpoint.ds_to_universal", *folders, *options]
    print(f"{source.name} was saved by other ranks: converting it for {mesh.world_size}", flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode == 0:
        return None
    return "\n".join(["DeepSpeed's conversion failed:", *done.stdout.splitlines()[-TAIL_LINES:]])
