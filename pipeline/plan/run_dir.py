"""The run folder: one owner of every path in it. It alone suffices to understand or restart a run."""

import fcntl
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from pipeline.errors import UserError
from pipeline.files import replaced, write_json
from pipeline.plan.job import JobPlan
from pipeline.recipe.load import dump

LOCK_SECONDS = 180
"""How long a file server may keep the lock of a node that failed; a job that was started again waits for it."""

_held: list[TextIO] = []
"""Lock files of this process; closing one would give its lock back."""


def runs_root() -> Path:
    """Where runs, their MLflow store and packed data sets lie: $ALST_RUNS, else ./runs."""
    return Path(os.environ.get("ALST_RUNS") or "runs").resolve()


def packed_folder(root: Path, plan: JobPlan) -> Path:
    """Where the packed data set of a plan lies, among the runs of `root`."""
    return root / "packed" / plan.packing_key


@dataclass(frozen=True)
class RunDir:
    """The paths of one run."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def code(self) -> Path:
        return self.path / "code"

    @property
    def commit(self) -> Path:
        return self.path / "commit.txt"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """What happened to the run: its starts, its checkpoints, its ends."""
        return self.path / "events.jsonl"

    @property
    def environment(self) -> Path:
        """What its newest start found around it; no secrets."""
        return self.path / "environment.json"

    @property
    def packing_report(self) -> Path:
        return self.path / "packing.json"

    @property
    def packing_plot(self) -> Path:
        return self.path / "packing.png"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def told_files(self) -> tuple[Path, ...]:
        """What is kept in MLflow as well, beside the texts of jobs."""
        packing = (self.packing_report, self.packing_plot)
        return self.recipe, self.plan, self.environment, *packing, self.plot, self.report

    @property
    def tracking_id(self) -> Path:
        """The name by which MLflow finds the run."""
        return self.path / "tracking_id"

    @property
    def mlflow_lock(self) -> Path:
        """Held by whoever brings the run into MLflow."""
        return self.path / "mlflow.lock"

    @property
    def plot(self) -> Path:
        return self.path / "training.png"

    @property
    def root(self) -> Path:
        """Where runs, their MLflow store and packed data sets lie together."""
        return self.path.resolve().parent

    def packed(self, plan: JobPlan) -> Path:
        """The packed data set of a plan; runs that ask for the same bytes share it."""
        return packed_folder(self.root, plan)

    @property
    def slurm(self) -> Path:
        """What was handed to Slurm: sbatch texts, submitit's files, and which jobs there were."""
        return self.path / "slurm"

    def sbatch(self, stage: str) -> Path:
        """The text of a stage's job."""
        return self.slurm / f"{stage}.sbatch"

    @property
    def jobs(self) -> Path:
        return self.slurm / "jobs.json"

    @property
    def cluster(self) -> Path:
        """The profile of the cluster it was submitted to."""
        return self.slurm / "cluster.json"

    def requeue_mark(self, job: str) -> Path:
        """There when the tasks of a job have stopped with steps left: it is to be started again."""
        return self.slurm / f"requeue-{job}"

    @property
    def requeues(self) -> Path:
        """A line for every time that a job's batch script put it back into the queue: when, which job, why."""
        return self.slurm / "requeues"

    @property
    def excluded(self) -> Path:
        """Nodes that jobs of this run are not to use again: `name when why` in each line. Remove one to allow it."""
        return self.slurm / "excluded"

    def excluded_nodes(self) -> list[str]:
        """The nodes of `excluded`, each once."""
        rows = self.excluded.read_text(encoding="utf-8").splitlines() if self.excluded.is_file() else []
        return list(dict.fromkeys(row.split()[0] for row in rows if row.strip()))

    def exclude(self, node: str, why: str) -> None:
        """No later job of this run is to get the node."""
        with self.excluded.open("a", encoding="utf-8") as file:
            file.write(f"{node} {time.strftime('%Y-%m-%d %H:%M:%S')} {why}\n")

    def is_packed(self, plan: JobPlan) -> bool:
        """Whether the packed data set is complete: its manifest is written last."""
        return (self.packed(plan) / "manifest.json").is_file()

    @property
    def cluster_check(self) -> Path:
        """What the ranks of `alst cluster check` found."""
        return self.path / "check.json"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def save_switch(self) -> Path:
        """While it is there, a checkpoint is wanted after the step; taken away once that is under way."""
        return self.path / "save"

    @property
    def stop_switch(self) -> Path:
        """While it is there, no step is begun; `alst resume` takes it away."""
        return self.path / "stop"

    @property
    def heartbeats(self) -> Path:
        """How far each rank is, as it wrote last: `rank<k>.json`."""
        return self.path / "heartbeats"

    def stacks(self, *, job: str, restart: int) -> Path:
        """Of the ranks of a start that stalled: `rank<k>.txt`."""
        return self.path / "stalls" / f"{job}-{restart}"

    def nan_record(self, step: int) -> Path:
        """What is known of a step, counted from 1, whose loss or gradient was not finite."""
        return self.path / "nan" / f"step-{step}.json"

    def logs(self, *, job: str, restart: int = 0) -> Path:
        """Of one start of a job: `rank<k>.log` per rank."""
        return self.path / "logs" / job / str(restart)

    def new_logs(self, *, job: str) -> Path:
        """The folder for the next start of a job."""
        restart = 0
        while True:
            folder = self.logs(job=job, restart=restart)
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                restart += 1

    def hold(self) -> None:
        """Be the only job that trains into this folder, until this process ends. Raises UserError if there is one.

        The kernel gives the lock back however a process ends; on a shared disk the file server does, after a while.
        """
        started_again = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
        file = self._locked(patience_seconds=LOCK_SECONDS if started_again else 0)
        file.truncate(0)
        job = os.environ.get("SLURM_JOB_ID")
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {socket.gethostname()}{f', job {job}' if job else ''}, since {since}\n")
        file.flush()
        _held.append(file)

    def check_free(self) -> None:
        """Raises UserError if a job trains into this folder now."""
        self._locked().close()

    def _locked(self, *, patience_seconds: float = 0) -> TextIO:
        file = self.lock.open("a+", encoding="utf-8")
        try:
            _lock(file, time.monotonic() + patience_seconds)
        except BlockingIOError:
            with file:
                file.seek(0)
                holder = file.read().strip() or "it just started"
            raise UserError(
                f"{self.path}: another job trains into this run folder ({holder}); wait for its end, or end it, before "
                "this one starts"
            ) from None
        except OSError:
            pass  # a disk without locks: some Lustre mounts
        return file

    def write_plan(self, plan: JobPlan) -> None:
        """The plan, and the resolved recipe as one would write it."""
        with replaced(self.recipe) as temporary:
            temporary.write_text(dump(plan.recipe), encoding="utf-8")
        write_json(self.plan, plan.to_json())


def _lock(file: TextIO, deadline: float) -> None:
    """Raises BlockingIOError if another process has it, still at the deadline."""
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(1)


def create_run_dir(plan: JobPlan) -> RunDir:
    """A new folder `<runs>/<name>-<time>` with the resolved recipe and the plan in it.

    Raises UserError if it cannot be written.
    """
    root = runs_root()
    stamp = f"{plan.recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        run_dir = RunDir(_new_folder(root, stamp))
        run_dir.write_plan(plan)
    except OSError as error:
        raise UserError(f"{root}: {error.strerror}; set ALST_RUNS to a folder that can be written") from None
    return run_dir


def _new_folder(root: Path, stamp: str) -> Path:
    """`root/stamp`, with -2, -3, … if runs start in the same second."""
    number = 1
    while True:
        folder = root / (stamp if number == 1 else f"{stamp}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
