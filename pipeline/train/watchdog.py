"""A thread that looks after its rank: tells the others how far it is, and ends a job that stands still.

A rank alone cannot know that it waits for another that will never come. So each writes down how far it is, beside the
others; when none has moved for as long as the plan allows, every rank that still can writes its stacks into the run
folder, names those that are behind, and leaves; Slurm ends the rest and the batch script requeues the job.
Before the first step a rank that reads or writes files is no stalled one: weights and checkpoints may take any time.
"""

import faulthandler
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from pipeline.files import HOST
from pipeline.plan.patience import Patience
from pipeline.plan.queue import Queue
from pipeline.plan.run_dir import RunDir
from pipeline.train.heartbeat import Heartbeat
from pipeline.train.stopping import LEAVE_SECONDS, Stopping

DUMP_SIGNAL = signal.SIGUSR1
"""Its handler, in C, writes the stacks of a process whose Python does not run any more."""

LOOK_SECONDS = 1.0
WRITES_PER_STALL = 10
"""A rank writes how far it is so often in the time of a stall, and at most once a second."""

LONGEST_WRITE_SECONDS = 30.0
DUMP_SECONDS = 5.0
"""For the other ranks to find the stall too and to write their stacks."""

PY_SPY_SECONDS = 60

MOVED_BYTES = 2**20
"""Between two looks: more than the ranks of a large job ask of rank 0's store meanwhile."""

FAULT_BYTES = 64 * 2**10
"""Mapped around a page that was not in memory: not every file system counts what it reads for that."""


@dataclass(frozen=True)
class Sign:
    """What a rank wrote last."""

    rank: int
    host: str
    pid: int
    born: int
    """When the process began, in ticks since its node did: another may have its number since."""
    beats: int
    step: int
    where: str
    silent_seconds: float
    """Without a beat, when it was written."""
    age_seconds: float
    """Since it was written."""

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host}) stands at step {self.step}, {self.where}"


class Watchdog:
    """Of one rank; it looks while `watching`."""

    def __init__(self, heartbeat: Heartbeat, patience: Patience, queue: Queue, run_dir: RunDir, *, rank: int) -> None:
        self._heartbeat = heartbeat
        self._patience = patience
        self._stopping: Stopping | None = None
        self._queue = queue
        self._folder = run_dir.heartbeats
        job, restart = os.environ.get("SLURM_JOB_ID", "local"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self._stacks = run_dir.stacks(job=job, restart=restart)
        self._start = f"job {job}, restart {restart}, {os.environ.get('WORLD_SIZE', '1')} ranks"
        """What an earlier start of the run wrote is not of these ranks."""
        self._rank = rank
        self._ended = threading.Event()
        self._wrote = 0.0
        self._moved_bytes = 0

    @contextmanager
    def watching(self, stopping: Stopping | None = None) -> Iterator[None]:
        """Looks for as long as the block lasts: at the steps that `stopping` knows, or at what comes before them."""
        self._stopping = stopping
        self._ended.clear()
        self._heartbeat.beat("start" if stopping is None else "first step")
        self._write()
        faulthandler.register(DUMP_SIGNAL, file=sys.stderr, all_threads=True)
        thread = threading.Thread(target=self._look, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()
            faulthandler.unregister(DUMP_SIGNAL)

    def _look(self) -> None:
        has_failed = False
        while not self._ended.wait(LOOK_SECONDS):
            try:
                if self._is_in_vain():
                    self._leave_in_vain()
                if self._patience.looks:
                    self._look_for_a_stall()
            except Exception:  # whatever it is: nobody else would end a job that stands still
                if not has_failed:
                    traceback.print_exc()
                has_failed = True

    def _is_in_vain(self) -> bool:
        if self._stopping is not None:
            return self._stopping.is_in_vain()
        left = self._queue.seconds_left()
        return self._queue.terminated() or (left is not None and left < LEAVE_SECONDS)

    def _leave_in_vain(self) -> None:
        again = self._queue.terminated() or (self._stopping is not None and self._stopping.got_on)
        what = "start" if self._stopping is None else "step under way"
        more = "" if again else ", as was every one in this job's time; raise train.time in the cluster's profile"
        self._queue.leave(f"the {what} could not end before the job does, and is lost{more}", again)

    def _look_for_a_stall(self) -> None:
        allowed = self._allowed_seconds()
        self._note_bytes()
        if time.monotonic() - self._wrote >= _write_seconds(allowed):
            self._write()
        if self._silent_seconds() <= allowed:
            return
        self._write()
        if all(sign.silent_seconds + sign.age_seconds > allowed for sign in self._signs()):
            self._end_the_stall(allowed)

    def _allowed_seconds(self) -> float:
        if self._stopping is None:
            return self._patience.starting_seconds
        return self._patience.seconds(self._stopping.longest_seconds, cost=self._stopping.cost)

    def _note_bytes(self) -> None:
        """Before the first step it is a sign of life to read or write files: weights, a checkpoint, packed data."""
        before, self._moved_bytes = self._moved_bytes, _moved_bytes()
        if self._stopping is None and self._moved_bytes - before > MOVED_BYTES:
            self._heartbeat.alive()

    def _end_the_stall(self, allowed: float) -> None:
        silent_since = self._heartbeat.at
        self._dump()
        self._ended.wait(DUMP_SECONDS)
        self._note_bytes()
        if self._heartbeat.at != silent_since or self._ended.is_set():
            return  # it went on
        self._write()
        signs = self._signs()
        behind = _behind(signs, silent_seconds=_write_seconds(allowed) + 2 * DUMP_SECONDS)
        if self._rank == min((s.rank for s in signs if s.host == HOST and s not in behind), default=None):
            for sign in behind:
                if sign.host == HOST:
                    _dump_another(sign, self._stack_file(sign.rank))
        named = "; ".join(str(sign) for sign in behind)
        told = f"stalled: no rank got on for {self._silent_seconds():.0f} s; {named}; stacks are in {self._stacks}"
        self._queue.leave(told, True)

    def _signs(self) -> list[Sign]:
        return read_signs(self._folder, start=self._start)

    def _silent_seconds(self) -> float:
        return time.monotonic() - self._heartbeat.at

    def _dump(self) -> None:
        with suppress(OSError), _stack_file_at(self._stack_file(self._rank)) as file:
            faulthandler.dump_traceback(file, all_threads=True)

    def _stack_file(self, rank: int) -> Path:
        return self._stacks / f"rank{rank}.txt"

    def _write(self) -> None:
        mine = self._heartbeat
        row: dict[str, Any] = {"start": self._start, "born": _born(os.getpid())}
        row |= {"rank": self._rank, "host": HOST, "pid": os.getpid(), "beats": mine.beats}
        row |= {"step": mine.step, "where": mine.where, "silent_seconds": self._silent_seconds()}
        path = self._folder / f"rank{self._rank}.json"
        with suppress(OSError):  # a full disk is no stall
            path.parent.mkdir(exist_ok=True)
            temporary = path.with_suffix(".partial")
            temporary.write_text(json.dumps(row))
            temporary.replace(path)
        self._wrote = time.monotonic()


def _write_seconds(allowed: float) -> float:
    """Between two writings of how far a rank is."""
    return min(LONGEST_WRITE_SECONDS, allowed / WRITES_PER_STALL)


def read_signs(folder: Path, *, start: str) -> list[Sign]:
    """What the ranks of this start wrote last, in order; how old it is by the clock of the disk, one for all nodes."""
    found: list[tuple[float, dict[str, Any]]] = []
    for path in folder.glob("rank*.json"):
        with suppress(OSError, ValueError):
            row = json.loads(path.read_text())
            if row.pop("start", None) == start:
                found.append((path.stat().st_mtime, row))
    newest = max((written for written, _ in found), default=0.0)
    signs = [Sign(**row, age_seconds=newest - written) for written, row in found]
    return sorted(signs, key=lambda sign: sign.rank)


def _behind(signs: list[Sign], *, silent_seconds: float) -> list[Sign]:
    """Those that have not even written for so long: stopped, dead, or without Python's lock; else the least far."""
    if silent := [sign for sign in signs if sign.age_seconds > silent_seconds]:
        return silent
    return [sign for sign in signs if sign.beats == min(sign.beats for sign in signs)]


def _moved_bytes() -> int:
    """Read and written by this process so far, by calls and through mapped pages, without those of this thread."""
    faults = _stat_of(os.getpid(), 12)
    return _counted_bytes(Path("/proc/self/io")) - _counted_bytes(Path("/proc/thread-self/io")) + faults * FAULT_BYTES


def _counted_bytes(path: Path) -> int:
    """0 where the kernel does not count."""
    try:
        rows = dict(line.split(": ") for line in path.read_text().splitlines())
    except OSError:
        return 0
    return sum(int(rows[name]) for name in ("rchar", "wchar", "read_bytes", "write_bytes"))


def _born(pid: int) -> int:
    """In ticks since the node began."""
    return _stat_of(pid, 22)


def _stat_of(pid: int, field: int) -> int:
    """Of a process, by its number in proc(5); the 2nd may hold anything in brackets."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[field - 3])


def _dump_another(sign: Sign, path: Path) -> None:
    """Whatever can be learned of a process of this node from outside."""
    with suppress(OSError, subprocess.SubprocessError), _stack_file_at(path) as file:
        if _born(sign.pid) != sign.born:
            file.write("this process is no more; another has its number\n")
            return
        for name in ("status", "wchan"):
            told = Path(f"/proc/{sign.pid}/{name}").read_text()
            file.write("".join(line for line in told.splitlines(keepends=True) if ":" not in line or "State" in line))
        file.write(f"\nits own stacks, if it can still write them, are at the end of the log of rank {sign.rank}\n")
        file.flush()
        os.kill(sign.pid, DUMP_SIGNAL)
        if program := shutil.which("py-spy"):
            command = [program, "dump", "--nonblocking", "--pid", str(sign.pid)]
            process = subprocess.Popen(command, stdout=file, stderr=file)
            try:
                process.wait(PY_SPY_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()  # nobody waits: one that hangs in the kernel would not die


@contextmanager
def _stack_file_at(path: Path) -> Iterator[TextIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        yield file
