"""A plan becomes jobs in Slurm's queue: pack, then train, through submitit. The only place that knows submitit.

A job is a pickled path and no more: each task calls `launch.entry.run_task` with the run folder's plan.json.
"""

import grp
import json
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from submitit import SlurmExecutor

from pipeline.errors import AlstError, RunError, UserError
from pipeline.files import write_json
from pipeline.launch.container import with_image
from pipeline.launch.entry import Stage, run_task
from pipeline.launch.foreseen import check_foreseen
from pipeline.launch.jobs import JobRequest, jobs_of
from pipeline.launch.refusals import check_limits, check_submission, section_of
from pipeline.launch.slurm import ask, submitting_environment
from pipeline.launch.snapshot import take_snapshot
from pipeline.plan.cluster import ClusterProfile
from pipeline.plan.job import JobPlan
from pipeline.plan.run_dir import RunDir, create_run_dir


@dataclass(frozen=True)
class SubmittedJob:
    """A job that was handed to Slurm."""

    stage: Stage
    id: str
    submitted_at: float
    """Unix seconds."""


class _Executor(SlurmExecutor):
    """submitit's writer of sbatch texts and pickles, which also writes a text where there is no Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def text(self, *, array_tasks: int = 1) -> str:
        """What would be handed to sbatch."""
        if array_tasks > 1:
            self.parameters["map_count"] = array_tasks
        text: str = self._make_submission_file_text(self._submitit_command_str, "")
        return text


def submit_new(plan: JobPlan, profile: ClusterProfile, *, force: bool = False, chain: int = 1) -> RunDir:
    """A new run, in Slurm's queue, with a `chain` of train jobs; with `force` also if it is foreseen not to fit, or not
    to end a step.

    Raises UserError before anything is there, and then leaves no folder.
    """
    check_submission(plan, profile)
    if not force:
        check_foreseen(plan, profile)
    plan = with_image(plan, profile)
    run_dir = prepare(plan, profile)
    try:
        submit(jobs_of(plan, profile, run_dir, chain=chain), run_dir)
    except AlstError:
        shutil.rmtree(run_dir.path)
        raise
    return run_dir


def submit_again(plan: JobPlan, profile: ClusterProfile, run_dir: RunDir) -> list[SubmittedJob]:
    """What is left of a run, in Slurm's queue; the new jobs. Raises UserError before anything is there."""
    check_submission(plan, profile)
    plan = with_image(plan, profile)
    jobs = jobs_of(plan, profile, run_dir)
    check_accepted(jobs, run_dir)  # before the folder is changed
    run_dir.stop_switch.unlink(missing_ok=True)
    run_dir.write_plan(plan)
    write_texts(jobs, profile, run_dir)
    return submit(jobs, run_dir)


def prepare(plan: JobPlan, profile: ClusterProfile) -> RunDir:
    """A new run folder with code, recipe, plan, profile and the text of every job; nothing is submitted.

    Raises UserError if it cannot be written.
    """
    if profile.group is not None:
        _check_group(profile.group)
    with _masked(profile.umask):
        run_dir = create_run_dir(plan)
        take_snapshot(run_dir)
        write_texts(jobs_of(plan, profile, run_dir), profile, run_dir)
    if profile.group is not None:
        _give_to_group(run_dir, profile.group)
    return run_dir


def write_texts(jobs: tuple[JobRequest, ...], profile: ClusterProfile, run_dir: RunDir) -> None:
    """The profile, and the text of every job, into the run folder."""
    run_dir.slurm.mkdir(exist_ok=True)
    write_json(run_dir.cluster, profile.model_dump(mode="json"))
    for old in run_dir.slurm.glob("*.sbatch"):
        old.unlink()
    for before, job in zip((None, *jobs), jobs, strict=False):
        after = None if before is None else f"<the {before.stage} job>"
        run_dir.sbatch(job.stage).write_text(_executor(job, run_dir, after=after).text(array_tasks=job.array_tasks))


def submit(jobs: tuple[JobRequest, ...], run_dir: RunDir) -> list[SubmittedJob]:
    """Hand jobs to Slurm, each to start when the one before has ended well; cancelled if it has not.

    Raises UserError if Slurm would not take one, RunError if it does not take all: then those it took are cancelled.
    """
    check_accepted(jobs, run_dir)
    submitted: list[SubmittedJob] = []
    try:
        for job in jobs:
            executor = _executor(job, run_dir, after=submitted[-1].id if submitted else None)
            with _only_what_jobs_get():
                submitted.append(SubmittedJob(job.stage, _handed(executor, job, run_dir), time.time()))
    except Exception as error:
        if submitted:
            ask("scancel", *(job.id for job in submitted))
        raise RunError(f"{run_dir.path}: Slurm refused a job: {error}") from error
    write_json(run_dir.jobs, {"jobs": [asdict(job) for job in (*read_jobs(run_dir), *submitted)]})
    return submitted


def _handed(executor: _Executor, job: JobRequest, run_dir: RunDir) -> str:
    """The id of a job that is in the queue now; of an array, that of the whole."""
    if job.array_tasks == 1:
        return str(executor.submit(run_task, str(run_dir.plan), job.stage).job_id)
    count = job.array_tasks
    tasks = [f"{number}/{count}" for number in range(count)]
    handed = executor.map_array(run_task, [str(run_dir.plan)] * count, [job.stage] * count, tasks)
    return str(handed[0].job_id).partition("_")[0]


def read_jobs(run_dir: RunDir) -> list[SubmittedJob]:
    """The jobs of a run, oldest first; none if it was never submitted."""
    try:
        raw = json.loads(run_dir.jobs.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    return [SubmittedJob(**job) for job in raw["jobs"]]


def _executor(job: JobRequest, run_dir: RunDir, *, after: str | None) -> _Executor:
    executor = _Executor(folder=run_dir.slurm, python=job.python)
    options = dict(job.options)
    if after is not None:
        # Without the second, a job whose predecessor failed stays in the queue for ever.
        options |= {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
    executor.update_parameters(
        job_name=job.name,
        nodes=job.nodes,
        ntasks_per_node=job.tasks_per_node,
        cpus_per_task=job.cpus_per_task,
        time=job.time_minutes,
        setup=list(job.setup),
        teardown=list(job.teardown),
        signal_delay_s=job.signal_seconds,
        # Since 22.05 srun forgets sbatch's cpus-per-task; and a rank that fails must not leave the others waiting.
        srun_args=[f"--cpus-per-task={job.cpus_per_task}", "--kill-on-bad-exit=1"],
        additional_parameters=options,
        wckey=None,
    )
    return executor


def check_accepted(jobs: tuple[JobRequest, ...], run_dir: RunDir) -> None:
    """Raises UserError with Slurm's own words if it would not take a job as it is asked for."""
    check_limits(jobs)
    for job in jobs:
        text = _executor(job, run_dir, after=None).text(array_tasks=job.array_tasks)
        done = ask("sbatch", "--test-only", text=text, environment=submitting_environment())
        if done.returncode:
            said = " ".join(line.removeprefix("sbatch: ") for line in done.stderr.strip().splitlines())
            raise UserError(
                f"{job.stage} job: {said}; correct the section `{section_of(job)}:` of the cluster's profile"
            )


def _check_group(group: str) -> None:
    try:
        known = grp.getgrnam(group).gr_gid
    except KeyError:
        known = None
    if known is None or (os.geteuid() != 0 and known not in os.getgroups()):
        raise UserError(f"group = {group}: not a group that you are a member of; name one, or leave it out")


def _give_to_group(run_dir: RunDir, group: str) -> None:
    """The folders keep the group for what is written into them later."""
    for folder, _, files in os.walk(run_dir.path):
        shutil.chown(folder, group=group)
        Path(folder).chmod(Path(folder).stat().st_mode | stat.S_ISGID)
        for name in files:
            shutil.chown(Path(folder) / name, group=group)


@contextmanager
def _only_what_jobs_get() -> Iterator[None]:
    """submitit calls sbatch in this process's environment, for arrays from an executor of its own."""
    before, less = dict(os.environ), submitting_environment()
    try:
        os.environ.clear()
        os.environ.update(less)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _masked(umask: str | None) -> Iterator[None]:
    """Files made inside get the profile's umask."""
    if umask is None:
        yield
        return
    before = os.umask(int(umask, 8))
    try:
        yield
    finally:
        os.umask(before)
