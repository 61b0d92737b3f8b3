"""Drills on the real cluster: a run is disturbed, goes on, and ends with the very losses of one left in peace."""

import os
import re
import signal
from pathlib import Path

import pytest

from tests.cluster.drills import Disturbed, frozen, started_again, train_job
from tests.cluster.user import WAIT_SECONDS, jobs, losses, told

TWO_RANKS = "hardware.gpus_per_node=1"
NODES = ("--nodes", "2")
STEPS = 3
"""After which a run is disturbed."""

pytestmark = pytest.mark.timeout(4 * WAIT_SECONDS)


@pytest.fixture
def run(user, two_ranks) -> Path:
    """Of two ranks on two nodes, some steps of it done; saved after every second one."""
    return begun(user, "checkpoint.every_steps=2")


def begun(user, *overrides: str, cluster: str = "throw-away") -> Path:
    run = user.submit(*NODES, TWO_RANKS, *overrides, cluster=cluster)
    user.wait(lambda: len(losses(run)) >= STEPS, run)
    return run


def rank(user, number: int) -> int:
    """The process of a rank of the only job there is."""
    (pid,) = user.cluster.job_processes(rank=number)
    return pid


def ends_well(user, run: Path) -> None:
    user.wait_for_end(run)
    assert user.state(train_job(run)) == "COMPLETED", told(run)


def test_a_rank_that_stands_still_is_named_and_the_job_goes_on(user, two_ranks):
    run = begun(user, "train.stall_seconds=15")
    stopped, disturbed = rank(user, 1), Disturbed(run)
    os.kill(stopped, signal.SIGSTOP)
    ends_well(user, run)
    status = user.alst("status", run.name)
    assert "restarted 1 x, last because: stalled: no rank got on for" in status
    assert re.search(rf"; rank 1 \(process {stopped} on \S+\) stands at step \d, [a-z0-9 ]+; stacks are in ", status)
    (stacks,) = (run / "stalls").iterdir()
    assert "loop.py" in (stacks / "rank0.txt").read_text(), "what it waited in"
    assert "State:\tT (stopped)" in (stacks / "rank1.txt").read_text()
    disturbed.ended("a rank stopped (SIGSTOP)", by="the watchdog", user=user, peaceful=two_ranks)


def test_a_preempted_job_saves_leaves_and_comes_back(user, run, two_ranks):
    ranks = user.cluster.job_processes(rank=0) + user.cluster.job_processes(rank=1)
    with frozen(ranks):
        disturbed = Disturbed(run)
        urgent = user.cluster.ask(
            "sbatch", "--parsable", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null",
            "--wrap=srun true",
        ).strip()  # fmt: skip
        user.wait(lambda: "PreemptTime=2" in user.cluster.ask("scontrol", "show", "job", train_job(run)), run)
    ends_well(user, run)
    assert user.state(urgent) == "COMPLETED"
    assert "asked to stop by SIGTERM" in started_again(run, 0).read_text()
    assert "resumed from step-00000" in started_again(run).read_text()
    disturbed.ended("preempted by a higher partition", by="Slurm and the batch script", user=user, peaceful=two_ranks)


def test_a_rank_that_is_killed_in_a_step_is_named_and_the_run_resumed(user, run, two_ranks):
    disturbed = Disturbed(run)
    os.kill(rank(user, 1), signal.SIGKILL)
    user.wait_for_end(run)
    status = user.alst("status", run.name)
    assert "task 1: Killed" in status.splitlines()[0], status + told(run)
    assert f"train  job {train_job(run)}: FAILED" in status
    user.alst("resume", run.name)
    ends_well(user, run)
    disturbed.ended("kill -9 of a rank in a step", by="`alst resume`", user=user, peaceful=two_ranks)


def test_tasks_that_could_not_be_launched_are_launched_again(user, tmp_path, profile):
    """A node's slurmd is gone when srun wants to start the tasks of packing, and back soon after."""
    gate, there = tmp_path / "gate", tmp_path / "there"
    wait = f"touch {there}; until [ -e {gate} ]; do sleep 0.1; done"
    run = user.submit(*NODES, TWO_RANKS, "data.seed=7", cluster=profile(pack={"tasks": 1}, setup=[wait]))
    user.wait(there.exists, run)
    node = user.cluster.ask("squeue", "-h", "-j", jobs(run)["pack"], "-o", "%N").strip()
    with user.cluster.without(node):
        gate.touch()
        user.wait((run / "slurm" / "requeues").exists, run)
    user.wait(lambda: user.state(jobs(run)["pack"]) == "COMPLETED", run)
    assert "its tasks could not be launched" in (run / "slurm" / "requeues").read_text()
    user.alst("cancel", run.name)
    user.wait_for_end(run)
