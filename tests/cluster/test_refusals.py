"""What would fail on the cluster is said before it is in the queue; and a cluster is tried before it is used."""

import getpass
import re
from collections.abc import Iterator

import pytest

from tests.cluster.user import WAIT_SECONDS

pytestmark = pytest.mark.timeout(4 * WAIT_SECONDS)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train": {"partition": "gpus"}}, ["train.partition = gpus", "use one of cpu, gpu"]),
        ({"train": {"cpus_per_task": 99}}, ["train job", "not available", "`train:`"]),
        ({"pack": {"mem": "900T"}}, ["tokenize job", "`pack:`"]),
        ({"train": {"account": "nobodys"}}, ["train job", "Invalid account", "`train:`"]),
        ({"train": {"qos": "best"}}, ["train job", "Invalid qos", "`train:`"]),
        ({"shared": ["/nowhere"]}, ["not shared with the nodes", "ALST_RUNS", "/nowhere"]),
        ({"shared": ["/", "/nowhere"]}, ["shared = /nowhere", "no such folder here", "mount it"]),
        ({"container": {"image": "/no/alst.sif"}}, ["container.image = /no/alst.sif", "No such file", "make image"]),
        (
            {"pack": {"tasks": 1500}, "max_array_size": 2000},
            ["pack.tasks = 1500", "less than this cluster's MaxArraySize = 1001", "use 1000"],
        ),
        ({"secrets": "/no/secrets"}, ["secrets = /no/secrets", "mode 0600"]),
        ({"group": "no-such-group"}, ["group = no-such-group", "member of"]),
    ],
)
def test_what_cannot_run_is_refused_before_it_is_in_the_queue(user, profile, changes, told):
    before = {path.name for path in (user.folder / "runs").glob("job-*")}
    printed = user.alst(
        "submit", str(user.recipe), "--cluster", profile(**changes), "--nodes", "1", "data.seed=2", code=2
    )
    for words in told:
        assert words in printed
    assert "Traceback" not in printed
    assert user.cluster.ask("squeue", "-h") == ""
    assert {path.name for path in (user.folder / "runs").glob("job-*")} == before


@pytest.fixture
def limits(cluster) -> Iterator[None]:
    """A partition of ten minutes, and an account and a qos that allow two jobs; gone afterwards."""
    me = getpass.getuser()

    cluster.ask("scontrol", "update", "PartitionName=cpu", "MaxTime=10")
    cluster.ask("sacctmgr", "-i", "add", "account", "small")
    cluster.ask("sacctmgr", "-i", "add", "user", me, "account=small", "MaxSubmitJobs=2", "MaxWall=15")
    cluster.ask("sacctmgr", "-i", "add", "qos", "short", "set", "MaxWall=5", "MaxSubmitJobsPerUser=3")
    cluster.ask("sacctmgr", "-i", "modify", "user", me, "set", "QOS+=short")
    cluster.ask("sacctmgr", "-i", "add", "account", "hasty")
    cluster.ask("sacctmgr", "-i", "add", "user", me, "account=hasty", "QOS=normal,short", "DefaultQOS=short")
    try:
        yield
    finally:
        cluster.ask("scontrol", "update", "PartitionName=cpu", "MaxTime=INFINITE")
        cluster.ask("sacctmgr", "-i", "delete", "user", me, "account=small,hasty")
        cluster.ask("sacctmgr", "-i", "modify", "user", me, "set", "QOS=normal")


def test_what_would_wait_for_ever_or_be_taken_in_part_is_refused(user, profile, limits):
    """Slurm itself takes the first four, and leaves them in the queue."""
    brief = {"pack": {"time": "00:05:00"}, "train": {"time": "00:05:00"}}
    for changes, told in (
        ({}, ["pack.time is 30 minutes", "MaxTime of partition cpu is 10", "never start"]),
        (
            {"pack": brief["pack"] | {"account": "small"}, "train": {"account": "small"}},
            ["train.time is 30 minutes", "MaxWall of account small is 15"],
        ),
        ({"pack": brief["pack"], "train": {"qos": "short"}}, ["train.time is 30", "MaxWall of qos short is 5"]),
        ({"pack": brief["pack"], "train": {"account": "hasty"}}, ["train.time is 30", "MaxWall of qos short is 5"]),
        (
            {name: asked | {"account": "small"} for name, asked in brief.items()},
            ["6 jobs to submit and 0 in the queue", "MaxSubmitJobs of account small is 2", "pack.tasks"],
        ),
        (
            {name: asked | {"qos": "short"} for name, asked in brief.items()},
            ["6 jobs to submit", "MaxSubmitJobsPerUser of qos short is 3"],
        ),
    ):
        printed = user.alst(
            "submit", str(user.recipe), "--cluster", profile(**changes), "--nodes", "1", "data.seed=2", code=2
        )
        for words in told:
            assert words in printed
    assert user.cluster.ask("squeue", "-h") == ""


def test_without_a_controller_that_answers_there_is_one_message(user, tmp_path):
    (tmp_path / "slurm.conf").write_text("ClusterName=gone\nSlurmctldHost=gone(127.0.0.1)\nSlurmctldPort=1\n")
    printed = user.alst(
        "submit", str(user.recipe), "--cluster", "throw-away", code=2, SLURM_CONF=str(tmp_path / "slurm.conf")
    )
    assert "Slurm does not answer" in printed
    assert "Traceback" not in printed


def test_a_check_of_a_cluster_says_what_its_ranks_see(user):
    printed = user.alst("cluster", "check", "throw-away", "--nodes", "2")
    assert "4 ranks started on 2 nodes" in printed
    assert "each sees: cpu" in printed
    assert re.search(r"all-reduce of 4 MiB over gloo: [\d.]+ ms, bus bandwidth [\d.]+ GB/s", printed)


@pytest.mark.parametrize(
    ("setup", "told", "status"),
    [
        (
            ["echo lmod: no cuda/99 here >&2", "exit 9"],
            r"job \d+: FAILED: lmod: no cuda/99 here; see .*/slurm/\d+_0_log.err",
            "check failed: lmod: no cuda/99 here",
        ),
        (
            ["exit 9"],
            r"job \d+: FAILED: exit code 9 .*; see .*/slurm",
            "the nodes do not see that folder: set ALST_RUNS",
        ),
    ],
)
def test_a_check_where_python_does_not_start_says_what_the_job_said_last(user, profile, setup, told, status):
    printed = user.alst("cluster", "check", profile(setup=setup), "--nodes", "1", code=1)
    assert re.search(told, printed)
    assert "Traceback" not in printed
    assert status in user.alst("status", re.search(r"nodes: (\S+)", printed)[1])
