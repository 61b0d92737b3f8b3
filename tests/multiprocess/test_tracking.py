"""A real MLflow server that is away at the start, in the middle or at the end, or does not answer.

No step waits for it, and in the end it knows every step once and in order.
"""

import json
import os
import select
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from pipeline.metrics.rows import read_steps
from pipeline.metrics.sync import register, sync
from pipeline.plan.job import plan_job
from pipeline.plan.run_dir import RunDir
from pipeline.recipe.load import load
from slurm.local_cluster import free_ports
from tests.mlflow_server import MlflowServer
from tests.multiprocess.tracked import WAIT_AT_THE_END

ROOT = Path(__file__).resolve().parents[2]
WAIT_SECONDS = 120
FOR_EVER = "3600"  # seconds of a request: who waits for the server, waits beyond the test

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[MlflowServer]:
    """For the module; each test says whether it wants it to run."""
    (port,) = free_ports(1)
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"), port)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def run_dir(tmp_path, request) -> RunDir:
    run_dir = RunDir(tmp_path / request.node.name)
    run_dir.path.mkdir()
    run_dir.write_plan(plan_job(load("tiny")))
    return run_dir


class Worker:
    """Rank 0 of a run, in a process of its own."""

    def __init__(self, run_dir: RunDir, url: str, *, wait_at_the_end: float = WAIT_SECONDS, **variables: str) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "SLURM_JOB_ID"}
        self.log = run_dir.path / "worker.log"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.multiprocess.tracked", str(run_dir.path), url],
            cwd=ROOT,
            env=environment | {WAIT_AT_THE_END: str(wait_at_the_end), "PYTHONPATH": str(ROOT)} | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("ab"),
        )
        self._hear("started")

    def steps(self, *numbers: int) -> None:
        """Returns once all are done."""
        for number in numbers:
            self._say(f"step {number}", "step")

    def end(self, status: str = "FINISHED") -> None:
        self._say(f"end {status}", "end")
        assert self._process.wait(WAIT_SECONDS) == 0

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _say(self, line: str, answer: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())
        self._process.stdin.flush()
        self._hear(answer)

    def _hear(self, expected: str) -> None:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], WAIT_SECONDS)
        said = self._process.stdout.readline().decode().strip() if ready else "nothing"
        assert said == expected, f"said {said!r} instead of {expected!r}:\n{self.log.read_text()}"


@pytest.fixture
def start(run_dir) -> Iterator[Callable[..., Worker]]:
    """Starts workers of the run; none outlives the test."""
    workers: list[Worker] = []

    def start(url: str, **options) -> Worker:
        workers.append(Worker(run_dir, url, **options))
        return workers[-1]

    yield start
    for worker in workers:
        worker.kill()


def told(server: MlflowServer, run_dir: RunDir) -> list[tuple[int, float]]:
    """(step, loss) of the one run in the data base that is this folder's, in the order in which they came."""
    if not server.database.exists():
        return []
    with closing(sqlite3.connect(server.database)) as connection:
        query = "from metrics join runs using (run_uuid) where name = ? and key = 'loss' order by metrics.rowid"
        return connection.execute(f"select step, value {query}", [run_dir.path.name]).fetchall()


def status_of(server: MlflowServer, run_dir: RunDir) -> list[str]:
    with closing(sqlite3.connect(server.database)) as connection:
        found = connection.execute("select status from runs where name = ?", [run_dir.path.name])
        return [status for (status,) in found]


def wait_until_told(server: MlflowServer, run_dir: RunDir, steps: int) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while len(told(server, run_dir)) < steps:
        assert time.monotonic() < deadline, (run_dir.path / "worker.log").read_text()
        time.sleep(0.1)


def in_order(last: int) -> list[tuple[int, float]]:
    return [(step, 10.0 - step) for step in range(1, last + 1)]


def test_a_server_that_is_down_at_the_start_hears_all_when_it_comes(server, run_dir, start):
    server.stop()
    worker = start(server.url)
    worker.steps(1, 2, 3)
    server.start()
    worker.steps(4)
    worker.end()
    assert told(server, run_dir) == in_order(4)
    assert status_of(server, run_dir) == ["FINISHED"]
    warning = worker.log.read_text()
    assert warning.count("training goes on") == 1, warning


def test_a_server_that_goes_down_in_the_middle_hears_what_it_missed(server, run_dir, start):
    server.start()
    worker = start(server.url)
    worker.steps(1, 2)
    wait_until_told(server, run_dir, 2)
    server.stop()
    worker.steps(3, 4, 5)
    server.start()
    worker.steps(6)
    worker.end()
    assert told(server, run_dir) == in_order(6)
    assert status_of(server, run_dir) == ["FINISHED"]


def test_a_server_that_is_down_at_the_end_ends_no_run_and_sync_tells_it_later(server, run_dir, start):
    server.start()
    worker = start(server.url, wait_at_the_end=1.0)
    worker.steps(1, 2)
    wait_until_told(server, run_dir, 2)
    server.stop()
    worker.steps(3)
    worker.end()
    assert f"alst track sync {run_dir.path.name}" in worker.log.read_text()
    command = [sys.executable, "-P", "-m", "pipeline.cli", "track", "sync", str(run_dir.path), "--uri", server.url]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    down = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
    assert down.returncode == 1
    assert "call this again once it answers" in down.stderr
    assert "Traceback" not in down.stderr
    server.start()
    synced = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WAIT_SECONDS, check=True)
    assert "told 1 steps" in synced.stdout
    assert told(server, run_dir) == in_order(3)
    assert status_of(server, run_dir) == ["FINISHED"]


def test_no_step_waits_for_a_server_that_does_not_answer(server, run_dir, start):
    server.start()
    worker = start(server.url, MLFLOW_HTTP_REQUEST_TIMEOUT=FOR_EVER)
    worker.steps(1)
    wait_until_told(server, run_dir, 1)
    server.signal(signal.SIGSTOP)
    try:
        worker.steps(*range(2, 30))  # all done, while the server stands still
        assert [row["step"] for row in read_steps(run_dir.metrics)] == list(range(1, 30))
    finally:
        server.signal(signal.SIGCONT)
    worker.end()
    assert told(server, run_dir) == in_order(29)


def test_two_restarts_after_kills_leave_every_step_once_and_in_order(server, run_dir, start):
    server.start()
    for first, last in ((1, 5), (3, 8)):  # the second goes on from a checkpoint of step 2
        worker = start(server.url)
        worker.steps(*range(first, last + 1))
        wait_until_told(server, run_dir, last if first == 1 else 6)
        worker.kill()
    worker = start(server.url)
    worker.steps(*range(5, 12))
    worker.end()
    assert told(server, run_dir) == in_order(11)
    assert status_of(server, run_dir) == ["FINISHED"]


def test_a_server_gets_checkpoints_and_models_as_files(server, run_dir, start):
    server.start()
    folder = run_dir.checkpoints / "step-000002"
    (folder / "deepspeed").mkdir(parents=True)
    (folder / "deepspeed" / "weights.pt").write_bytes(bytes(1000))
    (folder / "checkpoint.json").write_text("{}")
    worker = start(server.url)
    worker.steps(1, 2)
    worker.end()
    saved = {"event": "checkpoint", "time": time.time(), "name": folder.name, "path": str(folder), "step": 2}
    with run_dir.events.open("a") as events:
        events.write(json.dumps({**saved, "bytes": 1000}) + "\n")
    run_dir.write_plan(plan_job(load("tiny", overrides=["tracking.upload_checkpoints=all"])))
    _, synced = sync(run_dir, uri=server.url)
    assert (synced.steps, synced.checkpoints, synced.uploads) == (0, 1, 1)
    assert sync(run_dir, uri=server.url)[1].uploads == 0, "it is there already"
    exported = run_dir.path / "exported"
    exported.mkdir()
    (exported / "config.json").write_text('{"model_type": "llama"}')
    assert register(run_dir, exported, name="code", uri=server.url) == "1"
    client = MlflowClient(tracking_uri=server.url)
    weights = client.download_artifacts(synced.run_id, f"checkpoints/{folder.name}/deepspeed/weights.pt")
    assert Path(weights).read_bytes() == bytes(1000)
    assert client.get_model_version("code", "1").run_id == synced.run_id
    config = client.download_artifacts(synced.run_id, "model/config.json")
    assert Path(config).read_text() == '{"model_type": "llama"}'
