"""A preempted job where the QOS decides who has to go, and its own signal tells it: on a cluster of its own."""

import getpass
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.launch.jobs import JOB_SHELL
from slurm.local_cluster import GRACE_SECONDS, KILL_SECONDS, LocalCluster
from tests.cluster.drills import BARE, Place, both, frozen, log_of, train_job
from tests.cluster.user import ROOT, WAIT_SECONDS, User, losses

GRACE_OF_QOS = 12
JOB = """#!/bin/bash
mkdir -p {folder}/slurm
source {shell}
before_tasks {folder} 3
echo "$ALST_GRACE_SECONDS" "$ALST_KILL_SECONDS" > {folder}/told
srun bash -c 'for signal in TERM USR2; do
        trap "[ -s {folder}/$signal ] || date +%s > {folder}/$signal" "$signal"
    done
    while :; do date +%s >> {folder}/alive; sleep 0.2; done'
"""

ALL_NODES = ["sbatch", "--parsable", "--nodes=4", "--exclusive", "--output=/dev/null"]
URGENT = [*ALL_NODES, "--qos=high", "--wrap=srun true"]
SETTINGS = {"PreemptType": "preempt/qos", "SlurmctldParameters": "preempt_send_user_signal"}
"""The second: a job that asked for a signal before its time limit gets that, and SIGTERM when its grace is over."""

pytestmark = pytest.mark.timeout(2 * WAIT_SECONDS)


@pytest.fixture
def by_qos(programs) -> Iterator[LocalCluster]:
    """With two QOS that `high` preempts: `low`, and `lower` with more grace."""
    with tempfile.TemporaryDirectory(prefix="alst-") as folder:
        cluster = LocalCluster(Path(folder) / "c", settings=SETTINGS)
        cluster.up()
        try:
            cluster.ask("sacctmgr", "-i", "add", "qos", "low", "set", f"GraceTime={GRACE_OF_QOS}")
            cluster.ask("sacctmgr", "-i", "add", "qos", "lower", "set", f"GraceTime={10 * GRACE_OF_QOS}")
            cluster.ask("sacctmgr", "-i", "add", "qos", "high", "set", "Preempt=low,lower")
            cluster.ask("sacctmgr", "-i", "modify", "user", getpass.getuser(), "set", "QOS+=low,lower,high")
            yield cluster
        finally:
            cluster.down()


def preempted_job(by_qos: LocalCluster, folder: Path, *options: str) -> Callable[[str], int]:
    """A job of a task that only notes the signals it gets, from its start until it was killed for an urgent one; what
    it wrote, by name."""

    def written(name: str) -> int:
        return int((folder / name).read_text().split()[-1])

    script = folder / "job.sh"
    script.write_text(JOB.format(folder=folder, shell=ROOT / JOB_SHELL))
    by_qos.ask(*ALL_NODES, "--qos=low", "--no-requeue", *options, str(script))
    deadline = time.monotonic() + WAIT_SECONDS
    while not (folder / "alive").exists() or not (folder / "alive").read_text().strip():
        assert time.monotonic() < deadline, by_qos.ask("squeue")
        time.sleep(0.1)
    by_qos.ask(*URGENT, "--wait", timeout_seconds=WAIT_SECONDS)
    return written


def test_a_job_is_told_the_grace_that_its_qos_gives_and_slurm_keeps_to_it(by_qos, tmp_path):
    written = preempted_job(by_qos, tmp_path)
    assert (tmp_path / "told").read_text() == f"{GRACE_OF_QOS} {KILL_SECONDS}\n"
    lived = written("alive") - written("TERM")
    assert GRACE_OF_QOS - 2 <= lived < GRACE_SECONDS, "not the partition's, which is longer"


@pytest.mark.full
def test_after_a_jobs_own_signal_the_last_one_is_followed_by_the_end(by_qos, tmp_path):
    written = preempted_job(by_qos, tmp_path, "--time=20", "--signal=USR2@60")
    assert written("TERM") - written("USR2") >= GRACE_OF_QOS - 2
    assert KILL_SECONDS - 2 <= written("alive") - written("TERM") < GRACE_OF_QOS


@pytest.mark.full
def test_a_run_that_is_preempted_by_its_own_signal_saves_and_comes_back(by_qos, tmp_path, profile):
    user = User(tmp_path, by_qos)
    place = Place(BARE, user, profile)
    run = place.begun("checkpoint.every_steps=null", train={"qos": "lower"})
    with frozen(both(user)):
        urgent = by_qos.ask(*URGENT).strip()
        user.wait(lambda: "PreemptTime=2" in by_qos.ask("scontrol", "show", "job", train_job(run)), run)
    place.ends_well(run)
    assert user.state(urgent) == "COMPLETED"
    assert "asked to stop by SIGUSR2" in log_of(run, start=0)
    assert "SIGTERM" not in log_of(run, start=0), "it left within its grace"
    assert (run / "slurm" / "requeues").read_text().endswith(": preempted\n")
    assert "resumed from step-00000" in log_of(run, start=-1)
    assert losses(run) == user.train_here("hardware.gpus_per_node=2")
