"""What a run in the queue does when it is asked to, and what it does not begin."""

import json
import re

import pytest

from tests.cluster.drills import log_of, train_job
from tests.cluster.user import WAIT_SECONDS, jobs, losses

pytestmark = pytest.mark.timeout(4 * WAIT_SECONDS)


def test_tasks_that_could_not_be_launched_are_launched_again(user, tmp_path, bare):
    """A node's slurmd is gone when srun wants to start the tasks of packing, and back soon after."""
    gate, there = tmp_path / "gate", tmp_path / "there"
    wait = f"touch {there}; until [ -e {gate} ]; do sleep 0.1; done"
    run = bare.submit("data.seed=7", pack={"tasks": 1}, setup=[wait])
    user.wait(there.exists, run)
    node = user.cluster.ask("squeue", "-h", "-j", jobs(run)["pack"], "-o", "%N").strip()
    with user.cluster.without(node):
        gate.touch()
        user.wait((run / "slurm" / "requeues").exists, run)
    user.wait(lambda: user.state(jobs(run)["pack"]) == "COMPLETED", run)
    assert "its tasks could not be launched" in (run / "slurm" / "requeues").read_text()
    bare.alst("cancel", run.name)
    user.wait_for_end(run)


@pytest.mark.full
def test_switch_files_save_and_stop_a_run_until_it_is_resumed(user, bare, two_ranks):
    run = bare.begun("checkpoint.every_steps=null")
    bare.alst("save", run.name)
    user.wait(lambda: not (run / "save").exists() and list((run / "checkpoints").glob("step-*")), run)
    bare.alst("stop", run.name)
    bare.ends_well(run)
    assert len(losses(run)) < len(two_ranks), "it had ended before it was asked"
    assert "resume` goes on" in log_of(run, start=0)
    assert not (run / "slurm" / "requeues").exists()
    bare.alst("resume", run.name)
    bare.ends_well(run)
    assert losses(run) == two_ranks


@pytest.mark.full
def test_in_a_chain_the_next_job_goes_on_where_the_signal_ended_the_last(user, bare, two_ranks):
    run = bare.begun("checkpoint.every_steps=null", "--chain", "3")
    first, second, third = [job["id"] for job in json.loads((run / "slurm" / "jobs.json").read_text())["jobs"]]
    user.cluster.ask("scancel", "--signal=USR2", first)
    user.wait_for_end(run)
    assert [user.state(job) for job in (first, second, third)] == ["COMPLETED"] * 3
    assert "resumed from step-00000" in (run / "logs" / f"train-{second}" / "0" / "rank0.log").read_text()
    assert "all 8 steps are done" in (run / "logs" / f"train-{third}" / "0" / "rank0.log").read_text()
    assert not (run / "slurm" / "requeues").exists()
    assert losses(run) == two_ranks


@pytest.mark.full
def test_ranks_that_reach_each_other_too_slowly_do_not_begin(user, bare):
    run = bare.submit(train={"least_bus_gigabytes_per_second": 1e6})
    user.wait_for_end(run)
    assert user.state(train_job(run)) == "FAILED"
    status = bare.alst("status", run.name)
    assert re.search(r"the bus bandwidth of an all-reduce is \d+\.\d\d GB/s, and train\.least_bus_gig", status), status
    assert losses(run) == []
