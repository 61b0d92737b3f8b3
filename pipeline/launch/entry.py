"""What a process of a job runs: one stage of a plan. The same for a local rank and for a task of a job."""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal, NoReturn

from pipeline.errors import AlstError, RunError, UserError
from pipeline.launch import deadline, stop
from pipeline.launch.node_gate import unfitness
from pipeline.launch.resume import is_done
from pipeline.plan.hardware import GB
from pipeline.plan.image import check_same
from pipeline.plan.job import JobPlan, read_plan
from pipeline.plan.queue import Queue
from pipeline.plan.run_dir import RunDir

Stage = Literal["pack", "tokenize", "plan", "write", "finish", "train", "check"]

LOGS = "ALST_LOGS"
"""Where a task of a job finds the folder of its start's logs."""

VERIFY_IMAGE = "ALST_VERIFY_IMAGE"
"""Set in a job that is to read its whole image before it starts."""

LEAST_RATE = "ALST_LEAST_BUS_GIGABYTES_PER_SECOND"
"""Set in a train job whose profile says how fast its ranks have to reach each other."""

SLURM_RANK = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}
"""torch's names of a rank's place, and Slurm's."""


def run_task(plan_path: str, stage: Stage, task: str = "0/1") -> None:
    """What a task of a submitted job runs: the stage, with its own log in the run folder, under Slurm's signals."""
    # submitit bypasses SIGTERM, and at USR2 rank 0 alone would save, somewhere in a step.
    if stage == "train":
        stop.listen()
    else:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    take_rank_from_slurm()
    _write_log(RunDir(Path(plan_path).parent), stage)
    code = 0
    try:
        read_secrets()
        if stage == "train" and not _starts(Path(plan_path)):
            return
        run_stage(Path(plan_path), stage, task=task)
    except Exception as error:
        code = _told(error)
    sys.exit(code)


def _starts(plan_path: Path) -> bool:
    """Whether there is anything to train. On a node that is not fit for it, this process leaves."""
    plan, run_dir = read_plan(plan_path), RunDir(plan_path.resolve().parent)
    if is_done(plan, run_dir):
        print(f"all {plan.recipe.train.steps} steps are done", flush=True)
        return False
    if os.environ["SLURM_LOCALID"] == "0" and (why := unfitness(plan)) is not None:
        node = os.environ["SLURMD_NODENAME"]
        run_dir.exclude(node, why)
        _leave(run_dir, f"node {node} is not fit: {why}", True)
    return True


def run_stage(plan_path: Path, stage: Stage, *, task: str = "0/1") -> None:
    """Run one stage here, or task I of N of it. Raises AlstError when it fails."""
    plan, run_dir = read_plan(plan_path), RunDir(plan_path.resolve().parent)
    _check_image(plan)
    match stage:
        case "train":
            take_rank_from_slurm()
            from pipeline.train.main import run

            _as_rank(partial(_train, run), plan, run_dir)
        case "check":
            take_rank_from_slurm()
            from pipeline.train.cluster_check import check_cluster

            _as_rank(check_cluster, plan, run_dir)
        case _:
            run_pack(plan, run_dir.packed(plan), stage="all" if stage == "pack" else stage, task=task)


def _check_image(plan: JobPlan) -> None:
    """Raises UserError in a container that is not of the image the plan names; every byte is read if asked for."""
    path = os.environ.get("APPTAINER_CONTAINER")
    if path is not None and plan.image is not None:
        first_on_node = os.environ.get("SLURM_LOCALID", "0") == "0"
        check_same(plan.image, Path(path), verify=VERIFY_IMAGE in os.environ and first_on_node)


def run_pack(plan: JobPlan, output: Path, *, stage: str = "all", task: str = "0/1") -> bool:
    """Run a stage of packing, or task I of N of it; whether the data set is complete. Raises AlstError if it fails."""
    from pipeline.data.console import console_progress
    from pipeline.data.pack import pack, task_of

    with console_progress() as progress:
        manifest = pack(
            plan.recipe,
            output,
            stage=stage,
            task=task_of(task),
            vocab_size=plan.model.vocab_size,
            progress=progress,
        )
    return manifest is not None


def _train(run: Callable[..., bool], plan: JobPlan, run_dir: RunDir) -> None:
    """Train until the end, or until Slurm is to start the job again."""
    queue = Queue(
        asked_to_requeue=stop.asked,
        seconds_left=deadline.seconds_left,
        terminated=lambda: stop.terminated_at() is not None,
        least_bus_bytes_per_second=float(os.environ[LEAST_RATE]) * GB if LEAST_RATE in os.environ else None,
        leave=partial(_leave, run_dir),
    )
    again = run(plan, run_dir, queue)
    if again and os.environ["RANK"] == "0":
        stop.leave_mark(run_dir, stop.reason())


def _leave(run_dir: RunDir, why: str, again: bool) -> NoReturn:
    """End this process, whatever its threads do; `again`: its job is to be started again."""
    terminated = stop.terminated_at() is not None
    try:  # the mark first: a full disk may take it, and no more words
        if again or terminated:
            with suppress(OSError):
                stop.leave_mark(run_dir, stop.PREEMPTED if terminated else why)
        if not terminated:
            with suppress(OSError):
                _tell(why)
        print(f"alst: {why}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    finally:  # a process that stays holds all others
        os._exit(stop.LEFT if again else RunError.exit_code)


def _as_rank(work: Callable[[JobPlan, RunDir], None], plan: JobPlan, run_dir: RunDir) -> NoReturn:
    """Work of all ranks. The process ends here: gloo and DeepSpeed abort in about one orderly exit of eight."""
    code = 0
    try:
        work(plan, run_dir)
    except BaseException as error:
        code = _told(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _told(error: BaseException) -> int:
    """Tell the error in this rank's log, and in a job among its start's failures; the exit code that goes with it."""
    if isinstance(error, AlstError):
        text, code = str(error), error.exit_code
        print(f"alst: {text}", file=sys.stderr)
    else:
        text, code = "".join(traceback.format_exception_only(error)).strip(), 1
        traceback.print_exception(error)
    _tell(text)
    return code


def _tell(failure: str) -> None:
    """In a job: among its start's failures."""
    if logs := os.environ.get(LOGS):
        row = {"time": time.time(), "rank": _number(), "error": failure}
        with (Path(logs) / "failures.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def take_rank_from_slurm() -> None:
    """A task that srun started knows its place from Slurm; whoever started it otherwise has said so already."""
    if "RANK" not in os.environ and "SLURM_PROCID" in os.environ:
        os.environ.update({name: os.environ[slurm] for name, slurm in SLURM_RANK.items()})


def read_secrets() -> None:
    """The variables of the file that $ALST_SECRETS names, into this process alone. Raises UserError as `secrets_in`."""
    if name := os.environ.get("ALST_SECRETS"):
        os.environ.update(secrets_in(Path(name).expanduser()))


def secrets_in(path: Path) -> dict[str, str]:
    """The variables of a secrets file. Raises UserError if others could read it, or if a line is no NAME=value."""
    check_secrets(path)
    secrets = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip() and not line.startswith("#"):
            key, equals, value = line.partition("=")
            if not equals or not key.isidentifier():
                raise UserError(f"{path}: line {number} is not NAME=value; correct it")
            secrets[key] = value
    return secrets


def check_secrets(path: Path) -> None:
    """Raises UserError unless the file is there, is this user's, and no one else can read it."""
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"secrets = {path}: {error.strerror}; write NAME=value lines there, mode 0600") from None
    if stat.st_uid != os.getuid() or stat.st_mode & 0o077:
        raise UserError(f"secrets = {path}: mode {stat.st_mode & 0o777:04o}, others may read it; run: chmod 600 {path}")


def _number() -> int:
    """Of this task in its log's name: the rank, or the place in an array, whose jobs are one task each."""
    return int(os.environ.get("SLURM_ARRAY_TASK_ID") or os.environ["RANK"])


def _write_log(run_dir: RunDir, stage: Stage) -> None:
    """From here on, what this process and its children print goes to the rank's own log."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ["SLURM_JOB_ID"]
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    folder = run_dir.logs(job=f"{stage}-{job}", restart=restart)
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os.environ[LOGS] = str(folder)
    with (folder / f"rank{_number()}.log").open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
