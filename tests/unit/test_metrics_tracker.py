"""What is kept of a run: metrics.jsonl through kills, one MLflow run through restarts and failures."""

import json
import os
import socket
import time
from pathlib import Path

import pytest

from pipeline.errors import DataError, UserError
from pipeline.metrics.meter import StepRecord
from pipeline.metrics.tracker import (
    ENVIRONMENT,
    MAX_PARAM,
    JsonlWriter,
    MlflowWriter,
    Tracker,
    flatten,
    mlflow_store,
    open_tracker,
    read_metrics,
    read_steps,
    redact,
)


def make_record(step: int, **changes) -> StepRecord:
    values = dict.fromkeys(StepRecord.__dataclass_fields__, 0) | {
        "step": step,
        "loss": 7.0 - step,
        "mfu": None,
        "peak_device_bytes": None,
        "tokens": 32_768,
        "time": 1_700_000_000.5 + step,
    }
    return StepRecord(**(values | changes))


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """What the tracker sets in the environment does not outlive a test."""
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One runs folder, and so one sqlite store, for the module: making a store takes seconds."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def run_dir(runs, request):
    folder = runs / request.node.name
    folder.mkdir()
    return folder


def client_of(runs):
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{runs}/mlflow.db")


@pytest.fixture
def client(runs):
    return client_of(runs)


@pytest.fixture
def warnings():
    return []


def fail(*args, **kwargs):
    raise ConnectionError("no route to http://me:secret@host/api")


# metrics.jsonl


def test_every_step_is_on_disk_as_soon_as_it_is_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write(make_record(1))
    assert next(read_metrics(path))["loss"] == 6.0  # not closed: as after a kill
    assert set(next(read_metrics(path))) == set(StepRecord.__dataclass_fields__)


def test_a_torn_last_line_is_left_out_and_the_next_start_writes_on_its_own_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write(make_record(1))
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert [row["step"] for row in read_metrics(path)] == [1]
    writer = JsonlWriter(path)
    writer.write(make_record(2))
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_a_broken_line_in_the_middle_is_told_with_its_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(DataError, match="line 2"):
        list(read_metrics(path))
    with pytest.raises(DataError, match="is not there"):
        list(read_metrics(tmp_path / "none.jsonl"))


def test_a_step_done_again_after_a_restart_counts_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    for record in (make_record(1), make_record(2), make_record(3), make_record(2, loss=4.5)):
        writer.write(record)
    assert [(row["step"], row["loss"]) for row in read_steps(path)] == [(1, 6.0), (2, 4.5), (3, 4.0)]


def test_what_a_full_disk_does_not_take_is_written_later(tmp_path, warnings):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path, warn=warnings.append)
    with Path("/dev/full").open("ab", buffering=0) as full:
        file, writer._file = writer._file, full
        for step in (1, 2):
            writer.write(make_record(step))
        assert len(warnings) == 1 and "No space left" in warnings[0]
    writer._file = file  # there is room again
    writer.write(make_record(3))
    writer.close()
    assert [row["step"] for row in read_steps(path)] == [1, 2, 3]


def test_a_loss_that_is_not_finite_stays_valid_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    JsonlWriter(path).write(make_record(1, loss=float("nan"), grad_norm=float("inf")))

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    row = json.loads(path.read_text(), parse_constant=refuse)
    assert (row["loss"], row["grad_norm"]) == (None, None)


# MLflow


def test_a_run_can_be_read_back_from_mlflow(run_dir, runs, warnings, capfd):
    # First of the module to touch the store, so that the silence below covers its creation.
    recipe = run_dir / "recipe.yaml"
    recipe.write_text("name: tiny\n")
    tracker = open_tracker(run_dir, experiment="tiny", warn=warnings.append)
    tracker.log_start({"recipe": {"zero": {"stage": 3}}}, tags={"commit": "abc123"}, artifacts=[recipe])
    for step in (1, 2):
        tracker.log_step(make_record(step))
    tracker.finish("FINISHED")
    assert capfd.readouterr() == ("", "")  # no migration report, no log lines

    client = client_of(runs)
    run = client.get_run((run_dir / "mlflow_run_id").read_text().strip())
    assert run.info.run_id == tracker.mlflow_run_id
    assert run.info.status == "FINISHED"
    assert run.info.run_name == run_dir.name
    assert run.data.params == {"recipe.zero.stage": "3"}
    assert run.data.tags["commit"] == "abc123"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value, m.timestamp) for m in history] == [
        (1, 6.0, 1_700_000_001_500),
        (2, 5.0, 1_700_000_002_500),
    ]
    assert run.data.metrics["tokens"] == 32_768
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["recipe.yaml"]
    assert run.info.artifact_uri.startswith((runs / "mlartifacts").as_uri())
    assert list((runs / "mlartifacts").rglob("recipe.yaml"))
    assert [row["step"] for row in read_metrics(run_dir / "metrics.jsonl")] == [1, 2]
    assert warnings == []


def test_unknown_values_are_not_logged_as_metrics(run_dir, client, warnings):
    tracker = open_tracker(run_dir, experiment="none", warn=warnings.append)
    tracker.log_step(make_record(1))
    logged = set(client.get_run(tracker.mlflow_run_id).data.metrics)
    assert logged == set(StepRecord.__dataclass_fields__) - {"step", "time", "mfu", "peak_device_bytes"}
    assert warnings == []


def test_a_restart_appends_to_the_same_run(run_dir, client, warnings):
    for start, ranks in ((1, 2), (2, 4)):  # step 2 is done again: it was not in the last checkpoint
        tracker = open_tracker(run_dir, experiment="restart", warn=warnings.append)
        assert client.get_run(tracker.mlflow_run_id).info.status == "RUNNING"
        tracker.log_start({"ranks": ranks, "name": "r"}, tags={})
        for step in range(start, start + 3):
            tracker.log_step(make_record(step))
        tracker.finish("KILLED" if start == 1 else "FINISHED")
    runs_of_experiment = client.search_runs([client.get_experiment_by_name("restart").experiment_id])
    assert [run.info.status for run in runs_of_experiment] == ["FINISHED"]
    assert [m.step for m in client.get_metric_history(tracker.mlflow_run_id, "loss")] == [1, 2, 3, 4]
    assert runs_of_experiment[0].data.params["ranks"] == "2"  # parameters cannot change in MLflow
    assert runs_of_experiment[0].data.tags["parameters_changed"] == "ranks: 2 -> 4"
    assert warnings == []


def test_a_checkpoint_is_an_artifact_and_its_numbers_are_metrics(run_dir, client, warnings):
    tracker = open_tracker(run_dir, experiment="checkpoints", warn=warnings.append)
    told = {"path": "/runs/x/checkpoints/step-000004", "bytes": 2048, "stall_seconds": 0.25, "sha256": "ab"}
    tracker.log_checkpoint("step-000004", 4, told)
    tracker.finish("FINISHED")
    run = client.get_run(tracker.mlflow_run_id)
    assert run.data.metrics == {"checkpoint_bytes": 2048.0, "checkpoint_stall_seconds": 0.25}
    assert [file.path for file in client.list_artifacts(run.info.run_id, "checkpoints")] == [
        "checkpoints/step-000004.json"
    ]
    assert warnings == []


def test_a_run_id_of_another_store_gives_a_new_run(run_dir, client, warnings):
    (run_dir / "mlflow_run_id").write_text("0" * 32)
    tracker = open_tracker(run_dir, experiment="moved", warn=warnings.append)
    assert tracker.mlflow_run_id != "0" * 32
    assert (run_dir / "mlflow_run_id").read_text().strip() == tracker.mlflow_run_id
    assert warnings == []


def test_params_beyond_mlflows_limits_are_split_not_lost(run_dir, client, warnings):
    tracker = open_tracker(run_dir, experiment="long", warn=warnings.append)
    long = "a" * MAX_PARAM + "b"
    many = {f"key{i}": i for i in range(230)}
    tracker.log_start(
        {"uri": "http://me:secret@host", "long": long, "empty": "", "odd$name": 1, "x" * 300 + "end": 1} | many, tags={}
    )
    params = client.get_run(tracker.mlflow_run_id).data.params
    assert params["long.part1"] + params["long.part2"] == long
    assert params["empty"] == ""
    assert params["uri"] == "http://***@host"
    assert params["odd_name"] == "1"
    assert any(key.endswith("end") and len(key) == 250 for key in params)
    assert {f"key{i}": str(i) for i in range(230)}.items() <= params.items()
    assert warnings == []


def test_flatten_names_maps_with_dots_and_counts_lists_of_maps():
    values = {"a": {"b": None, "c": [1, 2], "d": {}}, "sources": [{"path": "x"}, {"path": "y"}], "lr": 1e-5, "on": True}
    assert flatten(values) == {
        "a.b": "null",
        "a.c": "[1, 2]",
        "a.d": "{}",
        "sources.0.path": "x",
        "sources.1.path": "y",
        "lr": "1e-05",
        "on": "true",
    }


def test_switched_off_or_not_rank_0_leaves_no_mlflow(tmp_path):
    tracker = open_tracker(tmp_path, experiment="off", enabled=False)
    tracker.log_start({}, {})
    tracker.log_step(make_record(1))
    tracker.finish("FINISHED")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    other = tmp_path / "rank1"
    other.mkdir()
    idle = open_tracker(other, experiment="off", rank=1)
    idle.log_step(make_record(1))
    idle.finish("FINISHED")
    assert list(other.iterdir()) == []


# MLflow fails


def test_a_closed_port_is_one_warning_and_the_run_goes_on(tmp_path, warnings):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = time.monotonic()
    tracker = open_tracker(tmp_path, experiment="x", uri=f"http://me:secret@127.0.0.1:{port}", warn=warnings.append)
    tracker.log_step(make_record(1))
    tracker.finish("FINISHED")
    assert time.monotonic() - start < 8
    assert len(warnings) == 1
    assert "training goes on" in warnings[0]
    assert "secret" not in warnings[0]
    assert tracker.mlflow_run_id is None
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "3"


def test_a_server_that_never_answers_is_waited_for_as_long_as_the_user_says(tmp_path, warnings, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        start = time.monotonic()
        open_tracker(tmp_path, experiment="x", uri=f"http://127.0.0.1:{mute.getsockname()[1]}", warn=warnings.append)
    assert 0.9 < time.monotonic() - start < 2.5
    assert len(warnings) == 1


def test_failures_in_mid_run_warn_once_pause_and_recover(run_dir, client, warnings, monkeypatch):
    tracker = open_tracker(run_dir, experiment="faults", warn=warnings.append)
    working = tracker._mlflow._client
    calls = []

    class Down:
        def log_batch(self, *args, **kwargs):
            calls.append(args)
            fail()

    tracker._mlflow._client = Down()
    tracker.log_step(make_record(1))
    tracker.log_step(make_record(2))
    assert len(calls) == 1  # the second step did not wait for a server known to be down
    monkeypatch.setattr("pipeline.metrics.tracker.RETRY_SECONDS", 0.0)
    tracker._mlflow._quiet_until = 0.0
    tracker.log_step(make_record(3))
    assert len(calls) == 2
    tracker._mlflow._client = working
    tracker.log_step(make_record(4))
    tracker.finish("FINISHED")
    assert len(warnings) == 1
    assert "secret" not in warnings[0]
    assert [m.step for m in client.get_metric_history(tracker.mlflow_run_id, "loss")] == [4]
    assert [row["step"] for row in read_metrics(run_dir / "metrics.jsonl")] == [1, 2, 3, 4]


def test_failures_at_start_and_end_do_not_raise(tmp_path, warnings):
    class Down:
        log_batch = log_artifact = set_terminated = staticmethod(fail)

    tracker = Tracker(mlflow=MlflowWriter(Down(), "id", known_params={}, warn=warnings.append))
    tracker.log_start({"a": 1}, {"b": "c"}, artifacts=[tmp_path / "none.png"])
    tracker.finish("FAILED")
    assert ["parameters" in warnings[0], "FAILED" in warnings[1]] == [True, True]


def test_an_artifact_that_is_missing_does_not_end_the_run(run_dir, warnings):
    tracker = open_tracker(run_dir, experiment="artifact", warn=warnings.append)
    tracker.log_artifact(run_dir / "none.png")
    assert "none.png" in warnings[0]


def test_a_file_that_is_no_database_is_a_warning(tmp_path, warnings, capfd):
    (tmp_path / "mlflow.db").write_bytes(b"not sqlite" * 500)
    tracker = open_tracker(tmp_path, experiment="x", uri=f"sqlite:///{tmp_path}/mlflow.db", warn=warnings.append)
    assert tracker.mlflow_run_id is None
    assert "not a database" in warnings[0]
    assert capfd.readouterr().err == ""


# where the store lies


@pytest.mark.parametrize("place", ["{tmp}/file/runs", "/proc/runs", "/proc"])
def test_a_store_that_cannot_be_written_is_a_user_error(tmp_path, place):
    (tmp_path / "file").write_text("in the way")
    folder = place.format(tmp=tmp_path)
    with pytest.raises(UserError, match=r"cannot be written .* tracking\.mlflow: false"):
        open_tracker(tmp_path, experiment="x", uri=f"sqlite:///{folder}/mlflow.db")
    assert not (tmp_path / "metrics.jsonl").exists()


def test_uris_resolve_to_a_store_and_its_artifacts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    default = mlflow_store(None, tmp_path / "runs")
    assert default.uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert default.artifact_location == f"file://{tmp_path}/runs/mlartifacts"
    assert mlflow_store("sqlite:///sub/m.db?timeout=20", tmp_path).uri == f"sqlite:///{tmp_path}/sub/m.db?timeout=20"
    assert (tmp_path / "sub").is_dir()
    assert mlflow_store("http://host:5000", tmp_path).artifact_location is None
    assert mlflow_store("postgresql://host/db", tmp_path).artifact_location == f"file://{tmp_path}/mlartifacts"
    for nameless in ("sqlite://", "sqlite:///"):
        with pytest.raises(UserError, match="names no file"):
            mlflow_store(nameless, tmp_path)


def test_passwords_in_urls_are_hidden():
    assert (
        redact("see postgresql://me:pw@host/db and http://host/a@b")
        == "see postgresql://***@host/db and http://host/a@b"
    )
