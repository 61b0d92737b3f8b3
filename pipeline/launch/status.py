"""`alst status`: a run as a person reads it, what went wrong first."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from pipeline.launch.watch import FAILED, JobState, first_failure, job_states, newest_logs, steps_done
from pipeline.plan.job import read_plan
from pipeline.plan.run_dir import RunDir
from pipeline.plan.seen import seen_lines


def status_lines(run_dir: RunDir) -> Iterator[str]:
    """Failures, then the jobs, then how far training is; when all have ended, what its steps took."""
    states = job_states(run_dir)
    for state in states:
        if state.state in FAILED:
            yield from _failure_lines(state, run_dir)
    for state in states:
        yield _job_line(state)
    rows = steps_done(run_dir)
    if not rows:
        return
    plan = read_plan(run_dir.plan)
    yield _step_line(rows[-1], plan.recipe.train.steps, states)
    if not any(state.is_queued for state in states):
        yield from seen_lines(rows, plan, run_dir.packed(plan))


def _failure_lines(state: JobState, run_dir: RunDir) -> Iterator[str]:
    failure = first_failure(run_dir, state.job)
    if failure is not None:
        yield f"{state.job.stage} failed: {failure.text}"
        yield f"  in {failure.source}"
    elif newest_logs(run_dir, state.job) is None:
        yield f"{state.job.stage} failed without a word in {run_dir.slurm}"
        yield "  without the job's .err there, the nodes do not see that folder: set ALST_RUNS to one that they share,"
        yield "  and try it with `alst cluster check`"


def _job_line(state: JobState) -> str:
    detail = f" ({state.detail})" if state.detail else ""
    again = f", restarted {state.restarts} x" if state.restarts else ""
    if state.requeued_for:
        again += f", last because: {state.requeued_for}"
    return f"{state.job.stage:<6} job {state.job.id}: {state.state}{detail}{again}"


def _step_line(row: dict[str, Any], steps: int, states: list[JobState]) -> str:
    loss = "not finite" if row["loss"] is None else f"{row['loss']:.3f}"
    done = f"step   {row['step']}/{steps}  loss {loss}  {row['tokens_per_second']:,.0f} tokens/s"
    left = next((state.seconds_left for state in reversed(states) if state.seconds_left is not None), None)
    if left is None:
        return done
    needed = round((steps - row["step"]) * row["step_seconds"])
    fits = "" if needed <= left else ": it will not end in this job, and goes on in another start"
    return f"{done}  ETA {timedelta(seconds=needed)} of {timedelta(seconds=left)} left{fits}"
