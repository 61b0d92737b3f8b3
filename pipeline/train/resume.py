"""Going on: the newest checkpoint that is whole, brought into the engine of whatever mesh this job has."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from pipeline.data.loader import Cursor
from pipeline.errors import DataError, RunError, UserError
from pipeline.metrics.console import warn
from pipeline.parallel.mesh import Mesh
from pipeline.plan import checkpoint_dir
from pipeline.plan.checkpoint_dir import DEEPSPEED_NAME, Checkpoint
from pipeline.plan.job import JobPlan
from pipeline.plan.resumable import check_resumable, of_other_ranks
from pipeline.plan.run_dir import RunDir
from pipeline.train.checkpoint import random_file
from pipeline.train.state import set_random_state

TAIL_LINES = 15
CONVERTING_SECONDS = 1.0
"""Between two questions whether a conversion has ended."""


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
    """The newest whole checkpoint of the run, or None if there never was one. Collective.

    Damaged ones are set aside, loudly. Raises UserError if the plan cannot go on from it, or if none is whole: nobody
    wants to begin again unasked. Raises RunError if the disk does not answer.
    """
    if mesh.rank == 0:
        checkpoint_dir.remove_unfinished(run_dir.checkpoints)
    while (path := _from_rank_0(_newest(run_dir, mesh))) is not None:
        checkpoint, error = _checked(path, plan, mesh)
        if checkpoint is not None and error is None:
            check_resumable(checkpoint, plan)
            return Resume(checkpoint, universal=of_other_ranks(checkpoint, plan))
        if mesh.rank == 0:
            aside = checkpoint_dir.set_aside(path)
            warn(f"checkpoint {path.name} is damaged: {error}; it is now {aside}, and the one before it is wanted")
    if damaged := _from_rank_0(checkpoint_dir.damaged_folders(run_dir.checkpoints)):
        raise UserError(
            f"{run_dir.checkpoints}: no checkpoint is whole, {len(damaged)} are damaged; bring one back, or remove "
            "them to begin at step 1"
        )
    return None


def load(resume: Resume, engine: Any, run_dir: RunDir, mesh: Mesh, *, beat: Callable[[str], None]) -> None:
    """Weights, moments and random generators as they were. Collective; the engine was made for `resume.universal`.

    `beat` is the rank's sign of life, with what it does.
    """
    checkpoint = resume.checkpoint
    folder = checkpoint.path
    if resume.universal:
        folder = run_dir.checkpoints / f".universal-{folder.name}"
        if error := _convert(checkpoint.path, folder, mesh, beat):
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
    checkpoint, damage, unread = None, None, None
    try:
        checkpoint = checkpoint_dir.read_checkpoint(path)
        recipe = plan.recipe.checkpoint
        damage = checkpoint_dir.damage(
            checkpoint, checksums=recipe is None or recipe.verify, share=mesh.rank, shares=mesh.world_size
        )
    except DataError as error:
        damage = str(error)
    except OSError as error:
        unread = f"rank {mesh.rank}: {error}"
    found: list[tuple[str | None, str | None]] = [(None, None)] * mesh.world_size
    dist.all_gather_object(found, (damage, unread))
    if failure := next((unread for _, unread in found if unread is not None), None):
        raise RunError(
            f"{path} cannot be read ({failure}), which does not make it damaged; see to the disk, start again"
        )
    return checkpoint, next((damage for damage, _ in found if damage is not None), None)


def _convert(source: Path, target: Path, mesh: Mesh, beat: Callable[[str], None]) -> str | None:
    """DeepSpeed's own conversion, in a process of rank 0's. Collective, again and again: however long it takes, no rank
    waits for it inside of one collective. Returns what went wrong, or None.

    It is a sign of life when that process, or one that it began, has read or written.
    """
    conversion = _Conversion(source, target, ranks=mesh.world_size) if mesh.rank == 0 else None
    seen = None
    while True:
        code, moved, told = _from_rank_0(None if conversion is None else conversion.state())
        if moved != seen:
            beat("converting the checkpoint")
        seen = moved
        if code is not None:
            return told if code else None


class _Conversion:
    """The process that converts a checkpoint."""

    def __init__(self, source: Path, target: Path, *, ranks: int) -> None:
        workers = str(max(1, (os.cpu_count() or 2) // 2))
        options = ["--num_extract_workers", workers, "--num_merge_workers", workers, "--inject_missing_state"]
        folders = ["--input_folder", str(source / DEEPSPEED_NAME), "--output_folder", str(target / DEEPSPEED_NAME)]
        command = [sys.executable, "-P", "-m", "deepspeed.checkpoint.ds_to_universal", *folders, *options]
        print(f"{source.name} was saved by other ranks: converting it for {ranks}", flush=True)
        self._told = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})  # inherited: to the job it means no end
        try:
            self._process = subprocess.Popen(command, stdout=self._told, stderr=subprocess.STDOUT, text=True)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def state(self) -> tuple[int | None, int, str]:
        """Its exit code, None if it still runs after a while; the bytes it has moved; what it told if it failed."""
        with suppress(subprocess.TimeoutExpired):
            if self._process.wait(CONVERTING_SECONDS):
                self._told.seek(0)
                lines = ["DeepSpeed's conversion failed:", *self._told.read().splitlines()[-TAIL_LINES:]]
                return self._process.returncode, 0, "\n".join(lines)
        return self._process.returncode, self._moved_bytes(), ""

    def _moved_bytes(self) -> int:
        """By it and those it began, as far as they are there and the kernel counts."""
        pid, moved = self._process.pid, 0
        with suppress(OSError, psutil.Error, AttributeError):  # psutil has no counters where the kernel has none
            began = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            for process in [pid, *map(int, began)]:
                with suppress(psutil.Error):
                    counters = psutil.Process(process).io_counters()
                    moved += counters.read_chars + counters.write_chars
        return moved
