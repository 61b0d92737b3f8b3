"""Drills on the real cluster: a run is disturbed, goes on, and ends with the very losses of one left in peace."""

import os
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest

from pipeline.launch.slurm import seconds_of
from slurm.local_cluster import free_ports, search_path
from tests.cluster.conftest import mlflow_server
from tests.cluster.drills import BARE, STEPS, Disturbed, both, frozen, log_of, rank, train_job
from tests.cluster.user import ROOT, WAIT_SECONDS, jobs, losses, told
from tests.disks import small_disk_at

pytestmark = pytest.mark.timeout(4 * WAIT_SECONDS)


@pytest.fixture
def run(place, two_ranks) -> Path:
    """Of two ranks on two nodes, some steps of it done; saved after every second one."""
    return place.begun("checkpoint.every_steps=2")


def test_a_rank_that_stands_still_is_named_and_the_job_goes_on(user, place, two_ranks):
    run = place.begun("train.stall_seconds=60")
    stopped, disturbed = rank(user, 1), Disturbed(run)
    os.kill(stopped, signal.SIGSTOP)
    place.ends_well(run)
    status = place.alst("status", run.name)
    assert "restarted 1 x, last because: stalled: no rank got on for" in status
    assert re.search(rf"; rank 1 \(process {stopped} on \S+\) stands at step \d, [^;]+; stacks are in ", status)
    (stacks,) = (run / "stalls").iterdir()
    assert "loop.py" in (stacks / "rank0.txt").read_text(), "what it waited in"
    assert "State:\tT (stopped)" in (stacks / "rank1.txt").read_text()
    disturbed.ended("a rank stopped (SIGSTOP)", by="the watchdog", place=place, peaceful=two_ranks)


def test_a_preempted_job_saves_leaves_and_comes_back(user, place, run, two_ranks):
    ranks = both(user)
    with frozen(ranks):
        disturbed = Disturbed(run)
        urgent = user.cluster.ask(
            "sbatch", "--parsable", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null",
            "--wrap=srun true",
        ).strip()  # fmt: skip
        user.wait(lambda: "PreemptTime=2" in user.cluster.ask("scontrol", "show", "job", train_job(run)), run)
    place.ends_well(run)
    assert user.state(urgent) == "COMPLETED"
    assert "asked to stop by SIGTERM" in log_of(run, start=0)
    assert "resumed from step-00000" in log_of(run, start=-1)
    disturbed.ended("preempted by a higher partition", by="Slurm and the batch script", place=place, peaceful=two_ranks)


def test_a_rank_that_is_killed_in_a_step_is_named_and_the_run_resumed(user, place, run, two_ranks, tmp_path):
    ranks = both(user)
    with frozen(ranks):
        disturbed = Disturbed(run)
        os.kill(ranks[1], signal.SIGKILL)
    user.wait_for_end(run)
    status = place.alst("status", run.name)
    assert "task 1: Killed" in status.splitlines()[0], status + told(run)
    assert f"train  job {train_job(run)}: FAILED" in status
    assert "RUNNING" not in status
    (tmp_path / "squeue").symlink_to(shutil.which("squeue", path=search_path()))
    status = place.alst("status", run.name, PATH=str(tmp_path))
    assert "UNKNOWN (it has left the queue, and sacct is not on the PATH: install it; see logs/ and slurm/)" in status
    place.alst("resume", run.name)
    place.ends_well(run)
    disturbed.ended("kill -9 of a rank in a step", by="`alst resume`", place=place, peaceful=two_ranks)


def test_a_requeued_job_goes_on_to_the_very_losses_of_a_run_left_in_peace(user, place, two_ranks):
    run = place.begun()
    assert list(jobs(run)) == ["train"], "the packed data is there already"
    with frozen(both(user)):
        disturbed = Disturbed(run)
        status = user.alst("status", run.name)
        assert re.search(r"step   \d/8  loss \d.* tokens/s  ETA \d:\d\d:\d\d of 0:2\d:\d\d left\n", status)
        follower = user.start("logs", run.name, "--rank", "0", "--follow")
        user.cluster.ask("scontrol", "requeue", jobs(run)["train"])
    user.wait_for_end(run)
    assert user.state(jobs(run)["train"]) == "COMPLETED", told(run)
    followed, _ = follower.communicate(timeout=WAIT_SECONDS)
    assert follower.returncode == 0
    assert "step 1/8" in followed and "resumed from step-00000" in followed and "step 8/8" in followed
    log = run / "logs" / f"train-{jobs(run)['train']}" / "1" / "rank0.log"
    assert "resumed from step-00000" in log.read_text()
    disturbed.ended("`scontrol requeue`", by="Slurm", place=place, peaceful=two_ranks)


# Those that take longer


@pytest.mark.full
def test_a_job_that_comes_to_its_time_limit_saves_before_it_and_goes_on(user, two_ranks, place):
    run = place.begun("checkpoint.every_steps=2", train={"time": "00:05:00"})
    left = ["squeue", "-h", "-j", train_job(run), "-o", "%L"]
    with frozen(both(user)):
        disturbed = Disturbed(run)
        user.wait(lambda: (seconds_of(user.cluster.ask(*left).strip()) or 0) <= 25, run)
    place.ends_well(run)
    assert set(re.findall(r"job \d+: (.*)", (run / "slurm" / "requeues").read_text())) <= {
        "asked to stop by SIGUSR2", "the next step could not have ended before the job",
        "the step under way could not end before the job does, and is lost",
    }  # fmt: skip
    disturbed.ended("the time limit", by="the batch script", place=place, peaceful=two_ranks)


@pytest.mark.full
def test_a_node_that_fails_is_not_used_again(user, place, run, two_ranks):
    nodes = user.cluster.ask("squeue", "-h", "-j", train_job(run), "-o", "%N").strip()
    _, node = user.cluster.ask("scontrol", "show", "hostnames", nodes).split()
    with frozen(both(user)):
        disturbed = Disturbed(run)
        user.cluster.ask("scontrol", "update", f"nodename={node}", "state=down", "reason=drill")
    try:
        place.ends_well(run)
    finally:
        user.cluster.ask("scontrol", "update", f"nodename={node}", "state=resume")
    assert (run / "slurm" / "excluded").read_text().startswith(f"{node} ")
    assert "resumed from step-00000" in log_of(run, start=-1)
    disturbed.ended("a node fails", by="Slurm", place=place, peaceful=two_ranks)
    place.alst("resume", run.name, "train.steps=9")
    assert f"#SBATCH --exclude={node}\n" in (run / "slurm" / "train.sbatch").read_text()
    user.wait_for_end(run)


def killed_in_a_save(run: Path, ranks: list[int]) -> tuple[Disturbed, Path]:
    """Rank 0, which alone makes a checkpoint whole, is killed in a save; the folder of that."""
    while True:
        assert Path(f"/proc/{ranks[0]}").exists(), "it ended before it was seen to save"
        time.sleep(0.005)
        for writing in (run / "checkpoints").glob(".writing-*"):
            with frozen(ranks):
                time.sleep(0.1)  # until all threads stand
                if writing.exists():
                    disturbed = Disturbed(run)
                    os.kill(ranks[0], signal.SIGKILL)
                    return disturbed, writing


@pytest.mark.full
def test_a_rank_that_is_killed_in_a_save_costs_that_save(user, place, two_ranks):
    run = place.begun("checkpoint.every_steps=1")
    disturbed, writing = killed_in_a_save(run, both(user))
    user.wait_for_end(run)
    assert user.state(train_job(run)) == "FAILED"
    assert writing.exists(), "killed while it saved"
    place.alst("resume", run.name)
    place.ends_well(run)
    assert not writing.exists()
    disturbed.ended("kill -9 of a rank in a save", by="`alst resume`", place=place, peaceful=two_ranks)


@pytest.mark.full
def test_a_task_of_packing_that_is_killed_is_done_again_alone(user, two_ranks, place):
    seed = f"data.seed={8 if place.name == BARE else 10}"  # of data that nothing else has packed
    run = place.submit(seed, pack={"tasks": 1})
    log = run / "logs" / f"pack-{jobs(run)['pack']}" / "0" / "rank0.log"
    user.wait(log.exists, run)
    task, disturbed = rank(user, 0), Disturbed(run)
    os.kill(task, signal.SIGKILL)
    user.wait_for_end(run)
    assert "FAILED" in user.state(jobs(run)["pack"])
    assert "Killed" in place.alst("status", run.name)
    place.alst("resume", run.name)
    place.ends_well(run)
    peaceful = user.train_here("hardware.gpus_per_node=2", seed)
    assert peaceful != two_ranks
    disturbed.ended("a task of packing killed", by="`alst resume`", place=place, peaceful=peaceful)


@pytest.mark.full
def test_a_server_for_mlflow_that_dies_and_comes_back_costs_nothing(user, two_ranks, place, tmp_path):
    (port,) = free_ports(1)
    with mlflow_server(tmp_path, port) as url:
        run = place.begun("tracking.mlflow=true", tracking_uri=url)
        ranks = both(user)
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
    disturbed = Disturbed(run)
    for pid in ranks:
        os.kill(pid, signal.SIGCONT)
    user.wait(lambda: len(losses(run)) > STEPS + 1, run)
    with mlflow_server(tmp_path, port):
        place.ends_well(run)
    disturbed.ended("MLflow's server killed and restarted", by="nobody: it trains on", place=place, peaceful=two_ranks)


@pytest.fixture
def small_disk(tmp_path):
    """Room for the run and a few checkpoints."""
    with small_disk_at(tmp_path / "disk", mib=96) as folder:
        yield folder


@pytest.mark.full
def test_a_disk_that_is_full_costs_what_could_not_be_saved(user, place, two_ranks, small_disk):
    shutil.copytree(user.folder / "runs" / "packed", small_disk / "packed")
    run = place.begun("checkpoint.every_steps=1", runs=small_disk)
    ranks, ballast = both(user), small_disk / "ballast"
    with frozen(ranks):
        disturbed = Disturbed(run)
        with pytest.raises(OSError, match="No space left"), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    user.wait_for_end(run)
    assert user.state(train_job(run)) == "FAILED", "its last checkpoint is not on disk"
    ballast.unlink()
    place.alst("resume", run.name, ALST_RUNS=str(small_disk))
    place.ends_well(run)
    disturbed.ended("the run folder's disk full", by="`alst resume`", place=place, peaceful=two_ranks)


def python_of(run: Path) -> Path:
    """A program that starts Python as the run's own train job does, in the environment of its tasks."""
    text = (run / "slurm" / "train.sbatch").read_text()
    variables = re.findall(r"^export \w+=.*?  # ", text, re.MULTILINE)  # of the table, whose rows have a reason
    line = text.rsplit("srun ", 1)[1].splitlines()[0].partition(" -u -m submitit")[0]
    python = shlex.split(line)[shlex.split(line).index("--kill-on-bad-exit=1") + 1 :]
    program = run / "python"
    program.write_text("\n".join(["#!/bin/bash", *variables, f'exec {shlex.join(python)} "$@"\n']))
    program.chmod(0o755)
    return program


@pytest.mark.full
def test_a_second_job_of_the_same_run_is_refused_and_the_first_is_left_in_peace(user, place, run, two_ranks):
    ranks = both(user)
    variables = user.cluster.environment | place.variables | {"PYTHON": str(python_of(run))}
    asked = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", "--mem=100", "--gpus-per-node=1"]
    asked += ["--no-requeue", "--export=" + ",".join(f"{name}={value}" for name, value in variables.items())]
    with frozen(ranks):
        disturbed = Disturbed(run)
        said = place.alst("resume", run.name, code=2)
        assert "wait for its end, or `alst cancel" in said
        template = [str(ROOT / "slurm" / "train.sbatch"), str(run / "plan.json")]
        by_hand = ["sbatch", "--wait", *asked, "--output", str(run / "second.out"), *template]
        user.cluster.ask(*by_hand, timeout_seconds=WAIT_SECONDS)
    assert "another job trains into this run folder (process " in (run / "second.out").read_text()
    place.ends_well(run)
    disturbed.ended("two jobs of one run", by="nobody: the second is refused", place=place, peaceful=two_ranks)
