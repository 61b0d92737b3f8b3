"""Jobs in the image that `make image IMAGE=cpu` builds: real Apptainer on a real Slurm."""

import json
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from tests.cluster.user import WAIT_SECONDS, jobs, losses, told

STEPS = 8  # of the recipe
EIGHT_RANKS = "hardware.gpus_per_node=8"

pytestmark = pytest.mark.timeout(6 * WAIT_SECONDS)


@pytest.fixture
def in_image(profile, image, scratch):
    """The profile `throw-away` whose jobs run in the image."""

    def in_image(container=None, **changes) -> str:
        container = {"image": str(image), **(container or {})}
        return profile(container=container, scratch=str(scratch), **changes)

    return in_image


@pytest.fixture
def scratch(tmp_path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def labels(image: Path, apptainer: Path) -> dict[str, str]:
    told = subprocess.run([apptainer / "apptainer", "inspect", "--json", image], capture_output=True, check=True)
    return json.loads(told.stdout)["data"]["attributes"]["labels"]


def starts(run: Path) -> list[Path]:
    """The logs of each start of the train job."""
    return sorted((run / "logs" / f"train-{jobs(run)['train']}").iterdir())


def test_packed_trained_signalled_requeued_and_tracked_in_the_image_with_the_losses_of_a_bare_run(
    user, in_image, tracking, apptainer, image
):
    """A pack array, then four nodes of two tasks; the signal reaches each Python once, the batch script requeues."""
    url, database = tracking
    on_path = {"PATH": f"{apptainer}:{user.cluster.environment['PATH']}"}
    run = user.submit(
        "--nodes", "4", "tracking.mlflow=true", "data.seed=3", cluster=in_image(tracking_uri=url), **on_path
    )
    assert list(jobs(run)) == ["tokenize", "plan", "write", "train"]
    user.wait(lambda: len(losses(run)) >= 2, run)
    user.cluster.ask("scancel", "--signal=USR2", jobs(run)["train"])
    user.wait_for_end(run)
    assert user.state(jobs(run)["train"]) == "COMPLETED", told(run)
    first, second = starts(run)
    for rank in range(8):
        log = (first / f"rank{rank}.log").read_text()
        assert log.count("asked to stop by SIGUSR2") == 1, log
    assert "stopped as asked" in (first / "rank0.log").read_text()
    assert "resumed from step-00000" in (second / "rank0.log").read_text()
    assert list(run.glob("slurm/requeue-*")) == []

    assert losses(run) == user.train_here(EIGHT_RANKS, "data.seed=3"), "bare, and left in peace"
    with closing(sqlite3.connect(database)) as connection:
        query = (
            "select step, value from metrics join runs using (run_uuid) where key = 'loss' and name = ? order by step"
        )
        tracked = connection.execute(query, [run.name]).fetchall()
        params = dict(
            connection.execute("select key, value from params join runs using (run_uuid) where name = ?", [run.name])
        )
    assert tracked == list(enumerate(losses(run), start=1))
    digest = (image.parent / f"{image.name}.sha256").read_text().split()[0]
    assert params["image.digest"] == json.loads((run / "plan.json").read_text())["image"]["digest"] == digest
