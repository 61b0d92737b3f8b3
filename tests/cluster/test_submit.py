"""`alst submit` on a real Slurm: what was asked for is what is trained, and nothing is lost or left behind."""

import sqlite3
import sys
from contextlib import closing

import pytest

from tests.cluster.user import ROOT, WAIT_SECONDS, jobs, losses, told

TWO_RANKS = "hardware.gpus_per_node=1"
CANARY = "canary-77c0ffee"
SHORT = ("train.steps=2", "checkpoint.every_steps=null")

KEPT_BY_SLURM = {
    ("sacct", "--env-vars", "-j"): "HOME=",
    ("sacct", "--batch-script", "-j"): "srun",
    ("scontrol", "show", "job", "--details"): "JobState=COMPLETED",
    ("squeue", "--states=all", "--format=%all", "--job"): "COMPLETED",
}
"""What is asked of a job that has ended, whose number comes last, and a word of the answer."""

pytestmark = pytest.mark.timeout(4 * WAIT_SECONDS)


def test_four_nodes_of_two_tasks_train_to_the_losses_of_this_machine(user, profile, tracking, tmp_path):
    """With a server for MLflow and secrets, of which no trace is left."""
    url, database = tracking
    secrets = tmp_path / "secrets"
    secrets.write_text(f"HF_TOKEN={CANARY}\n")
    secrets.chmod(0o600)
    cluster = profile(tracking_uri=url, secrets=str(secrets))
    asked = (*SHORT, "data.seed=9")  # packed by no other test
    run = user.submit("--nodes", "4", "tracking.mlflow=true", *asked, cluster=cluster, HF_TOKEN=CANARY)
    user.wait_for_end(run)
    states = [set(user.state(job).split()) for job in jobs(run).values()]
    assert states == [{"COMPLETED"}] * 4, told(run)
    assert list(jobs(run)) == ["tokenize", "plan", "write", "train"]
    assert len(user.state(jobs(run)["write"]).split()) == 2, "an array"
    for stage in ("tokenize", "write"):
        assert {log.name for log in run.glob(f"logs/{stage}-*/0/*")} == {"rank0.log", "rank1.log"}
    assert len(list(run.glob(f"logs/train-{jobs(run)['train']}/0/rank*.log"))) == 8
    with closing(sqlite3.connect(database)) as connection:
        rows = "from metrics join runs using (run_uuid) where name = ? and key = 'loss' order by step"
        tracked = connection.execute(f"select step, value {rows}", [run.name]).fetchall()
        of_run = "from tags join runs using (run_uuid) where name = ?"
        tags = dict(connection.execute(f"select key, value {of_run}", [run.name]).fetchall())
    assert tracked == list(enumerate(losses(run), start=1))
    assert (tags["job_ids"], tags["restarts"]) == (jobs(run)["train"], "0")
    files = [path for folder in (run, database.parent) for path in folder.rglob("*") if path.is_file()]
    kept = {str(path): path.read_bytes() for path in files}
    for job in jobs(run).values():
        said = {words: user.cluster.ask(*words, job) for words in KEPT_BY_SLURM}
        for words, expected in KEPT_BY_SLURM.items():
            assert expected in said[words], (words, job)
        kept |= {f"{words} {job}": text.encode() for words, text in said.items()}
    assert [place for place, content in kept.items() if CANARY.encode() in content] == []
    assert losses(run) == user.train_here("hardware.gpus_per_node=8", *asked)


def test_each_task_reads_the_secrets_itself(user, profile, tmp_path):
    secrets = tmp_path / "secrets"
    secrets.write_text(f"{CANARY}\n")
    secrets.chmod(0o600)
    run = user.submit("--nodes", "1", "data.seed=1", cluster=profile(secrets=str(secrets)))
    user.wait_for_end(run)
    status = user.alst("status", run.name)
    assert status.startswith("tokenize failed: rank ")
    assert "line 1 is not NAME=value" in status
    assert CANARY not in status + told(run)


def test_a_cancelled_run_leaves_no_process_and_can_be_resumed(user, two_ranks):
    """Without a server no job writes sqlite on the disk that nodes share; both are one run in MLflow afterwards."""
    run = user.submit("--nodes", "2", TWO_RANKS, "tracking.mlflow=true")
    cancelled = jobs(run)["train"]
    user.wait(lambda: len(losses(run)) >= 2, run)
    assert "job" in user.alst("resume", str(run), code=2), "a run that goes on is not started a second time"
    assert "cancelled" in user.alst("cancel", run.name)
    user.wait_for_end(run)
    user.wait(lambda: user.cluster.job_processes() == [], run)
    assert user.state(jobs(run)["train"]).startswith("CANCELLED")
    assert "CANCELLED" in user.alst("status", run.name)
    user.alst("resume", run.name)
    user.wait_for_end(run)
    assert losses(run) == two_ranks, told(run)
    assert not (run.parent / "mlflow.db").exists()
    printed = "".join(log.read_text() for log in run.glob("logs/train-*/*/rank0.log"))
    assert f"alst track sync {run.name}" in printed
    assert "told 8 steps" in user.alst("track", "sync", run.name)
    with closing(sqlite3.connect(run.parent / "mlflow.db")) as connection:
        of_run = "join runs using (run_uuid) where name = ?"
        query = f"select step, value from metrics {of_run} and key = 'loss' order by metrics.rowid"
        tracked = connection.execute(query, [run.name]).fetchall()
        tags = dict(connection.execute(f"select key, value from tags {of_run}", [run.name]).fetchall())
    assert tracked == list(enumerate(two_ranks, start=1))
    assert tags["job_ids"] == f"{cancelled}, {jobs(run)['train']}"


def test_when_packing_fails_training_is_cancelled_and_the_reason_is_shown_first(user, tmp_path):
    source = tmp_path / "text"
    source.mkdir()
    (source / "a.txt").write_bytes(b"\xff\xfe not UTF-8")
    run = user.submit("--nodes", "1", f"data.sources=[{{type: text, path: {source}, glob: '*.txt'}}]")
    user.wait_for_end(run)
    user.wait(lambda: user.state(jobs(run)["train"]).startswith("CANCELLED"), run)
    assert "FAILED" in user.state(jobs(run)["tokenize"]).split()
    status = user.alst("status", run.name)
    assert "a.txt" in status
    assert status.index("a.txt") < status.index("CANCELLED")


def test_the_templates_do_the_same_by_hand(user, two_ranks):
    run = user.submit("--nodes", "2", TWO_RANKS, "--dry-run")
    assert not (run / "slurm" / "jobs.json").exists()
    asked = [
        "--ntasks-per-node=1",
        "--cpus-per-task=2",
        "--mem=100",
        "--gpus-per-node=1",
        "--output",
        str(run / "job.out"),
    ]
    variables = {
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHON": sys.executable,
        "PATH": user.cluster.environment["PATH"],
    }
    asked.append("--export=" + ",".join(f"{name}={value}" for name, value in variables.items()))
    for stage, nodes in (("pack", 1), ("train", 2)):
        template = ROOT / "slurm" / f"{stage}.sbatch"
        by_hand = ["sbatch", "--wait", f"--nodes={nodes}", *asked, str(template), str(run / "plan.json")]
        user.cluster.ask(*by_hand, timeout_seconds=WAIT_SECONDS)
    assert losses(run) == two_ranks, told(run) + (run / "job.out").read_text()
