"""Jobs in the image that `make image IMAGE=cpu` builds: real Apptainer on a real Slurm."""

import json
import re
import shlex
import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from pipeline.launch.container import apptainer_environment
from tests.cluster.user import WAIT_SECONDS, jobs, losses, told

LOOK = """
import json, os, sys
scratch, outside = sys.argv[1:]
image = os.environ["APPTAINER_CONTAINER"]
places = {"code": "code/pipeline", "run": ".", "scratch": scratch, "image": image}
seen = {name: os.access(path, os.W_OK) for name, path in places.items()}
seen |= {"outside": os.path.exists(outside), "folder": os.getcwd()}
json.dump(seen, open("seen.json", "w"))
"""
"""What a task may write, and whether it sees a file that nobody bound."""

pytestmark = pytest.mark.timeout(6 * WAIT_SECONDS)


def test_an_image_tells_what_it_is_and_not_where_it_was_made(image, apptainer):
    labels = inspect(image, apptainer, "labels")
    assert {"alst.commit", "alst.lock", "alst.python", "alst.submitit", "alst.attention"} <= labels.keys()
    told = json.dumps(labels) + json.dumps(inspect(image, apptainer, "deffile"))
    assert "://" not in told
    assert str(image.parent) not in told
    for name in ("/etc/hostname", "/etc/apt/sources.list"):
        assert run_in(image, apptainer, f"import os; print(os.path.exists({name!r}))") == "False"


def test_an_images_own_test_finds_a_library_that_shadows_torchs(image, apptainer, tmp_path):
    shadow = tmp_path / "libgomp.so.1"
    torchs = "/opt/venv/lib/python3.11/site-packages/torch/lib/libgomp.so.1"
    run_in(image, apptainer, f"import shutil; shutil.copy({torchs!r}, {str(shadow)!r})", f"--bind={tmp_path}")
    line = [apptainer / "apptainer", "exec", "--no-home", "--pwd=/", f"--bind={tmp_path}", "--env=MPLCONFIGDIR=/tmp"]
    check = [image, "python", "/opt/alst/check.py", "cpu"]

    def done(*options: str) -> subprocess.CompletedProcess[str]:
        command = [*line, *options, *check]
        return subprocess.run(command, env=apptainer_environment(), capture_output=True, text=True, check=False)

    good, bad = done(), done(f"--env=LD_PRELOAD={shadow}")
    assert good.returncode == 0, good.stderr
    assert f"loaded {torchs}" in good.stdout
    assert bad.returncode == 1
    assert f"{shadow}: shadows the one that torch brings" in bad.stderr


def test_packed_trained_signalled_requeued_and_tracked_in_the_image_with_the_losses_of_a_bare_run(
    user, in_image, tracking, image, on_path
):
    """A pack array, then four nodes of two tasks; the signal reaches each Python once, the batch script requeues."""
    url, database = tracking
    recipe = ("data.seed=3", "train.steps=5", "checkpoint.every_steps=null")
    cluster = in_image(tracking_uri=url, setup=["export CANARY=of-a-module"])
    run = user.submit("--nodes", "4", "--verify", "tracking.mlflow=true", *recipe, cluster=cluster, **on_path)
    assert list(jobs(run)) == ["tokenize", "plan", "write", "train"]
    user.wait(lambda: len(losses(run)) >= 1, run)
    variables = [Path(f"/proc/{pid}/environ").read_bytes() for pid in user.cluster.job_processes(rank=1)]
    assert variables
    assert not any(b"CANARY" in some for some in variables), "only what is listed reaches a task"
    user.cluster.ask("scancel", "--signal=USR2", jobs(run)["train"])
    user.wait_for_end(run)
    assert user.state(jobs(run)["train"]) == "COMPLETED", told(run)
    first, second = sorted((run / "logs" / f"train-{jobs(run)['train']}").iterdir())
    for rank in range(8):
        log = (first / f"rank{rank}.log").read_text()
        assert log.count("asked to stop by SIGUSR2") == 1, log
    assert "stopped as asked" in (first / "rank0.log").read_text()
    assert "resumed from step-00000" in (second / "rank0.log").read_text(), "saved only because it was asked to stop"
    assert list(run.glob("slurm/requeue-*")) == []

    assert losses(run) == user.train_here("hardware.gpus_per_node=8", *recipe), "bare, and left in peace"
    rows = f"join runs using (run_uuid) where name = '{run.name}'"
    with closing(sqlite3.connect(database)) as connection:
        tracked = connection.execute(
            f"select step, value from metrics {rows} and key = 'loss' order by step"
        ).fetchall()
        params = dict(connection.execute(f"select key, value from params {rows}").fetchall())
    assert tracked == list(enumerate(losses(run), start=1))
    digest = (image.parent / f"{image.name}.sha256").read_text().split()[0]
    assert params["image.digest"] == json.loads((run / "plan.json").read_text())["image"]["digest"] == digest


def test_a_task_sees_its_own_code_read_only_and_nothing_that_nobody_bound(user, in_image, image, scratch, on_path):
    run = user.submit("--nodes", "1", "data.seed=4", "--dry-run", cluster=in_image(), **on_path)
    line = exec_line(run)
    outside = str(user.recipe)
    subprocess.run(
        [*line, "-c", LOOK, str(scratch), outside],
        env=on_path | apptainer_variables(run),
        check=True,
        timeout=WAIT_SECONDS,
    )
    assert json.loads((run / "seen.json").read_text()) == {
        "code": False, "run": True, "scratch": True, "image": False, "outside": False, "folder": str(run),
    }  # fmt: skip


def test_an_image_that_was_replaced_is_refused_by_the_job_and_a_damaged_one_at_submission(
    user, in_image, image, on_path, tmp_path
):
    mine = tmp_path / "mine.sif"
    shutil.copyfile(image, mine)
    with mine.open("r+b") as file:
        file.truncate(image.stat().st_size // 2)
    damaged = user.alst("submit", str(user.recipe), "--cluster", in_image(mine), "--nodes", "1", code=2, **on_path)
    assert re.search(r"mine\.sif: does not start here: FATAL", damaged)
    assert "Traceback" not in damaged

    mine.unlink()
    mine.hardlink_to(image)
    run = user.submit("--nodes", "1", "data.seed=5", "--dry-run", cluster=in_image(mine), **on_path)
    plan = json.loads((run / "plan.json").read_text())
    plan["image"] = {"path": str(mine), "digest": "0" * 64, "size_bytes": 1, "sif_id": "another"}
    (run / "plan.json").write_text(json.dumps(plan))
    done = subprocess.run(
        [*exec_line(run), "-m", "pipeline.cli", "run", str(run / "plan.json"), "--stage", "pack"],
        env=on_path | apptainer_variables(run), capture_output=True, text=True, timeout=WAIT_SECONDS,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "is not the image this run was submitted with" in done.stderr


def test_an_image_that_a_node_has_not_is_told_with_the_remedy(user, in_image, image, on_path, tmp_path):
    """It is there when the job is submitted, and gone when the job starts."""
    mine = tmp_path / "mine.sif"
    shutil.copyfile(image, mine)
    held = {"extra": {"hold": True}}
    run = user.submit("--nodes", "1", "data.seed=6", cluster=in_image(mine, pack=held), **on_path)
    mine.unlink()
    user.cluster.ask("scontrol", "release", jobs(run)["tokenize"])
    user.wait_for_end(run)
    assert "FAILED" in user.state(jobs(run)["tokenize"])
    status = user.alst("status", run.name)
    assert f"container.image = {mine}: not on every node of this job; copy it to a folder they share" in status


def inspect(image: Path, apptainer: Path, what: str):
    done = subprocess.run(
        [apptainer / "apptainer", "inspect", "--json", f"--{what}", image], capture_output=True, check=True
    )
    return json.loads(done.stdout)["data"]["attributes"][what]


def run_in(image: Path, apptainer: Path, code: str, *options: str) -> str:
    command = [apptainer / "apptainer", "exec", "--no-home", "--no-mount=cwd,tmp", "--pwd=/", *options]
    done = subprocess.run(
        [*command, image, "python", "-c", code],
        env=apptainer_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def exec_line(run: Path) -> list[str]:
    """How a task of packing starts Python, as the job's text has it."""
    text = next(run.glob("slurm/tokenize.sbatch")).read_text().rsplit("srun ", 1)[1].splitlines()[0]
    words = shlex.split(text)
    return words[words.index("apptainer") : words.index("python") + 1]


def apptainer_variables(run: Path) -> dict[str, str]:
    """What the job's text exports: its table."""
    text = next(run.glob("slurm/tokenize.sbatch")).read_text()
    return dict(re.findall(r"^export (\w+)=(\S*)", text, re.MULTILINE))
