"""`alst submit --rehearse`: a short run of the same jobs, nodes and image; what it took stands in its status."""

import time
from collections.abc import Iterator
from math import ceil

from pipeline.errors import RunError
from pipeline.launch.status import status_lines
from pipeline.launch.watch import JobState, job_states
from pipeline.plan.job import JobPlan
from pipeline.plan.run_dir import RunDir

STEPS = 3
SEQ_LEN = 8192
POLL_SECONDS = 2


def rehearsal_of(plan: JobPlan) -> list[str]:
    """Overrides that make the recipe of a plan its rehearsal: the same mesh, short samples, nothing kept."""
    checkpoint = plan.recipe.memory.activation_checkpoint
    kept = () if checkpoint is None else checkpoint.resolved._asdict().items()
    return [
        *(f"memory.activation_checkpoint.{name}={str(value).lower()}" for name, value in kept),
        f"name={plan.recipe.name}-rehearsal",
        f"parallel.sp={plan.sp}",
        f"data.seq_len={ceil(SEQ_LEN / plan.sp) * plan.sp}",
        f"train.steps={STEPS}",
        "checkpoint=null",
        "evaluation=null",
    ]


def wait_lines(run_dir: RunDir) -> Iterator[str]:
    """The states of a run's jobs whenever one changes, until all have ended; then how the run is.

    Raises RunError if one did not end well.
    """
    yield f"waiting for its end; Ctrl-C leaves the jobs as they are, and `alst status {run_dir.path.name}` shows them"
    told, states = "", job_states(run_dir)
    while any(state.is_queued for state in states):
        if (now := _in_short(states)) != told:
            told = now
            yield told
        time.sleep(POLL_SECONDS)
        states = job_states(run_dir)
    yield from status_lines(run_dir)
    if any(state.state != "COMPLETED" for state in states):
        raise RunError(f"{run_dir.path}: the rehearsal did not end well; the reason is above")


def _in_short(states: list[JobState]) -> str:
    return ", ".join(f"{state.job.stage} {state.state}" for state in states)
