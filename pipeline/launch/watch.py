"""What has become of a run: from Slurm's queue, its accounting and the run folder; nothing is remembered.

The queue alone says that a job lives, so that one that crashed never looks alive.
"""

import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.launch.slurm import ask, seconds_of
from pipeline.launch.submit import SubmittedJob, read_jobs
from pipeline.plan.run_dir import RunDir

FAILED = {"FAILED", "OUT_OF_MEMORY", "NODE_FAIL", "TIMEOUT", "BOOT_FAIL", "DEADLINE"}
"""States of a job that ended, and neither well nor because someone wanted it to."""

FOLLOW_SECONDS = 0.5
READS_PER_QUESTION = 6  # of a log, until the queue is asked again: Slurm's controller serves many
TAIL_LINES = 40
TASK_ENDED = re.compile(r"^srun: error: .*: tasks? [\d,\s-]+: (.*)$", re.MULTILINE)
"""srun's words on a task that did not end well: `srun: error: node1: task 3: Killed`, in the order it hears of them."""
BY_ITSELF = "Exited with exit code"
START_OVER = re.compile(r"DUE TO (JOB REQUEUE|NODE FAILURE|PREEMPTION)")
BATCH_SAID = re.compile(r"^alst: (.*)$", re.MULTILINE)
"""Words of the batch script itself: why it does not start the job again."""


@dataclass(frozen=True)
class JobState:
    """A job as Slurm has it now."""

    job: SubmittedJob
    state: str
    """PENDING, RUNNING, …, as squeue says; once it has left the queue as sacct says; UNKNOWN if neither does."""
    detail: str
    """Why it waits, or how it ended."""
    is_queued: bool
    """It waits or runs."""
    seconds_left: int | None
    """Until its time limit, while it runs."""
    restarts: int
    requeued_for: str = ""
    """Why the batch script last put it back into the queue; nothing if it has not."""


@dataclass(frozen=True)
class Failure:
    """The first thing that went wrong in the newest start of a job."""

    source: Path
    text: str


def job_states(run_dir: RunDir) -> list[JobState]:
    """Every job of the run, oldest first. Raises UserError if it was never submitted, or if squeue is not here."""
    jobs = read_jobs(run_dir)
    if not jobs:
        raise UserError(f"{run_dir.path}: was not submitted to Slurm; see its logs/, or start it with `alst resume`")
    if shutil.which("squeue") is None:
        raise UserError("squeue: not on the PATH; ask on a login node of the cluster the run was submitted to")
    queued, ended = _queued(jobs), _ended(jobs)
    return [replace(_state(job, queued, ended, run_dir), requeued_for=_reason(job, run_dir)) for job in jobs]


def check_not_queued(run_dir: RunDir) -> None:
    """Raises UserError if a job of the run waits or runs."""
    for state in job_states(run_dir) if read_jobs(run_dir) else []:
        if state.is_queued:
            raise UserError(
                f"{run_dir.path}: its {state.job.stage} job {state.job.id} is {state.state}; wait for its end, or "
                f"`alst cancel {run_dir.path.name}`"
            )


def cancel(run_dir: RunDir) -> list[str]:
    """Cancel the jobs that wait or run; their ids."""
    living = [state.job.id for state in job_states(run_dir) if state.is_queued]
    if living:
        ask("scancel", *living)
    return living


def steps_done(run_dir: RunDir) -> list[dict[str, Any]]:
    """The whole rows of metrics.jsonl by step; of a step done again, the last."""
    try:
        lines = run_dir.metrics.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    rows: dict[int, dict[str, Any]] = {}
    for line in lines:
        with suppress(ValueError):  # being written
            row = json.loads(line)
            rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def first_failure(run_dir: RunDir, job: SubmittedJob) -> Failure | None:
    """What went wrong first in the newest start of a job: by srun if a signal ended a task, else in the task's words.

    That the others lost their connection to it is what follows.
    """
    for srun in (run_dir.slurm / f"{job.id}_0_log.err", *sorted(run_dir.slurm.glob(f"{job.id}_*_0_log.err"))):
        said = START_OVER.split(srun.read_text(errors="replace"))[-1] if srun.is_file() else ""
        if batch := BATCH_SAID.search(said):
            return Failure(srun, batch[1])
        ended = TASK_ENDED.search(said)
        if ended is not None and not ended[1].startswith(BY_ITSELF):
            return Failure(srun, ended[0].removeprefix("srun: error: "))
    newest = newest_logs(run_dir, job)
    if newest is None:
        return _before_python(run_dir, job)
    if not (newest / "failures.jsonl").is_file():
        return None
    first = min(map(json.loads, (newest / "failures.jsonl").read_text().splitlines()), key=lambda row: row["time"])
    return Failure(newest / f"rank{first['rank']}.log", f"rank {first['rank']}: {first['error']}")


def _before_python(run_dir: RunDir, job: SubmittedJob) -> Failure | None:
    """The last words of a job in which no task came to write a log: of the shell, a module, the container."""
    for path in sorted(run_dir.slurm.glob(f"{job.id}_*_log.err")):
        said = [
            line
            for line in path.read_text(errors="replace").splitlines()
            if line.strip() and not line.startswith(("srun:", "slurmstepd:"))
        ]
        if said:
            return Failure(path, said[-1])
    return None


def newest_logs(run_dir: RunDir, job: SubmittedJob) -> Path | None:
    """The logs of a job's newest start."""
    starts = _starts(run_dir, job)
    return starts[-1] if starts else None


def read_log(run_dir: RunDir, *, rank: int, follow: bool) -> Iterator[str]:
    """The end of a rank's newest log; with `follow` what is added to it and to later starts' until the job ends.

    Raises UserError if there is none, naming the ranks that have one.
    """
    job, folder = _newest_with_logs(run_dir)
    path = folder / f"rank{rank}.log"
    if not path.is_file():
        ranks = sorted(int(log.stem.removeprefix("rank")) for log in folder.glob("rank*.log"))
        raise UserError(f"--rank {rank}: {folder} has none; use one of {ranks}")
    said = path.read_bytes()
    yield "".join(said.decode(errors="replace").splitlines(keepends=True)[-TAIL_LINES:])
    if follow:
        yield from _added(run_dir, job, path, offset=len(said))


def _added(run_dir: RunDir, job: SubmittedJob, path: Path, *, offset: int) -> Iterator[str]:
    """What is written to a log after `offset`, and to those of the job's later starts."""
    lives = True
    while lives:
        lives = bool(_queued([job]))  # asked before the log is read: what the job wrote last is not missed
        for _ in range(READS_PER_QUESTION):
            with path.open("rb") as log:
                log.seek(offset)
                said = log.read()
            offset += len(said)
            yield said.decode(errors="replace")
            newest = (newest_logs(run_dir, job) or path.parent) / path.name
            if newest != path and newest.is_file():
                path, offset = newest, 0
            time.sleep(FOLLOW_SECONDS)


def _newest_with_logs(run_dir: RunDir) -> tuple[SubmittedJob, Path]:
    for job in reversed(read_jobs(run_dir)):
        if (folder := newest_logs(run_dir, job)) is not None:
            return job, folder
    raise UserError(f"{run_dir.path}: no job of it has started yet; see `alst status {run_dir.path.name}`")


def _starts(run_dir: RunDir, job: SubmittedJob) -> list[Path]:
    return sorted(run_dir.logs(job=f"{job.stage}-{job.id}").parent.glob("*"), key=lambda path: int(path.name))


def _state(job: SubmittedJob, queued: dict[str, list[str]], ended: dict[str, list[str]], run_dir: RunDir) -> JobState:
    restarts = max(0, len(_starts(run_dir, job)) - 1)
    if job.id in queued:
        state, reason, left = queued[job.id]
        waits = reason if reason not in ("None", "") else ""
        return JobState(job, state, waits, True, seconds_of(left) if state == "RUNNING" else None, restarts)
    if job.id in ended:
        state, code, elapsed = ended[job.id]
        return JobState(
            job, state.split()[0], f"exit code {code.partition(':')[0]} after {elapsed}", False, None, restarts
        )
    why = "the accounting does not know it" if shutil.which("sacct") else "sacct is not on the PATH: install it"
    return JobState(job, "UNKNOWN", f"it has left the queue, and {why}; see logs/ and slurm/", False, None, restarts)


def _reason(job: SubmittedJob, run_dir: RunDir) -> str:
    """Why the job, or one of its array, was last put back into the queue."""
    rows = run_dir.requeues.read_text(encoding="utf-8").splitlines() if run_dir.requeues.is_file() else []
    found = [re.search(rf" job {job.id}(_\d+)?: (.*)$", row) for row in rows]
    return next((match[2] for match in reversed(found) if match is not None), "")


def _queued(jobs: list[SubmittedJob]) -> dict[str, list[str]]:
    """State, reason and time left of the jobs that wait or run. Raises UserError if Slurm does not answer."""
    ids = ",".join(job.id for job in jobs)
    done = ask("squeue", "--noheader", "--format=%F|%T|%r|%L", f"--jobs={ids}")
    if done.returncode and "Invalid job id" not in done.stderr:  # all have left the queue long ago
        raise UserError(f"Slurm does not answer: {done.stderr.strip()}; is SLURM_CONF right, and its controller up?")
    return _by_job(done.stdout, most_telling="RUNNING")


def _ended(jobs: list[SubmittedJob]) -> dict[str, list[str]]:
    """State, exit code and elapsed time by the accounting; empty where there is none."""
    if shutil.which("sacct") is None:
        return {}
    ids = ",".join(job.id for job in jobs)
    done = ask(
        "sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={ids}", "--format=JobID,State,ExitCode,Elapsed"
    )
    return _by_job(done.stdout, least_telling="COMPLETED")


def _by_job(rows: str, *, most_telling: str = "", least_telling: str = "") -> dict[str, list[str]]:
    """`ID|STATE|…` rows by job; of an array's many rows the one whose state tells most of the whole."""
    found: dict[str, list[str]] = {}
    for row in rows.splitlines():
        name, *fields = row.split("|")
        job = name.partition("_")[0]
        if job not in found or fields[0] == most_telling or found[job][0] == least_telling:
            found[job] = fields
    return found
