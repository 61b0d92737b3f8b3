"""How long a preempted job has, where the QOS decides who has to go: on a cluster of its own that preempts so."""

import getpass
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.launch.jobs import JOB_SHELL
from slurm.local_cluster import GRACE_SECONDS, LocalCluster
from tests.cluster.user import ROOT, WAIT_SECONDS

GRACE_OF_QOS = 12
JOB = """#!/bin/bash
mkdir -p {folder}/slurm
source {shell}
before_tasks {folder} 3
echo "$ALST_GRACE_SECONDS" > {folder}/told
srun bash -c 'trap "[ -e {folder}/asked ] || date +%s > {folder}/asked" TERM
    while :; do date +%s > {folder}/alive; sleep 0.2; done'
"""

pytestmark = pytest.mark.timeout(2 * WAIT_SECONDS)


@pytest.fixture
def by_qos(programs) -> Iterator[LocalCluster]:
    """With a QOS `low`, which `high` preempts."""
    with tempfile.TemporaryDirectory(prefix="alst-") as folder:
        cluster = LocalCluster(Path(folder) / "c", preempts="qos")
        cluster.up()
        try:
            cluster.ask("sacctmgr", "-i", "add", "qos", "low", "set", f"GraceTime={GRACE_OF_QOS}")
            cluster.ask("sacctmgr", "-i", "add", "qos", "high", "set", "Preempt=low")
            cluster.ask("sacctmgr", "-i", "modify", "user", getpass.getuser(), "set", "QOS+=low,high")
            yield cluster
        finally:
            cluster.down()


def test_a_job_is_told_the_grace_that_its_qos_gives_and_slurm_keeps_to_it(by_qos, tmp_path):
    def wait(name: str) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not (tmp_path / name).exists() or not (tmp_path / name).read_text().strip():
            assert time.monotonic() < deadline, f"{name}: {by_qos.ask('squeue')}"
            time.sleep(0.1)

    script = tmp_path / "job.sh"
    script.write_text(JOB.format(folder=tmp_path, shell=ROOT / JOB_SHELL))
    everything = ["sbatch", "--nodes=4", "--exclusive", "--output=/dev/null"]
    by_qos.ask(*everything, "--qos=low", "--no-requeue", str(script))
    wait("alive")
    assert (tmp_path / "told").read_text() == f"{GRACE_OF_QOS}\n"
    by_qos.ask(*everything, "--qos=high", "--wait", "--wrap=srun true", timeout_seconds=WAIT_SECONDS)
    lived = int((tmp_path / "alive").read_text()) - int((tmp_path / "asked").read_text())
    assert GRACE_OF_QOS - 2 <= lived < GRACE_SECONDS, "not the partition's, which is longer"
