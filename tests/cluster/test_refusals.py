"""What would fail on the cluster is said before it is in the queue; and a cluster is tried before it is used."""

import re

import pytest

from tests.cluster.user import WAIT_SECONDS

pytestmark = pytest.mark.timeout(4 * WAIT_SECONDS)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train": {"partition": "gpus"}}, ["train.partition = gpus", "use one of cpu, gpu"]),
        ({"train": {"cpus_per_task": 99}}, ["train job", "not available", "`train:`"]),
        ({"pack": {"mem": "900T"}}, ["tokenize job", "`pack:`"]),
        ({"shared": ["/nowhere"]}, ["not shared with the nodes", "ALST_RUNS", "/nowhere"]),
        ({"container": {"image": "/no/alst.sif"}}, ["container.image = /no/alst.sif", "No such file", "make image"]),
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


def test_a_check_of_a_cluster_where_python_does_not_start_says_where_to_look(user, profile):
    printed = user.alst("cluster", "check", profile(setup=["exit 9"]), "--nodes", "1", code=1)
    assert re.search(r"job \d+: FAILED: exit code 9 .*; see .*/slurm", printed)
    assert "Traceback" not in printed
