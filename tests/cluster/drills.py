"""What a disturbance of a run cost: seconds in which it got no further, steps done twice. One row per drill, with what
it cost in each place that the tasks of a job may run in.

`make drills` has the rows written into docs/operations.md.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.metrics.rows import read_metrics
from tests.cluster.user import User, jobs, losses, told

TABLE = "ALST_DRILLS"
"""Names the document whose table is written anew at the end."""

BEGIN, END = "<!-- drills: written by `make drills` -->", "<!-- end of drills -->"

BARE, IN_IMAGE = "bare", "in the image"
PLACES = (BARE, IN_IMAGE)
HEAD = [
    f"| what happened | who went on | {' | '.join(f'steps again, {place} | seconds, {place}' for place in PLACES)} |",
    "|---|---|---|---|---|---|",
]
NOT_DONE = ["-", "-"]

TWO_NODES = ("--nodes", "2", "hardware.gpus_per_node=1")
STEPS = 3
"""After which a run is disturbed."""


@dataclass(frozen=True)
class Cost:
    """Of one drill in one place."""

    steps_again: int
    seconds: float
    """The longest time without a step that had not ended before, from the last step before the disturbance on."""

    @property
    def cells(self) -> list[str]:
        return [str(self.steps_again), f"{self.seconds:.0f}"]


costs: dict[tuple[str, str], dict[str, Cost]] = {}
"""By what happened and who saw to it that the run went on, then by place; of this session."""


@dataclass(frozen=True)
class Place:
    """Where the tasks of a drill's jobs run, and how someone submits them there."""

    name: str
    user: User
    profile: Callable[..., str]
    """Path of the profile `throw-away` for this place, with changes."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Of whoever submits."""

    def alst(self, *arguments: str, code: int = 0, **variables: str) -> str:
        return self.user.alst(*arguments, code=code, **(dict(self.variables) | variables))

    def submit(self, *arguments: str, runs: Path | None = None, **changes: Any) -> Path:
        """The run folder of two ranks on two nodes; `changes` are of the profile."""
        variables = dict(self.variables) | ({} if runs is None else {"ALST_RUNS": str(runs)})
        return self.user.submit(*TWO_NODES, *arguments, cluster=self.profile(**changes), **variables)

    def begun(self, *arguments: str, runs: Path | None = None, **changes: Any) -> Path:
        """The same, with some steps done."""
        run = self.submit(*arguments, runs=runs, **changes)
        self.user.wait(lambda: len(losses(run)) >= STEPS, run)
        return run

    def ends_well(self, run: Path) -> None:
        self.user.wait_for_end(run)
        assert self.user.state(train_job(run)) == "COMPLETED", told(run)


class Disturbed:
    """A run, from the moment on when something happens to it."""

    def __init__(self, run: Path) -> None:
        self.run = run
        steps = self._steps()
        self._at = steps[-1]["time"] if steps else time.time()
        self._done = max((row["step"] for row in steps), default=0)

    def ended(self, what: str, *, by: str, place: Place, peaceful: list[float]) -> None:
        """It has done all its steps: to the very losses of a run that was left in peace. Records what that cost."""
        assert losses(self.run) == peaceful, told(self.run)
        steps = self._steps()
        again = len(steps) - len({row["step"] for row in steps})
        first = {row["step"]: row["time"] for row in reversed(steps) if row["step"] > self._done}
        times = [self._at, *(first[step] for step in sorted(first))]
        cost = Cost(again, max(after - before for before, after in pairwise(times)))
        costs.setdefault((what, by), {})[place.name] = cost
        place.user.wait(lambda: place.user.cluster.job_processes() == [], self.run)  # slurmstepd ends after its job

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
    """The costs into the document that is named, if one is; those of drills that were not done now stay."""
    if not (name := os.environ.get(TABLE)):
        return
    before, rest = Path(name).read_text().split(BEGIN)
    table, after = rest.split(END)
    known = {what: cells for what, *cells in map(_cells, table.strip().splitlines()[len(HEAD) :])}
    for (what, by), places in costs.items():
        cells = known.get(what, [by, *NOT_DONE * len(PLACES)])[1:]
        for number, place in enumerate(PLACES):
            if place in places:
                cells[2 * number : 2 * number + 2] = places[place].cells
        known[what] = [by, *cells]
    rows = [f"| {' | '.join([what, *cells])} |" for what, cells in known.items()]
    Path(name).write_text("\n".join([before + BEGIN, *HEAD, *rows, END + after]))


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]
