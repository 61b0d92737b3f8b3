"""What a plan asks of Slurm, job by job: options, the lines before its tasks start, and the Python that runs them.

Pure: nothing is asked of a cluster here, so that a dry run needs none.
"""

import shlex
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from pipeline.launch.container import lines as container_lines
from pipeline.launch.container import python_line
from pipeline.launch.container import variables as container_variables
from pipeline.launch.entry import LEAST_RATE, Stage
from pipeline.plan.cluster import ClusterProfile, JobOptions, OptionValue, TrainOptions
from pipeline.plan.environment import Variable, environment
from pipeline.plan.estimate import estimate
from pipeline.plan.hub_cache import hub_needs
from pipeline.plan.job import JobPlan
from pipeline.plan.run_dir import RunDir

MOST_SIGNAL_SECONDS = 65535  # that sbatch takes
JOB_SHELL = "pipeline/launch/job.sh"
CHECK_MINUTES = 10  # short jobs start sooner; most of it is the import of torch from a cold disk

RENDEZVOUS = (
    "# The batch script runs on the first node: rank 0 will listen there, where Slurm itself reaches it.",
    'export MASTER_ADDR="$(scontrol show node "$SLURMD_NODENAME" | sed -n \'s/.*NodeAddr=\\([^ ]*\\).*/\\1/p\')"',
    "# Below the ports that the kernel gives out; drawn, because jobs of two clusters may have one number.",
    'export MASTER_PORT="$((20000 + RANDOM % 12000))"',
    'while (exec 3<> "/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2> /dev/null; do MASTER_PORT="$((MASTER_PORT + 1))"; done',
)


@dataclass(frozen=True)
class JobRequest:
    """One job, as it will be asked for. A job waits for all jobs before it in the run's list."""

    stage: Stage
    name: str
    nodes: int
    tasks_per_node: int
    cpus_per_task: int
    time_minutes: int
    options: dict[str, OptionValue]
    """Further options of sbatch; true for one without a value."""
    setup: tuple[str, ...]
    """Lines of shell before the tasks start."""
    python: str
    """How a task starts Python; goes to the shell as it is."""
    teardown: tuple[str, ...]
    """Lines of shell when all tasks have ended; the first finds their exit code in `$?`."""
    signal_seconds: int = 90
    """Before its time limit it is told to stop."""
    array_tasks: int = 1
    """More than one is a job array: each of its jobs does task I of N of the stage."""


def jobs_of(plan: JobPlan, profile: ClusterProfile, run_dir: RunDir, *, chain: int = 1) -> tuple[JobRequest, ...]:
    """The jobs of a run, in order; each starts when the one before it has ended well.

    A data set that is packed already is not packed again. Of a `chain` each train job leaves what it cannot do in its
    time to the next, and the last to itself.
    """
    packing = () if run_dir.is_packed(plan) else _pack_jobs(plan, profile, run_dir)
    last = train_job(plan, profile, run_dir)
    before = replace(last, setup=tuple(_followed(line) for line in last.setup))
    return (*packing, *[before] * (chain - 1), last)


def _followed(line: str) -> str:
    return f"{line} next" if line.startswith("before_tasks ") else line


def _pack_jobs(plan: JobPlan, profile: ClusterProfile, run_dir: RunDir) -> tuple[JobRequest, ...]:
    """All of packing as one job; or its stages, of which tokenize and write are arrays. The last write finishes."""
    tasks = profile.pack.tasks
    stages: dict[Stage, int] = {"pack": 1} if tasks == 1 else {"tokenize": tasks, "plan": 1, "write": tasks}
    options = _options(profile.pack, run_dir)
    jobs = {
        stage: _job(stage, plan, profile, run_dir, profile.pack, nodes=1, tasks_per_node=1, options=options, lines=())
        for stage in stages
    }
    return tuple(replace(jobs[stage], array_tasks=number) for stage, number in stages.items())


def train_job(
    plan: JobPlan, profile: ClusterProfile, run_dir: RunDir, *, stage: Literal["train", "check"] = "train"
) -> JobRequest:
    """One task per GPU. `check` is a job of the same shape that only looks at the cluster."""
    tasks, gpus = plan.recipe.hardware.gpus_per_node, profile.train.gpus
    options = _options(profile.train, run_dir)
    if gpus is not None:
        number = f"{gpus.type}:{tasks}" if gpus.type else str(tasks)
        options[gpus.option] = f"gpu:{number}" if gpus.option == "gres" else number
    job = _job(
        stage, plan, profile, run_dir, profile.train,
        nodes=plan.nodes, tasks_per_node=tasks, options=options, lines=RENDEZVOUS,
    )  # fmt: skip
    job = replace(job, signal_seconds=_signal_seconds(plan, run_dir, job))
    return job if stage == "train" else replace(job, time_minutes=min(CHECK_MINUTES, job.time_minutes))


def _signal_seconds(plan: JobPlan, run_dir: RunDir, job: JobRequest) -> int:
    """Time for the step that is under way and a save, by the plan and a third more; at most half of the job's."""
    foreseen = estimate(plan, packed=run_dir.packed(plan))
    if foreseen.seconds is None:
        return min(job.signal_seconds, 60 * job.time_minutes // 2)
    needed = ceil(4 / 3 * (foreseen.seconds.total + (foreseen.checkpoint_seconds or 0.0)))
    return max(job.signal_seconds, min(needed, 60 * job.time_minutes // 2, MOST_SIGNAL_SECONDS))


def _job(
    stage: Stage,
    plan: JobPlan,
    profile: ClusterProfile,
    run_dir: RunDir,
    asked: JobOptions,
    *,
    nodes: int,
    tasks_per_node: int,
    options: dict[str, OptionValue],
    lines: tuple[str, ...],
) -> JobRequest:
    return JobRequest(
        stage=stage,
        name=f"{run_dir.path.name}-{stage}",
        nodes=nodes,
        tasks_per_node=tasks_per_node,
        cpus_per_task=asked.cpus_per_task,
        time_minutes=asked.time_minutes,
        options=options,
        setup=(
            *_setup(profile, run_dir, asked),
            *_exports(job_environment(plan, profile, run_dir, asked)),
            *lines,
        ),
        python=python_line(plan, profile, run_dir, stage),
        teardown=('after_tasks "$?"',),
    )


def _options(asked: JobOptions, run_dir: RunDir) -> dict[str, OptionValue]:
    named = {
        "partition": asked.partition,
        "account": asked.account,
        "qos": asked.qos,
        "reservation": asked.reservation,
        "mem": asked.mem,
        "exclude": ",".join(dict.fromkeys((*asked.exclude, *run_dir.excluded_nodes()))) or None,
    }
    options: dict[str, OptionValue] = {name: value for name, value in named.items() if value is not None}
    options["requeue"] = True  # a node that fails costs the steps since the last checkpoint, and no person's time
    options["export"] = "ALL"  # of the few variables that `submitting_environment` leaves
    return options | {name.replace("_", "-"): value for name, value in asked.extra.items() if value is not False}


def job_environment(plan: JobPlan, profile: ClusterProfile, run_dir: RunDir, asked: JobOptions) -> tuple[Variable, ...]:
    """The environment table of a job: what every rank gets anywhere, then where its code lies, then the cluster's."""
    table = [
        *environment(plan, cpus_per_rank=asked.cpus_per_task),
        Variable("PYTHONPATH", str(run_dir.code), "a job runs the code as it was when it was submitted"),
        Variable("PYTHONSAFEPATH", "1", "not what lies in the folder it was submitted from"),
        Variable("HF_HUB_OFFLINE", "1", "compute nodes have no internet, and a thousand ranks must not ask the hub"),
        Variable("SLURM_EXPORT_ENV", "ALL", "srun would pass on only what sbatch was asked to"),
        *profile.variables(),
    ]
    if hub_needs(plan.recipe):
        cache = str(profile.hub_cache())
        table.append(Variable("HF_HUB_CACHE", cache, "where `alst stage` put model, tokenizer and data"))
    if isinstance(asked, TrainOptions) and (least := asked.least_bus_gigabytes_per_second) is not None:
        table.append(Variable(LEAST_RATE, str(least), "a slow link would cost every step; better not to begin"))
    if profile.secrets is not None:
        table.append(Variable("ALST_SECRETS", profile.secrets, "each task reads this file itself"))
    table += container_variables(profile, tuple(table))
    return tuple({variable.name: variable for variable in table}.values())


def _setup(profile: ClusterProfile, run_dir: RunDir, asked: JobOptions) -> list[str]:
    lines = [f"umask {profile.umask}"] if profile.umask else []
    lines.append(f"source {shlex.quote(str(run_dir.code / JOB_SHELL))}")
    lines.append(f"before_tasks {shlex.quote(str(run_dir.path))} {asked.requeues}")
    if profile.modules:
        lines.append("type module &> /dev/null || source /etc/profile  # a job's shell is no login shell")
    lines += [f"module load {shlex.quote(module)}" for module in profile.modules]
    return [*lines, *profile.setup, *container_lines(profile)]


def _exports(table: tuple[Variable, ...]) -> list[str]:
    return [f"export {variable.name}={shlex.quote(variable.value)}  # {variable.reason}" for variable in table]
