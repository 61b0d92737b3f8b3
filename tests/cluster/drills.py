"""What a disturbance of a run cost: seconds in which it got no further, steps done twice. One row per drill.

`make drills` has the rows written into docs/operations.md.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pipeline.metrics.rows import read_metrics
from tests.cluster.user import User, jobs, losses, told

TABLE = "ALST_DRILLS"
"""Names the document whose table is written anew at the end."""

BEGIN, END = "<!-- drills: written by `make drills` -->", "<!-- end of drills -->"


@dataclass(frozen=True)
class Row:
    """One drill."""

    what: str
    by: str
    """Who sees to it that the run goes on."""
    steps_again: int
    seconds: float
    """The longest time without a step that had not ended before, from the last step before the disturbance on."""


rows: dict[str, Row] = {}
"""By name; of this session."""


class Disturbed:
    """A run, from the moment on when something happens to it."""

    def __init__(self, run: Path) -> None:
        self.run = run
        steps = self._steps()
        self._at = steps[-1]["time"] if steps else time.time()
        self._done = max((row["step"] for row in steps), default=0)

    def ended(self, what: str, *, by: str, user: User, peaceful: list[float]) -> None:
        """It has done all its steps: to the very losses of a run that was left in peace. Records the row."""
        assert losses(self.run) == peaceful, told(self.run)
        steps = self._steps()
        again = len(steps) - len({row["step"] for row in steps})
        first = {row["step"]: row["time"] for row in reversed(steps) if row["step"] > self._done}
        times = [self._at, *(first[step] for step in sorted(first))]
        rows[what] = Row(what, by, again, max(after - before for before, after in pairwise(times)))
        user.wait(lambda: user.cluster.job_processes() == [], self.run)  # slurmstepd ends after its job

    def _steps(self) -> list[dict]:
        metrics = self.run / "metrics.jsonl"
        return list(read_metrics(metrics)) if metrics.exists() else []


def train_job(run: Path) -> str:
    return jobs(run)["train"]


def log_of(run: Path, *, start: int) -> str:
    """What rank 0 said in a start of the train job; -1 is the newest."""
    starts = sorted((run / "logs" / f"train-{train_job(run)}").iterdir(), key=lambda folder: int(folder.name))
    return (starts[start] / "rank0.log").read_text()


def rank(user: User, number: int) -> int:
    """The process of a rank of the only job there is; rank 0 is also what Slurm calls the batch script."""
    pids = user.cluster.job_processes(rank=number)
    (pid,) = (pid for pid in pids if b"submitit" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"srun")[0])
    return pid


def both(user: User) -> list[int]:
    return [rank(user, 0), rank(user, 1)]


@contextmanager
def frozen(pids: list[int]) -> Iterator[None]:
    """Processes that stand still inside the block, so that a fast run does not end before its drill begins."""
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):  # Slurm has ended it
                os.kill(pid, signal.SIGCONT)


def write_table() -> None:
    """The rows into the document that is named, if one is; those of drills that were not done now stay."""
    if not (name := os.environ.get(TABLE)):
        return
    before, rest = Path(name).read_text().split(BEGIN)
    table, after = rest.split(END)
    head = ["| what happened | who went on | steps done again | seconds without a new step |", "|---|---|---|---|"]
    known = {line.split(" | ")[0].removeprefix("| "): line for line in table.strip().splitlines()[len(head) :]}
    known |= {row.what: f"| {row.what} | {row.by} | {row.steps_again} | {row.seconds:.0f} |" for row in rows.values()}
    Path(name).write_text("\n".join([before + BEGIN, *head, *known.values(), END + after]))
