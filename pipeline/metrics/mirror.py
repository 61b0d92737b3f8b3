"""A run folder's image in MLflow. What is there already MLflow itself is asked, so nothing is told twice: not by the
thread of a run that goes on, not by `alst track sync`, not after a failure in the middle.

This is the only file that imports mlflow, and only once tracking is wanted.
"""

import fcntl
import json
import logging
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from pipeline.errors import RunError
from pipeline.files import replaced
from pipeline.metrics.rows import Row, Tail
from pipeline.metrics.store import MlflowStore, redact, set_environment
from pipeline.plan.run_dir import RunDir

NOT_METRICS = ("step", "time")  # MLflow keeps these as the axes of every metric
RUN_TAG = "alst_run"
"""By its value, written into the run folder, a run is found in any store: also one whose making was not answered."""

ALWAYS_THERE = "step_seconds"
"""A metric of every step, by which MLflow tells how far it is: a step's metrics get there together or not at all."""

# MLflow's own limits (its utils/validation.py).
MAX_KEY = 250
MAX_PARAM = 6000
MAX_TAG = 8000
PARAMS_PER_CALL = 100
METRICS_PER_CALL = 1000

Upload = Literal["none", "last", "all"]


@dataclass
class Told:
    """What a mirror has told MLflow."""

    run_id: str = ""
    steps: int = 0
    checkpoints: int = 0
    uploads: int = 0


class Mirror:
    """Brings a run folder into MLflow, as far as it is not there. Of one run folder one mirror works at a time."""

    def __init__(self, run_dir: RunDir, store: MlflowStore, *, experiment: str, upload: Upload = "none") -> None:
        self.store = store
        self.told = Told()
        self._run_dir, self._experiment, self._upload = run_dir, experiment, upload
        self._steps, self._events = Tail(run_dir.metrics), Tail(run_dir.events)
        self._waiting: dict[int, Row] = {}
        """Steps to be told; of one that was done again, the last."""
        self._happened: list[Row] = []
        self._last_step = 0
        self._starts_told = 0
        self._checkpoints_there: set[str] = set()
        self._uploads_there: set[str] = set()
        self._artifacts_there: dict[Path, tuple[int, int]] = {}
        self._ended: Row | None = None
        self._client: Any = None
        self._lock: TextIO | None = None

    def tell(self) -> None:
        """Everything that is new, steps first. Raises whatever MLflow raises; what was not told is told next time."""
        with _hushed():
            self._happened += self._events.new()
            if self._client is None:
                self._open()
            self._tell_steps()
            self._tell_starts()
            self._tell_checkpoints()
            self._tell_end()
            self._tell_artifacts()
            self._upload_checkpoints()

    @property
    def is_uploading(self) -> bool:
        """A checkpoint is to be uploaded that is not there yet."""
        return bool(self._to_upload())

    def close(self) -> None:
        """Another mirror may work now."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def log_model(self, folder: Path, *, name: str) -> str:
        """The files in `folder` as the run's artifact `model`, and as the next version of the model `name` in
        MLflow's registry. Returns the version."""
        from mlflow.exceptions import MlflowException

        self.tell()
        with _hushed():
            self._client.log_artifacts(self.told.run_id, str(folder), "model")
            try:
                self._client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            source = f"{self._client.get_run(self.told.run_id).info.artifact_uri}/model"
            return str(self._client.create_model_version(name, source, self.told.run_id).version)

    def _open(self) -> None:
        set_environment()
        self._lock = self._lock or _locked(self._run_dir.mlflow_lock)
        from mlflow.tracking import MlflowClient

        with _hushed():  # the import sets its loggers' levels
            client = MlflowClient(tracking_uri=self.store.uri)
            run = self._found(client)
        self.told.run_id = run.info.run_id
        self._known_params: Mapping[str, str] = run.data.params
        history = client.get_metric_history(run.info.run_id, ALWAYS_THERE)
        self._last_step = max((metric.step for metric in history), default=0)
        artifacts = client.list_artifacts(run.info.run_id, "checkpoints")
        self._checkpoints_there = {Path(file.path).stem for file in artifacts if not file.is_dir}
        self._uploads_there = {
            Path(folder.path).name
            for folder in artifacts
            if folder.is_dir
            and any(f.path.endswith("/checkpoint.json") for f in client.list_artifacts(run.info.run_id, folder.path))
        }
        self._client = client

    def _found(self, client: Any) -> Any:
        """The run that stands for this folder in the store, made if there is none."""
        experiment = _experiment_id(client, self._experiment, self.store.artifact_location)
        token = _token(self._run_dir.tracking_id)
        found = client.search_runs([experiment], f"tags.{RUN_TAG} = '{token}'", max_results=1)
        if found:
            return found[0]
        began = next((_milliseconds(event) for event in self._happened), None)
        return client.create_run(experiment, start_time=began, tags={RUN_TAG: token}, run_name=self._run_dir.path.name)

    def _tell_steps(self) -> None:
        for row in self._steps.new():
            if row["step"] > self._last_step:  # a step that is done again after a restart is there already
                self._waiting[row["step"]] = row
        from mlflow.entities import Metric

        while self._waiting:
            steps: list[int] = []
            metrics: list[Any] = []
            for step in sorted(self._waiting):
                row = self._waiting[step]
                of_step = [
                    Metric(_key(name), float(value), _milliseconds(row), step)
                    for name, value in row.items()
                    if name not in NOT_METRICS and value is not None
                ]
                if steps and len(metrics) + len(of_step) > METRICS_PER_CALL:
                    break
                steps.append(step)
                metrics += of_step
            self._client.log_batch(self.told.run_id, metrics=metrics)
            for step in steps:
                del self._waiting[step]
            self._last_step = steps[-1]
            self.told.steps += len(steps)

    def _tell_starts(self) -> None:
        """Parameters, and tags of all starts. MLflow's parameters cannot change: what did goes to a tag."""
        starts = [event for event in self._happened if event["event"] == "start"]
        if self._starts_told == len(starts) > 0:
            return
        from mlflow.entities import Param, RunTag

        wanted = _params(json.loads(self._run_dir.plan.read_text(encoding="utf-8")))
        changed = {key: value for key, value in wanted.items() if self._known_params.get(key, value) != value}
        new = [Param(key, value) for key, value in wanted.items() if key not in self._known_params]
        tags = _tags(starts)
        if changed:
            tags["parameters_changed"] = "; ".join(f"{k}: {self._known_params[k]} -> {v}" for k, v in changed.items())
        run_tags = [RunTag(_key(key), redact(value)[:MAX_TAG]) for key, value in tags.items()]
        self._client.log_batch(self.told.run_id, tags=run_tags)
        for first in range(0, len(new), PARAMS_PER_CALL):
            self._client.log_batch(self.told.run_id, params=new[first : first + PARAMS_PER_CALL])
        self._known_params = {**wanted, **self._known_params}
        self._starts_told = len(starts)

    def _tell_checkpoints(self) -> None:
        """`checkpoints/<name>.json` with all values; those that are numbers are also metrics `checkpoint_<value>`."""
        from mlflow.entities import Metric

        for name, event in self._saved().items():
            if name in self._checkpoints_there:
                continue
            values = {key: value for key, value in event.items() if key not in ("event", "time", "name")}
            numbers = {key: value for key, value in values.items() if isinstance(value, int | float) and key != "step"}
            step, at = event["step"], _milliseconds(event)
            metrics = [Metric(f"checkpoint_{key}", float(value), at, step) for key, value in numbers.items()]
            self._client.log_batch(self.told.run_id, metrics=metrics)
            self._client.log_dict(self.told.run_id, values, f"checkpoints/{name}.json")
            self._checkpoints_there.add(name)
            self.told.checkpoints += 1

    def _saved(self) -> dict[str, Row]:
        """The checkpoints that there were, by name; of one that was saved again, the last."""
        return {event["name"]: event for event in self._happened if event["event"] == "checkpoint"}

    def _tell_end(self) -> None:
        """Whether the run goes on, and how it ended if it does not."""
        last = next((event for event in reversed(self._happened) if event["event"] in ("start", "end")), None)
        if last is None or last is self._ended:
            return
        if last["event"] == "end":
            self._client.set_terminated(self.told.run_id, status=last["status"], end_time=_milliseconds(last))
        else:
            self._client.update_run(self.told.run_id, status="RUNNING")
        self._ended = last

    def _tell_artifacts(self) -> None:
        """Files of the run folder that are new or other than they were."""
        folder = self._run_dir
        for path in (*folder.told_files, *sorted(folder.slurm.glob("*.sbatch"))):
            if not path.is_file():
                continue
            stat = path.stat()
            seen = (stat.st_mtime_ns, stat.st_size)
            if self._artifacts_there.get(path) != seen:
                below = None if path.parent == folder.path else path.parent.name
                self._client.log_artifact(self.told.run_id, str(path), below)
                self._artifacts_there[path] = seen

    def _to_upload(self) -> list[Path]:
        """Checkpoints that are to be in MLflow, are on disk, and are not there yet: all, or the last once it ended."""
        if self._upload == "none":
            return []
        saved = [Path(event["path"]) for event in self._saved().values()]
        if self._upload == "last":
            last = self._happened[-1] if self._happened else {}
            goes_on = last.get("event") != "end" or last["status"] == "KILLED"
            saved = [] if goes_on else saved[-1:]
        return [path for path in saved if path.name not in self._uploads_there and path.is_dir()]

    def _upload_checkpoints(self) -> None:
        """Between two files steps are told. `checkpoint.json` comes last: with it a checkpoint is whole there, too."""
        for folder in self._to_upload():
            files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "checkpoint.json")
            for path in (*files, folder / "checkpoint.json"):
                if not path.exists():
                    break  # a newer one took its place: it is not kept here either
                below = path.parent.relative_to(folder.parent)
                self._client.log_artifact(self.told.run_id, str(path), f"checkpoints/{below}")
                self._tell_steps()
            else:
                self.told.uploads += 1
            self._uploads_there.add(folder.name)


def _experiment_id(client: Any, name: str, artifact_location: str | None) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            # The kind opens the UI on charts of runs; without it MLflow 3 asks, or shows traces first.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            return str(client.create_experiment(name, artifact_location=artifact_location, tags=kind))
        except MlflowException:
            experiment = client.get_experiment_by_name(name)  # another run may have made it meanwhile
            if experiment is None:
                raise
    return str(experiment.experiment_id)


def _tags(starts: Sequence[Row]) -> dict[str, str]:
    """Of all starts of a run: the newest one's code and image, and the jobs there were."""
    if not starts:
        return {}
    tags = {
        "commit": starts[-1]["commit"],
        "image_digest": starts[-1]["image_digest"],
        "job_ids": ", ".join(dict.fromkeys(start["job"] for start in starts)),
        "hosts": ", ".join(dict.fromkeys(start["host"] for start in starts)),
        "restarts": len(starts) - 1,
    }
    return {name: str(value) for name, value in tags.items() if value is not None}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested maps to dotted names with text values: `{"zero": {"stage": 3}}` to `{"zero.stage": "3"}`.

    Lists that hold maps are counted into the name, other lists stay one JSON value.
    """
    flat: dict[str, str] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, prefix=f"{key}.")
        else:
            flat[key] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def _params(params: Mapping[str, Any]) -> dict[str, str]:
    """Flat parameters within MLflow's limits; a value that is too long is split into `name.part1`, `name.part2`, …"""
    fitting: dict[str, str] = {}
    for key, value in flatten(params).items():
        value = redact(value)
        parts = [value[start : start + MAX_PARAM] for start in range(0, len(value), MAX_PARAM)] or [""]
        names = [key] if len(parts) == 1 else [f"{key}.part{number}" for number in range(1, len(parts) + 1)]
        fitting |= {_key(name): part for name, part in zip(names, parts, strict=True)}
    return fitting


def _key(name: str) -> str:
    """A name MLflow takes; a long one keeps its end, which tells more than its beginning."""
    return re.sub(r"[^A-Za-z0-9_./: -]", "_", name)[-MAX_KEY:].lstrip("./")


def _milliseconds(row: Row) -> int:
    return round(row["time"] * 1000)


def _token(path: Path) -> str:
    """The run's own name for itself, made once."""
    if not path.is_file():
        with replaced(path) as temporary:
            temporary.write_text(uuid.uuid4().hex + "\n")
    return path.read_text().strip()


def _locked(path: Path) -> TextIO:
    """Raises RunError if another process mirrors the run now."""
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RunError(f"{path.parent}: another process brings it into MLflow now; wait for its end") from None
    except OSError:
        pass  # a disk without locks: some Lustre mounts
    return file


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep MLflow's log lines (a migration report, tracebacks, retries) off the console while one call lasts."""
    levels = {"mlflow": logging.CRITICAL, "alembic": logging.WARNING, "urllib3.connectionpool": logging.ERROR}
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
