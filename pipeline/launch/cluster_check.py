"""`alst cluster check`: a short job of the train job's shape, and what it found out about the cluster."""

import json
import shlex
import time
from collections.abc import Iterator

from pipeline.errors import RunError
from pipeline.launch.container import with_image
from pipeline.launch.jobs import train_job
from pipeline.launch.refusals import check_submission
from pipeline.launch.snapshot import take_snapshot
from pipeline.launch.submit import submit, write_texts
from pipeline.launch.watch import FAILED, cancel, first_failure, job_states
from pipeline.plan.cluster import ClusterProfile
from pipeline.plan.job import JobPlan
from pipeline.plan.run_dir import RunDir, create_run_dir

POLL_SECONDS = 1
SHARED_SECONDS = 60  # NFS shows another host's file after its attribute cache has run out


def check_lines(plan: JobPlan, profile: ClusterProfile) -> Iterator[str]:
    """What was found, as it becomes known. Raises UserError or RunError at the first thing that is not in order."""
    check_submission(plan, profile)
    plan = with_image(plan, profile)
    yield "Slurm answers, the partitions are there"
    run_dir = create_run_dir(plan)
    take_snapshot(run_dir)
    jobs = (train_job(plan, profile, run_dir, stage="check"),)
    write_texts(jobs, profile, run_dir)
    (job,) = submit(jobs, run_dir)
    yield f"job {job.id} on {plan.nodes} nodes: {shlex.quote(str(run_dir.path))}"
    _wait(run_dir)
    yield from _found(run_dir, plan)


def _wait(run_dir: RunDir) -> None:
    """Until the job has ended; whoever does not want to wait takes it along."""
    try:
        while job_states(run_dir)[-1].is_queued:
            time.sleep(POLL_SECONDS)
    except BaseException:
        cancel(run_dir)
        raise


def _found(run_dir: RunDir, plan: JobPlan) -> Iterator[str]:
    deadline = time.monotonic() + SHARED_SECONDS
    while not run_dir.cluster_check.exists():
        state = job_states(run_dir)[-1]
        if state.state in FAILED:
            failure = first_failure(run_dir, state.job)
            told = f"{failure.text}; see {failure.source}" if failure else f"{state.detail}; see {run_dir.slurm}"
            raise RunError(f"job {state.job.id}: {state.state}: {told}")
        if time.monotonic() > deadline:
            raise RunError(
                f"job {state.job.id}: {state.state} ({state.detail}), and left nothing in {run_dir.path}; either that "
                f"folder is not shared with the nodes, or the tasks did not start: see {run_dir.slurm}"
            )
        time.sleep(POLL_SECONDS)
    found = json.loads(run_dir.cluster_check.read_text(encoding="utf-8"))
    yield f"the folder of runs is shared; {len(found['ranks'])} ranks started on {len(set(found['nodes']))} nodes"
    yield f"each sees: {', '.join(sorted(set(found['devices'])))}"
    yield (
        f"all-reduce of {found['bytes'] / 2**20:.0f} MiB over {found['backend']}: {found['seconds'] * 1e3:.1f} ms, "
        f"bus bandwidth {found['bus_bytes_per_second'] / 1e9:.2f} GB/s"
    )
