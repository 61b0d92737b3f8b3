"""One real Slurm cluster for all tests here. Without its packages they are skipped; under CI=true they fail."""

import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from containers import apptainer as containers_apptainer
from pipeline.plan.cluster import CLUSTERS
from slurm.local_cluster import LocalCluster, free_ports, missing_programs
from tests.cluster.drills import BARE, IN_IMAGE, Place, write_table
from tests.cluster.user import ROOT, WAIT_SECONDS, User

BUILD_SECONDS = 1800  # five minutes on two free cores


@pytest.fixture(scope="session")
def programs() -> None:
    """Slurm's and MariaDB's programs are on this machine."""
    if missing := missing_programs():
        told = f"{', '.join(missing)} not on this machine; run `make cluster-up` as root once"
        if os.environ.get("CI") == "true":
            pytest.fail(told)
        pytest.skip(told)


@pytest.fixture(scope="session")
def cluster(programs) -> Iterator[LocalCluster]:
    with tempfile.TemporaryDirectory(prefix="alst-") as folder:
        cluster = LocalCluster(Path(folder) / "c")
        cluster.up()
        try:
            yield cluster
        finally:
            cluster.down()


@pytest.fixture(autouse=True)
def jobs_end_with_their_test(request) -> Iterator[None]:
    """A test that fails leaves its job; the next would take that for its own."""
    cluster = request.getfixturevalue("cluster") if "cluster" in request.fixturenames else None
    yield
    if cluster is not None:
        cluster.cancel_all()
        deadline = time.monotonic() + WAIT_SECONDS
        while cluster.job_processes():
            assert time.monotonic() < deadline, "a job's processes do not end"
            time.sleep(0.2)


@pytest.fixture(scope="session")
def user(tmp_path_factory, cluster) -> User:
    """One for all tests, so that what one packed the others need not."""
    return User(tmp_path_factory.mktemp("user"), cluster)


@pytest.fixture(scope="session")
def two_ranks(user) -> list[float]:
    """The losses of two ranks that were left in peace, without Slurm."""
    return user.train_here("hardware.gpus_per_node=2")


@pytest.fixture(scope="session", autouse=True)
def drills_table() -> Iterator[None]:
    """What drills cost, into the document that `make drills` names."""
    yield
    write_table()


@pytest.fixture(scope="session")
def apptainer() -> Path:
    """The folder of Apptainer's program."""
    if (found := containers_apptainer.find()) is None:
        told = "apptainer is not on this machine; run `python3 containers/apptainer.py install` as root once"
        if os.environ.get("CI") == "true":
            pytest.fail(told)
        pytest.skip(told)
    return found


@pytest.fixture(scope="session")
def image(apptainer) -> Iterator[Path]:
    """The CPU image, built as a user builds it; in $ALST_IMAGES one that is up to date is taken, and stays."""
    with tempfile.TemporaryDirectory(prefix="alst-images-", ignore_cleanup_errors=True) as temporary:
        folder = Path(os.environ.get("ALST_IMAGES") or temporary)
        done = subprocess.run(
            [sys.executable, ROOT / "containers" / "build.py", "cpu"],
            env=os.environ | {"ALST_IMAGES": str(folder)},
            capture_output=True,
            text=True,
            timeout=BUILD_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        yield folder / "alst-cpu.sif"


@pytest.fixture
def profile(tmp_path):
    """The profile `throw-away` with changes, at a path."""

    def profile(**changes) -> str:
        raw = yaml.safe_load((CLUSTERS / "throw-away.yaml").read_text())
        for key, value in changes.items():
            raw[key] = raw[key] | value if isinstance(value, dict) and key in raw else value
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(raw))
        return str(path)

    return profile


@pytest.fixture
def scratch(tmp_path) -> Path:
    """A folder of each node's own, as far as nodes on one machine have one."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


@pytest.fixture
def in_image(profile, image, scratch):
    """The profile `throw-away` whose jobs run in the image, or in another."""

    def in_image(path: Path = image, **changes) -> str:
        return profile(container={"image": str(path)}, scratch=str(scratch), **changes)

    return in_image


@pytest.fixture
def on_path(user, apptainer) -> dict[str, str]:
    """Variables of someone who has Apptainer."""
    return {"PATH": f"{apptainer}:{user.cluster.environment['PATH']}"}


@pytest.fixture
def bare(user, profile) -> Place:
    return Place(BARE, user, profile)


@pytest.fixture(params=[BARE, pytest.param(IN_IMAGE, marks=pytest.mark.full)])
def place(request, user, bare) -> Place:
    """A drill is done in each. What is trained in the image has the losses of what is trained without."""
    if request.param == BARE:
        return bare
    return Place(IN_IMAGE, user, request.getfixturevalue("in_image"), variables=request.getfixturevalue("on_path"))


@pytest.fixture(scope="session")
def tracking(tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """An MLflow server on loopback: its URL and its data base."""
    folder, (port,) = tmp_path_factory.mktemp("mlflow"), free_ports(1)
    with mlflow_server(folder, port) as url:
        yield url, folder / "mlflow.db"


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[str]:
    """A server with its data base in `folder`, by its URL; killed at the end of the block."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "f")]
    with (folder / "log").open("ab") as log:
        server = subprocess.Popen(
            command,
            env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False
