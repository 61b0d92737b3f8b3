"""The throw-away cluster itself: what it offers, that it leaves nothing behind, and that anyone can have one."""

import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from slurm import local_cluster
from slurm.local_cluster import ClusterError, LocalCluster

SCRIPT = Path(local_cluster.__file__)
ANYONE = "nobody"

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def folder():
    """Short, for the sockets in it, and open to every user."""
    with tempfile.TemporaryDirectory(prefix="alst-") as name:
        Path(name).chmod(0o777)
        yield Path(name)


def processes_naming(text: str) -> list[str]:
    """Command lines, or environments, of living processes that name a folder."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            said = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
        except OSError:
            continue
        if text.encode() in said and folder.name != str(os.getpid()):
            found.append(said.replace(b"\0", b" ").decode(errors="replace")[:200])
    return found


def test_eight_tasks_on_four_nodes_see_their_own_gpus(cluster):
    said = cluster.ask(
        "srun", "-N4", "--ntasks-per-node=2", "--gpus-per-node=2", "bash", "-c",
        'echo "$SLURMD_NODENAME $SLURM_PROCID $SLURM_LOCALID $CUDA_VISIBLE_DEVICES"',
    )  # fmt: skip
    expected = [f"{node} {2 * k + i} {i} 0,1" for k, node in enumerate(cluster.node_names) for i in (0, 1)]
    assert sorted(said.splitlines()) == expected


def test_what_ran_is_accounted_for(cluster):
    job = cluster.ask("sbatch", "--parsable", "--wrap", "exit 3", "-o", "/dev/null").strip()
    deadline = time.monotonic() + 60
    while "FAILED" not in (row := cluster.ask("sacct", "-X", "-n", "-P", "-j", job, "-o", "State,ExitCode")):
        assert time.monotonic() < deadline, row
        time.sleep(0.2)
    assert row.strip() == "FAILED|3:0"


def test_a_job_that_runs_when_the_cluster_goes_is_gone_with_it(programs, folder):
    cluster = LocalCluster(folder / "c")
    cluster.up()
    try:
        cluster.ask("sbatch", "-N4", "-o", "/dev/null", "--wrap", "trap '' TERM; srun sleep 1000")
        deadline = time.monotonic() + 60
        while len(cluster.job_processes()) < 5:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        cluster.down()
    assert processes_naming(str(cluster.folder)) == []


def test_a_cluster_that_cannot_start_says_why_and_leaves_nothing(programs, folder, monkeypatch):
    monkeypatch.setattr(local_cluster, "_NODE", "NodeName={name} Nonsense={port}{cpus}{gpus}")
    cluster = LocalCluster(folder / "c")
    with pytest.raises(ClusterError, match="Nonsense"):
        cluster.up()
    assert processes_naming(str(cluster.folder)) == []


def test_a_folder_that_holds_no_cluster_is_not_removed(folder, capsys):
    (folder / "precious").touch()
    assert local_cluster.main(["down", str(folder)]) == 2
    assert "holds no cluster" in capsys.readouterr().err
    assert (folder / "precious").exists()


@pytest.mark.parametrize(("ci", "code", "told"), [("true", 1, "error"), ("", 0, "skipped")])
def test_where_slurm_is_missing_its_tests_are_skipped_and_fail_under_ci(tmp_path, ci, code, told):
    name = "test_what_ran_is_accounted_for"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", f"{__file__}::{name}", "-rs", "-p", "no:cacheprovider"],
        env=os.environ | {"PATH": str(tmp_path), "CI": ci}, cwd=SCRIPT.parents[1],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout
    assert f"1 {told}" in done.stdout
    assert "sbatch" in done.stdout and "not on this machine; run `make cluster-up` as root once" in done.stdout


@pytest.mark.parametrize(("ci", "code"), [("true", 2), ("", 0)])
def test_packages_that_cannot_be_installed_are_told_loudly_and_fail_under_ci(tmp_path, ci, code):
    done = subprocess.run(
        [shutil.which("make"), "test-packages", f"PYTHON={sys.executable}"],
        env={"PATH": str(tmp_path), "CI": ci}, cwd=SCRIPT.parents[1],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    assert "run: sudo apt-get install" in done.stderr
    assert ("tests/cluster will be SKIPPED" in done.stdout) is (ci != "true")


def test_an_ordinary_user_can_have_one(programs, folder):
    if os.geteuid() != 0:
        pytest.skip("only root can become another user; as an ordinary user every test here shows it")
    script = shutil.copy(SCRIPT, folder / SCRIPT.name)
    home, user = folder / "c", pwd.getpwnam(ANYONE)

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["/usr/bin/env", "-C", str(folder), "python3", "-I", str(script), *arguments, str(home)],
            user=user.pw_uid, group=user.pw_gid, extra_groups=[], env={"PATH": os.defpath},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    started = call("up")
    try:
        assert started.returncode == 0, started.stderr
        pids = [daemon["pid"] for daemon in json.loads((home / "daemons.json").read_text())]
        assert {Path(f"/proc/{pid}").stat().st_uid for pid in pids} == {user.pw_uid}
        ran = subprocess.run(
            ["srun", "-N4", "id", "-un"], user=user.pw_uid, group=user.pw_gid, extra_groups=[], cwd=folder,
            env=LocalCluster(home).environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert ran.stdout.split() == [ANYONE] * 4, ran.stderr
    finally:
        ended = call("down")
    assert ended.returncode == 0, ended.stderr
    assert not home.exists()
    assert processes_naming(str(home)) == []
