"""The run folder's rows and MLflow, its image: one run through restarts, nothing twice, nothing lost."""

import json
import threading
import time
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.metrics.environment import environment_found
from pipeline.metrics.meter import StepRecord
from pipeline.metrics.mirror import MAX_PARAM, METRICS_PER_CALL, Mirror, flatten
from pipeline.metrics.rows import read_metrics, read_steps
from pipeline.metrics.store import ENVIRONMENT, mlflow_store, redact
from pipeline.metrics.sync import sync
from pipeline.metrics.tracker import LiveMirror, Tracker, live_store, open_tracker
from pipeline.plan.job import plan_job
from pipeline.plan.run_dir import RunDir
from pipeline.recipe.load import load

START = {"job": "4711", "host": "n1", "commit": "abc123", "image_digest": "d1f00d", "world_size": 2, "after_step": 0}
PLAN = plan_job(load("tiny"))
BY_POSITION = {"00000000": 5.5, "00000256": None}


def make_record(step: int, **changes) -> StepRecord:
    values = dict.fromkeys(StepRecord.__dataclass_fields__, 0) | {
        "step": step,
        "loss": 7.0 - step,
        "mfu": None,
        "peak_device_bytes": None,
        "tokens": 32_768,
        "time": 1_700_000_000.5 + step,
        "loss_by_position": BY_POSITION,
        "loss_by_document_length": {},
        "system": {"cpu_utilization_percentage": 93.5},
    }
    return StepRecord(**(values | changes))


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """What the mirror sets in the environment does not outlive a test; and no test is a job of Slurm's."""
    for name in (*ENVIRONMENT, "SLURM_JOB_ID"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One runs folder, and so one sqlite store, for the module: making a store takes seconds."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def run_dir(runs, request) -> RunDir:
    folder = runs / request.node.name
    folder.mkdir()
    run_dir = RunDir(folder)
    run_dir.write_plan(PLAN)
    return run_dir


@pytest.fixture
def client(runs):
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{runs}/mlflow.db")


@pytest.fixture
def warnings():
    return []


def tracking(**changes):
    return PLAN.recipe.tracking.model_copy(update=changes)


def started(run_dir, warnings, **changes) -> Tracker:
    tracker = open_tracker(run_dir, tracking(**changes), experiment="tiny", warn=warnings.append)
    tracker.log_start(START)
    return tracker


def ended(tracker: Tracker, status="FINISHED") -> None:
    tracker.log_end(status)
    tracker.close()


def found(client, run_dir):
    """The one run in MLflow that stands for a run folder."""
    experiment = client.get_experiment_by_name("tiny").experiment_id
    (run,) = client.search_runs([experiment], f"attributes.run_name = '{run_dir.path.name}'")
    return run


def history(client, run, name: str) -> list[tuple]:
    return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]


def test_a_run_can_be_read_back_from_mlflow(run_dir, runs, client, warnings, capfd):
    # First of the module to touch the store, so that the silence below covers its creation.
    tracker = started(run_dir, warnings)
    for step in (1, 2):
        tracker.log_step(make_record(step))
    run_dir.plot.write_bytes(b"a picture")
    run_dir.slurm.mkdir()
    run_dir.sbatch("train").write_text("#SBATCH")
    ended(tracker)
    assert capfd.readouterr() == ("", "")  # no migration report, no log lines
    run = found(client, run_dir)
    assert run.info.status == "FINISHED"
    assert run.data.params["recipe.zero.stage"] == "3"
    assert run.data.params["seq_len"] == "32768"
    tags = run.data.tags
    assert (tags["commit"], tags["image_digest"]) == ("abc123", "d1f00d")
    assert (tags["job_ids"], tags["restarts"]) == ("4711", "0")
    points = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value, m.timestamp) for m in points] == [
        (1, 6.0, 1_700_000_001_500),
        (2, 5.0, 1_700_000_002_500),
    ]
    assert run.data.metrics["loss_by_position/00000000"] == 5.5
    assert run.data.metrics["system/cpu_utilization_percentage"] == 93.5
    files = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert files == {"recipe.yaml", "plan.json", "training.png", "slurm"}
    assert [item.path for item in client.list_artifacts(run.info.run_id, "slurm")] == ["slurm/train.sbatch"]
    assert run.info.artifact_uri.startswith((runs / "mlartifacts").as_uri())
    assert [row["step"] for row in read_metrics(run_dir.metrics)] == [1, 2]
    assert warnings == []


def test_unknown_values_are_not_logged_as_metrics(run_dir, client, warnings):
    tracker = started(run_dir, warnings)
    record = make_record(1)
    tracker.log_step(record)
    ended(tracker)
    unknown = {"mfu", "peak_device_bytes", "loss_by_position/00000256"}
    assert set(found(client, run_dir).data.metrics) == record.to_row().keys() - {"step", "time"} - unknown


def test_two_restarts_are_one_run_with_every_step_once_and_in_order(run_dir, client, warnings):
    """Steps that are done again after a restart are not told again; jobs and changes are."""
    for start, job in ((1, "4711"), (3, "4711"), (4, "4712")):
        tracker = open_tracker(run_dir, tracking(), experiment="tiny", warn=warnings.append)
        tracker.log_start(START | {"job": job, "commit": f"of start {start}"})
        for step in range(start, start + 4):
            tracker.log_step(make_record(step, time=tracker.clock.now()))
        ended(tracker, "KILLED" if start < 4 else "FINISHED")
        run_dir.write_plan(plan_job(load("tiny", overrides=["train.steps=40"])))
    run = found(client, run_dir)
    assert history(client, run, "loss") == [(step, 7.0 - step) for step in range(1, 8)]
    times = [m.timestamp for m in client.get_metric_history(run.info.run_id, "loss")]
    assert times == sorted(times)
    assert run.info.status == "FINISHED"
    assert (run.data.tags["restarts"], run.data.tags["job_ids"]) == ("2", "4711, 4712")
    assert run.data.tags["commit"] == "of start 4"
    assert run.data.params["recipe.train.steps"] == "20"  # parameters cannot change in MLflow
    assert run.data.tags["parameters_changed"] == "recipe.train.steps: 20 -> 40"
    assert warnings == []


def test_a_clock_that_was_set_back_between_two_starts_leaves_time_in_order(run_dir, client, warnings):
    tracker = started(run_dir, warnings, mlflow=False)
    ahead = time.time() + 86_400
    tracker.log_step(make_record(1, time=ahead))
    ended(tracker, "KILLED")
    tracker = started(run_dir, warnings, mlflow=False)
    tracker.log_step(make_record(2, time=tracker.clock.now()))
    ended(tracker)
    sync(run_dir)
    times = [m.timestamp for m in client.get_metric_history(found(client, run_dir).info.run_id, "loss")]
    assert round(ahead * 1000) == times[0] <= times[1] < times[0] + 600_000


def test_sync_fills_mlflow_from_the_run_folder_alone_and_a_second_time_tells_nothing(run_dir, client, warnings):
    tracker = started(run_dir, warnings, mlflow=False)
    rows = METRICS_PER_CALL // len(make_record(1).to_row()) + 3  # more than a call takes
    for step in range(1, rows + 1):
        tracker.log_step(make_record(step))
    tracker.log_checkpoint({"name": "step-000004", "path": "/x/step-000004", "step": 4, "bytes": 2048})
    ended(tracker)
    assert not run_dir.tracking_id.exists()
    where, told = sync(run_dir)
    assert (told.steps, told.checkpoints) == (rows, 1)
    assert where.endswith("mlflow.db")
    run = found(client, run_dir)
    assert run.info.run_id == told.run_id
    assert [step for step, _ in history(client, run, "loss")] == list(range(1, rows + 1))
    assert run.info.status == "FINISHED"
    again = sync(run_dir)[1]
    assert (again.run_id, again.steps, again.checkpoints) == (told.run_id, 0, 0)
    assert history(client, run, "checkpoint_bytes") == [(4, 2048.0)]


def test_another_store_gets_a_run_of_its_own_and_the_first_keeps_its(run_dir, tmp_path, warnings):
    tracker = started(run_dir, warnings, mlflow=False)
    tracker.log_step(make_record(1))
    ended(tracker)
    first, other = sync(run_dir)[1], sync(run_dir, uri=f"sqlite:///{tmp_path}/other.db")[1]
    assert other.steps == 1
    assert other.run_id != first.run_id
    assert sync(run_dir)[1].run_id == first.run_id


def test_a_checkpoint_is_an_artifact_and_its_numbers_are_metrics(run_dir, client, warnings):
    tracker = started(run_dir, warnings)
    saved = {"path": "/runs/x/checkpoints/step-000004", "step": 4, "bytes": 2048, "stall_seconds": 0.25, "sha256": "ab"}
    tracker.log_checkpoint({"name": "step-000004", **saved})
    ended(tracker)
    run = found(client, run_dir)
    assert run.data.metrics == {"checkpoint_bytes": 2048.0, "checkpoint_stall_seconds": 0.25}
    assert history(client, run, "checkpoint_bytes") == [(4, 2048.0)]
    assert client.list_artifacts(run.info.run_id, "checkpoints")[0].path == "checkpoints/step-000004.json"
    file = client.download_artifacts(run.info.run_id, "checkpoints/step-000004.json")
    assert json.loads(Path(file).read_text()) == saved
    assert warnings == []


@pytest.mark.parametrize(
    ("upload", "expected"), [("none", []), ("last", ["step-000004"]), ("all", ["step-000002", "step-000004"])]
)
def test_checkpoints_are_uploaded_as_asked(run_dir, client, warnings, upload, expected):
    tracker = started(run_dir, warnings, upload_checkpoints=upload)
    for step in (2, 4):
        folder = run_dir.checkpoints / f"step-{step:06d}"
        (folder / "deepspeed").mkdir(parents=True)
        (folder / "deepspeed" / "weights.pt").write_bytes(bytes(step))
        (folder / "checkpoint.json").write_text("{}")
        tracker.log_checkpoint({"name": folder.name, "path": str(folder), "step": step, "bytes": step})
    ended(tracker)
    run = found(client, run_dir)
    there = [item.path for item in client.list_artifacts(run.info.run_id, "checkpoints") if item.is_dir]
    assert there == [f"checkpoints/{name}" for name in expected]
    for name in expected:
        files = client.list_artifacts(run.info.run_id, f"checkpoints/{name}/deepspeed")
        assert [(file.path, file.file_size) for file in files] == [
            (f"checkpoints/{name}/deepspeed/weights.pt", int(name[-1]))
        ]
    assert warnings == []


def test_an_exported_folder_becomes_versions_of_a_registered_model(run_dir, client, tmp_path, warnings):
    from pipeline.metrics.sync import register

    ended(started(run_dir, warnings, mlflow=False))
    (tmp_path / "config.json").write_text("{}")
    assert [register(run_dir, tmp_path, name="tiny-code") for _ in range(2)] == ["1", "2"]
    version = client.get_model_version("tiny-code", "2")
    assert version.run_id == found(client, run_dir).info.run_id
    assert version.source.endswith("/artifacts/model")
    files = client.list_artifacts(version.run_id, "model")
    assert [file.path for file in files] == ["model/config.json"]


def test_params_beyond_mlflows_limits_are_split_not_lost(run_dir, client, warnings):
    long = "a" * MAX_PARAM + "b"
    many = {f"key{i}": i for i in range(230)}
    odd = {"uri": "http://me:secret@host", "long": long, "empty": "", "odd$name": 1, "x" * 300 + "end": 1}
    run_dir.plan.write_text(json.dumps(odd | many))
    ended(started(run_dir, warnings))
    params = found(client, run_dir).data.params
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
    tracker = started(RunDir(tmp_path), [], mlflow=False)
    tracker.log_step(make_record(1))
    ended(tracker)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "events.jsonl"}
    other = RunDir(tmp_path / "rank1")
    other.path.mkdir()
    idle = open_tracker(other, tracking(), experiment="tiny", rank=1)
    idle.log_start(START)
    idle.log_step(make_record(1))
    ended(idle)
    assert list(other.path.iterdir()) == []


def test_a_job_writes_no_sqlite_and_says_how_to_get_the_run_into_mlflow(run_dir, warnings, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    for uri in (None, "sqlite:////shared/mlflow.db"):
        assert live_store(tracking(uri=uri), run_dir, warn=warnings.append) is None
    assert len(warnings) == 2 and f"alst track sync {run_dir.path.name}" in warnings[0]
    assert live_store(tracking(uri="http://server:5000"), run_dir, warn=warnings.append) is not None


def test_the_environment_is_told_without_secrets_and_without_what_is_nobodys_business(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "canary")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "canary")
    for name in ("LOVE_LETTER", "SLURM_JWT", "MLFLOW_TRACKING_AUTH", "MLFLOW_TRACKING_USERNAME", "HF_APIKEY", "DS_PAT"):
        monkeypatch.setenv(name, "canary")
    (tmp_path / "secrets").write_text("# mine\nHF_FAVOURITE=canary\n")
    monkeypatch.setenv("ALST_SECRETS", str(tmp_path / "secrets"))
    monkeypatch.setenv("HF_FAVOURITE", "canary")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:canary@host")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    told = environment_found()
    assert "canary" not in json.dumps(told)
    assert told["variables"]["NCCL_DEBUG"] == "INFO"
    assert told["variables"]["MLFLOW_TRACKING_URI"] == "http://***@host"
    assert told["packages"].keys() >= {"torch", "deepspeed", "mlflow"}


# MLflow fails. A real server that goes away stands in tests/multiprocess/test_tracking.py.


class Unwilling(Mirror):
    """Fails as often as it is told to, and hangs as long."""

    failures, hang = 0, threading.Event()

    def tell(self) -> None:
        self.hang.wait()
        if self.failures:
            self.failures -= 1
            raise ConnectionError("no route to http://me:secret@host/api\nand pages more")
        super().tell()


@pytest.fixture
def unwilling(run_dir, runs):
    mirror = Unwilling(run_dir, mlflow_store(None, runs), experiment="tiny")
    mirror.hang = threading.Event()
    return mirror


def tracker_of(mirror: Mirror, run_dir: RunDir, warnings: list) -> Tracker:
    from pipeline.metrics.rows import JsonlWriter

    live = LiveMirror(mirror, warn=warnings.append)
    writers = {"steps": JsonlWriter(run_dir.metrics), "events": JsonlWriter(run_dir.events)}
    return Tracker(run_dir, live=live, warn=warnings.append, **writers)


def test_failures_are_told_once_an_outage_and_what_was_missed_is_told_later(run_dir, unwilling, client, warnings):
    unwilling.failures = 1
    unwilling.hang.set()
    tracker = tracker_of(unwilling, run_dir, warnings)
    tracker.log_start(START)
    for step in (1, 2, 3):
        tracker.log_step(make_record(step))
    ended(tracker)
    assert [step for step, _ in history(client, found(client, run_dir), "loss")] == [1, 2, 3]
    assert len(warnings) <= 1  # none if the thread came late, when all was there
    assert all("secret" not in warning and "pages" not in warning for warning in warnings)


def test_a_store_that_hangs_holds_up_no_step_and_not_the_end(run_dir, unwilling, warnings, monkeypatch):
    monkeypatch.setattr("pipeline.metrics.tracker.FINISH_SECONDS", 0.2)
    tracker = tracker_of(unwilling, run_dir, warnings)
    tracker.log_start(START)
    for step in (1, 2, 3):
        tracker.log_step(make_record(step))
    ended(tracker)  # returns, although the mirror does not
    assert [row["step"] for row in read_steps(run_dir.metrics)] == [1, 2, 3]
    assert warnings == [f"MLflow has not heard the end of this run; `alst track sync {run_dir.path.name}` tells it"]
    unwilling.hang.set()


def test_steps_whose_answer_got_lost_are_told_again_and_stand_there_once(run_dir, runs, client, warnings):
    tracker = started(run_dir, warnings, mlflow=False)
    for step in (1, 2):
        tracker.log_step(make_record(step))
    mirror = Mirror(run_dir, mlflow_store(None, runs), experiment="tiny")
    mirror._open()
    log_batch = mirror._client.log_batch

    def done_but_not_answered(*args, **kwargs):
        log_batch(*args, **kwargs)
        mirror._client.log_batch = log_batch
        raise ConnectionError("timed out")

    mirror._client.log_batch = done_but_not_answered
    with pytest.raises(ConnectionError):
        mirror.tell()
    assert history(client, found(client, run_dir), "loss") == [(1, 6.0), (2, 5.0)]
    mirror.tell()
    assert history(client, found(client, run_dir), "loss") == [(1, 6.0), (2, 5.0)]
    mirror.close()


def test_a_file_that_is_no_database_is_a_warning(tmp_path, warnings, capfd, monkeypatch):
    (tmp_path / "mlflow.db").write_bytes(b"not sqlite" * 500)
    run_dir = RunDir(tmp_path / "run")
    run_dir.path.mkdir()
    tracker = started(run_dir, warnings)
    deadline = time.monotonic() + 60
    while not warnings and time.monotonic() < deadline:
        time.sleep(0.05)
    monkeypatch.setattr("pipeline.metrics.tracker.FINISH_SECONDS", 0.1)
    ended(tracker)
    assert "not a database" in warnings[0] and "training goes on" in warnings[0]
    assert "alst track sync" in warnings[-1]
    assert capfd.readouterr().err == ""


def test_only_one_process_brings_a_run_into_mlflow_at_a_time(run_dir, runs, warnings):
    tracker = started(run_dir, warnings, mlflow=False)
    tracker.log_step(make_record(1))
    one, other = (Mirror(run_dir, mlflow_store(None, runs), experiment="tiny") for _ in range(2))
    one.tell()
    with pytest.raises(Exception, match="another process"):
        other.tell()
    one.close()
    other.tell()
    assert other.told.steps == 0


# where the store lies


@pytest.mark.parametrize("place", ["{tmp}/file/runs", "/proc/runs", "/proc"])
def test_a_store_that_cannot_be_written_is_a_user_error(tmp_path, place):
    (tmp_path / "file").write_text("in the way")
    folder = place.format(tmp=tmp_path)
    with pytest.raises(UserError, match=r"cannot be written .* tracking\.mlflow: false"):
        mlflow_store(f"sqlite:///{folder}/mlflow.db", tmp_path)


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
        redact("see postgresql://me:p@w@host/db and http://host/a@b?x=1&api_token=canary")
        == "see postgresql://***@host/db and http://host/a@b?x=1&api_token=***"
    )
