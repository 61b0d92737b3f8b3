"""Saving: every rank copies its states aside and goes on training, while a thread of each brings them to disk.

A checkpoint gets its name when all ranks' files are written, flushed and read back; until then the one before it is
the newest. What goes wrong on the way costs this checkpoint and a warning, never the run and never an older one.
"""

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch.distributed as dist

from pipeline.data.loader import Cursor
from pipeline.errors import RunError
from pipeline.files import sync, write_json
from pipeline.metrics.console import size
from pipeline.plan import checkpoint_dir
from pipeline.plan.checkpoint_dir import DEEPSPEED_NAME, CheckpointRecord, SavedFile
from pipeline.plan.run_dir import RunDir
from pipeline.train.checkpoint_writer import CopyingEngine, PartWriter
from pipeline.train.state import random_state
from pipeline.train.step import Trainee

PARTS_NAME = "written"  # a record per rank, while a checkpoint is being written
POLL_SECONDS = 0.1
AGREE_SECONDS = 0.5  # between two questions whether all ranks have done their part
ROOM_MARGIN = 1.05  # file headers, and whatever else lands on the disk meanwhile
PROBE_BYTES = 2**20


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is on disk."""

    path: str
    step: int
    bytes: int
    stall_seconds: float
    """For which training waited."""
    seconds: float
    """From the request until it was whole."""

    sha256: str
    """Of checkpoint.json, which holds the checksum of every file."""


@dataclass
class _Save:
    """The checkpoint in flight."""

    record: CheckpointRecord
    folder: Path
    """Where it is written."""
    target: Path
    """Its name once it is whole."""
    began: float
    part: PartWriter
    stall_seconds: float | None = None
    """For which training waited; None while it waits."""
    written: threading.Event = field(default_factory=threading.Event)
    """This rank's part is done, well or not."""
    ended: threading.Event = field(default_factory=threading.Event)
    """So is all that this rank does for the checkpoint: rank 0 has named it, or given it up."""
    abandoned: threading.Event = field(default_factory=threading.Event)
    """Some rank's part is not on disk, as `error` says: stop waiting for it."""
    error: str | None = None


class NotSavedError(RunError):
    """The last checkpoint of a run is not on disk."""


class Checkpointer:
    """Saves checkpoints of one job, one at a time. All methods but `news` are collective."""

    def __init__(self, trainee: Trainee, run_dir: RunDir, *, commit: str, beat: Callable[[str], None]) -> None:
        """`beat` is the rank's sign of life, with what it does: while it waits for a save that gets on."""
        self._trainee = trainee
        self._beat = beat
        self._run_dir = run_dir
        self._commit = commit
        self._folder = run_dir.checkpoints
        self._rank = trainee.mesh.rank
        self._states = CopyingEngine()
        trainee.engine.checkpoint_engine = self._states
        # DeepSpeed would copy two scripts into every checkpoint, outside of its checkpoint engine; `alst export` does
        # their work, and a disk that is full must not end the run here.
        trainee.engine._copy_recovery_script = lambda path: None
        self._save: _Save | None = None
        self._saved_step: int | None = None
        self._failure: str | None = None
        """Why the last checkpoint that was wanted is not on disk; the same on every rank."""
        self._news: list[Saved | str] = []
        self._size_bytes = _expected_bytes(trainee)
        self._longest_seconds = 0.0

    @property
    def longest_seconds(self) -> float:
        """Of a save so far, from the request until it was whole; known to rank 0."""
        return self._longest_seconds

    def due(self, step: int, *, asked: bool = False) -> bool:
        """Whether a checkpoint is wanted after `step` steps: by the recipe, or because it is `asked` for."""
        recipe = self._trainee.plan.recipe
        if recipe.checkpoint is None or step == self._saved_step:
            return False
        every = recipe.checkpoint.every_steps
        return asked or step == recipe.train.steps or (every is not None and step % every == 0)

    def save(self, cursor: Cursor) -> float:
        """Save the state after `cursor.step` steps. Returns the seconds for which training waited.

        The one before is on disk, or given up, when this returns; this one may take longer. A disk without room for
        it is a warning.
        """
        return self._begin(cursor, self._folder / checkpoint_dir.folder_name(cursor.step))

    def save_aside(self, cursor: Cursor) -> Path | None:
        """Save the state for whoever wants to look at it; nobody resumes from there. Returns where, once it is whole.

        None where checkpoints are off, or where it could not be written.
        """
        if self._trainee.plan.recipe.checkpoint is None:
            return None
        target = self._folder / f"aside-{checkpoint_dir.folder_name(cursor.step)}"
        self._begin(cursor, target)
        self._settle()
        return target if self._failure is None else None

    def _begin(self, cursor: Cursor, target: Path) -> float:
        began = time.monotonic()
        self._settle()
        folder = target.with_name(checkpoint_dir.writing_name(target))
        self._failure = self._agree(self._make_room(cursor, folder))
        if self._failure is not None:
            return time.monotonic() - began
        # DeepSpeed's own order of what each rank saves; nothing is written in here, see CopyingEngine.
        self._trainee.engine.save_checkpoint(str(folder), tag=DEEPSPEED_NAME, save_latest=False)
        states = [*self._states.take(), (folder / random_file(self._rank), random_state())]
        recipe = self._trainee.plan.recipe.checkpoint
        part = PartWriter(
            states,
            folder=folder,
            asynchronous=recipe is not None and recipe.asynchronous,
            ranks_per_node=self._trainee.plan.recipe.hardware.gpus_per_node,
        )
        save = self._save = _Save(self._record(cursor), folder, target, began, part)
        self._saved_step = cursor.step
        part.start(then=partial(self._after_part, save))
        self._wait(save, lambda seconds: part.is_copied or save.written.wait(seconds))
        save.stall_seconds = time.monotonic() - began
        return save.stall_seconds

    def finish(self) -> None:
        """Wait for what is being written. Raises NotSavedError, on every rank, if it did not get to disk."""
        self._settle()
        if self._failure is not None:
            raise NotSavedError(
                f"the last checkpoint is not on disk ({self._failure}); the one before it stands: see to the disk, "
                f"then go on with `alst resume {self._run_dir.path}`"
            )

    def news(self) -> list[Saved | str]:
        """On rank 0: what got to disk, or a warning of what did not, since this was last asked."""
        news, self._news = self._news, []
        return news

    def _settle(self) -> None:
        """Wait for the checkpoint in flight, on every rank; it is then on disk, or given up for `_failure`."""
        save, self._save = self._save, None
        if save is None:
            return
        self._wait(save, save.written.wait)
        save.error = self._agree(save.part.error)
        if save.error is not None:
            save.abandoned.set()
        self._wait(save, save.ended.wait)
        save.part.join()
        self._failure = self._agree(save.part.error)
        if self._failure is not None:
            self._saved_step = None

    def _wait(self, save: _Save, done: Callable[[float], bool]) -> None:
        """Until every rank is `done`, which waits so many seconds. Collective, again and again: a rank that waited for
        another's disk inside of one collective would give up, however well that disk gets on.

        It is a sign of life when bytes have moved on any rank, and none when a disk has stopped to answer.
        """
        seen = -1
        while True:
            found: list[tuple[bool, int]] = [(False, 0)] * dist.get_world_size()
            dist.all_gather_object(found, (done(AGREE_SECONDS), save.part.moved_bytes))
            if (moved := sum(count for _, count in found)) != seen:
                self._beat(f"save, {size(moved)} written or read back by all ranks")
            seen = moved
            if all(is_done for is_done, _ in found):
                return

    def _agree(self, error: str | None) -> str | None:
        """The first rank's error that has one, on all of them."""
        found: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, error)
        return next((f"rank {rank}: {error}" for rank, error in enumerate(found) if error is not None), None)

    def _after_part(self, save: _Save) -> None:
        """In this rank's thread, when its part is done: tell rank 0; rank 0 makes the checkpoint whole."""
        try:
            _write_part_record(save.folder, self._rank, save.part)
        except OSError as error:
            save.part.error = save.part.error or str(error)
        save.written.set()
        try:
            if self._rank == 0:
                self._complete(save)
        finally:
            save.ended.set()

    def _complete(self, save: _Save) -> None:
        """On rank 0: wait for every rank's part, then give the checkpoint its name."""
        try:
            files = self._wait_for_parts(save)
            digest = self._name(save, files)
        except Exception as error:  # as in PartWriter: whatever it is, it must be heard of
            save.part.error = str(error) or repr(error)
            shutil.rmtree(save.folder, ignore_errors=True)
            self._news.append(f"checkpoint of step {save.record.step} was given up: {error}; training goes on")
            return
        self._size_bytes = sum(file.size_bytes for file in files)
        self._prune()
        seconds = time.monotonic() - save.began
        self._longest_seconds = max(self._longest_seconds, seconds)
        stall_seconds = seconds if save.stall_seconds is None else save.stall_seconds
        self._news.append(Saved(str(save.target), save.record.step, self._size_bytes, stall_seconds, seconds, digest))

    def _wait_for_parts(self, save: _Save) -> list[SavedFile]:
        files: list[SavedFile] = []
        for rank in range(save.record.world_size):
            record = save.folder / PARTS_NAME / f"{rank}.json"
            while not record.exists():
                if save.abandoned.wait(POLL_SECONDS):
                    raise RunError(save.error or "a rank could not write its part")
            part = json.loads(record.read_text())
            if part["error"] is not None:
                raise RunError(f"rank {rank}: {part['error']}")
            files += [SavedFile(**file) for file in part["files"]]
        return files

    def _name(self, save: _Save, files: list[SavedFile]) -> str:
        """Everything is written and read back: from here on it is the newest. Returns its digest."""
        write_json(save.folder / self._run_dir.plan.name, self._trainee.plan.to_json())
        sync(save.folder / DEEPSPEED_NAME)
        shutil.rmtree(save.folder / PARTS_NAME)
        checkpoint_dir.write_record(save.folder, replace(save.record, files=tuple(files)))
        digest = hashlib.sha256((save.folder / checkpoint_dir.RECORD_NAME).read_bytes()).hexdigest()
        if save.target.exists():
            checkpoint_dir.remove(save.target)
        save.folder.rename(save.target)
        sync(self._folder)
        return digest

    def _prune(self) -> None:
        recipe = self._trainee.plan.recipe.checkpoint
        try:
            if recipe is not None:
                checkpoint_dir.prune(self._folder, keep_last=recipe.keep_last, keep_every=recipe.keep_every)
        except OSError as error:
            self._news.append(f"an old checkpoint could not be removed ({error}); it takes room until the next save")

    def _make_room(self, cursor: Cursor, folder: Path) -> str | None:
        """On rank 0: the folder for a checkpoint; or why there is no room for it."""
        if self._rank != 0:
            return None
        try:
            checkpoint_dir.remove_unfinished(self._folder)  # of saves that were given up: none is in flight here
            folder.mkdir(parents=True)
            reason = _lack_of_room(folder, int(self._size_bytes * ROOM_MARGIN))
        except OSError as error:
            reason = f"{folder}: {error.strerror}"
        if reason is not None:
            shutil.rmtree(folder, ignore_errors=True)
            self._news.append(f"no checkpoint of step {cursor.step}: {reason}; training goes on without it")
        return reason

    def _record(self, cursor: Cursor) -> CheckpointRecord:
        plan, mesh = self._trainee.plan, self._trainee.mesh
        return CheckpointRecord(
            step=cursor.step,
            samples_seen=cursor.position,
            world_size=mesh.world_size,
            dp=mesh.dp,
            sp=mesh.sp,
            zero_stage=plan.recipe.zero.stage,
            packing_key=plan.packing_key,
            sample_order=plan.sample_order,
            commit=self._commit,
            saved_at=time.time(),
            files=(),
        )


def random_file(rank: int) -> str:
    return f"rank-{rank:05d}.pt"


def _write_part_record(folder: Path, rank: int, part: PartWriter) -> None:
    """Seen whole or not at all. Not flushed: rank 0 takes it away as soon as it has read it."""
    target = folder / PARTS_NAME / f"{rank}.json"
    target.parent.mkdir(exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps({"error": part.error, "files": [asdict(file) for file in part.files]}))
    partial.replace(target)


def _lack_of_room(folder: Path, needed: int) -> str | None:
    """Why a checkpoint of `needed` bytes does not fit, or None. A file is tried too: free space shows no quota."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        return f"{folder.parent} has {free:,} bytes free, a checkpoint needs {needed:,}"
    probe = folder / ".probe"
    probe.write_bytes(bytes(PROBE_BYTES))
    sync(probe)
    probe.unlink()
    return None


def _expected_bytes(trainee: Trainee) -> int:
    """Of the first checkpoint: weights, master weights and moments. Later ones are as large as the one before."""
    recipe = trainee.plan.recipe
    parameters = list(trainee.engine.module.parameters())
    count = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)
    state_bytes = 2 if recipe.optimizer.states_dtype == "bfloat16" else 4
    states = 3 if recipe.optimizer.name == "adamw" else 1
    return int(count * (parameters[0].element_size() + states * state_bytes))
