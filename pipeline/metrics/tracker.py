"""Where the numbers of a run go: metrics.jsonl in the run folder always, MLflow when asked for. Rank 0 writes.

The run folder is the truth and must be written; MLflow is a view of it, and no failure of MLflow ends a run.
This is the only file that imports mlflow, and only once tracking is wanted.
"""

import dataclasses
import json
import logging
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import DataError, UserError
from pipeline.metrics.console import warn as warn_on_console
from pipeline.metrics.meter import StepRecord

METRICS_FILE = "metrics.jsonl"
RUN_ID_FILE = "mlflow_run_id"
NOT_METRICS = ("step", "time")  # MLflow keeps these as the axes of every metric

# MLflow's own limits (its utils/validation.py).
MAX_KEY = 250
MAX_PARAM = 6000
MAX_TAG = 8000
PARAMS_PER_CALL = 100

RETRY_SECONDS = 60.0  # after a failure MLflow is left alone this long, so that a dead server costs a step in many

ENVIRONMENT = {
    # name: value set unless the user has set one            why
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # MLflow's own 7 with back-off block for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "3",  # seconds; its own is 120
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
Warn = Callable[[str], None]


@dataclass(frozen=True)
class MlflowStore:
    """Where MLflow keeps runs, and where the artifacts of a new experiment go (None: the server decides)."""

    uri: str
    artifact_location: str | None


class JsonlWriter:
    """Appends a step per line. A line is handed to the kernel whole, so a killed process leaves whole lines.

    What a full disk does not take is kept, and written with a later line.
    """

    def __init__(self, path: Path, *, warn: Warn = warn_on_console) -> None:
        _drop_torn_line(path)
        self._file = path.open("ab", buffering=0)
        self._pending = b""
        self._warn = warn

    def write(self, record: StepRecord) -> None:
        """Append one object; a number that is not finite becomes null, which every JSON reader takes."""
        row = {name: _finite(value) for name, value in dataclasses.asdict(record).items()}
        waiting = bool(self._pending)
        self._pending += json.dumps(row, allow_nan=False).encode() + b"\n"
        error = self._write_pending()
        if error is not None and not waiting:
            self._warn(f"{self._file.name}: {error.strerror}; steps are kept in memory until there is room")

    def close(self) -> None:
        if (error := self._write_pending()) is not None:
            self._warn(f"{self._file.name}: {error.strerror}; the last {self._pending.count(10)} steps are not in it")
        self._file.close()

    def _write_pending(self) -> OSError | None:
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) or 0 :]
        except OSError as error:
            return error
        return None


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics.jsonl in the order written; a last line without its end is left out."""
    if not path.is_file():
        raise DataError(f"{path} is not there; a run writes it with its first step, so name a run folder that has one")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return
            yield _parse_row(path, number, line)


def _parse_row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise DataError(
            f"{path}, line {number}: {line[:60]!r} is not a JSON object; each line holds one step, so remove that line"
        )
    return row


def read_steps(path: Path) -> list[dict[str, Any]]:
    """One row per step, in order; of a step done again after a restart, the last."""
    by_step = {row["step"]: row for row in read_metrics(path)}
    return [by_step[step] for step in sorted(by_step)]


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


class MlflowWriter:
    """One MLflow run. After a failure it warns, keeps quiet for `RETRY_SECONDS` and then tries again."""

    def __init__(
        self, client: Any, run_id: str, *, known_params: Mapping[str, str], warn: Warn, steps_told: int = 0
    ) -> None:
        self.run_id = run_id
        self._steps_told = steps_told  # by earlier starts: a step that is done again is not told twice
        self._client = client
        self._known_params = known_params
        self._warn = warn
        self._warned: set[str] = set()
        self._quiet_until = -math.inf

    def log_start(self, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Parameters and tags. MLflow's parameters cannot change: of a restarted run, changes go to a tag."""
        from mlflow.entities import Param, RunTag

        wanted = _params(params)
        changed = {key: value for key, value in wanted.items() if self._known_params.get(key, value) != value}
        new = [Param(key, value) for key, value in wanted.items() if key not in self._known_params]
        tags = {key: redact(value) for key, value in tags.items()}
        if changed:
            tags["parameters_changed"] = "; ".join(f"{k}: {self._known_params[k]} -> {v}" for k, v in changed.items())
        with self._never_fatal("parameters are missing there"):
            run_tags = [RunTag(_key(key), value[:MAX_TAG]) for key, value in tags.items()]
            self._client.log_batch(self.run_id, tags=run_tags)
            for start in range(0, len(new), PARAMS_PER_CALL):
                self._client.log_batch(self.run_id, params=new[start : start + PARAMS_PER_CALL])

    def log_step(self, record: StepRecord) -> None:
        if self._is_quiet() or record.step <= self._steps_told:
            return
        from mlflow.entities import Metric

        values = {name: value for name, value in dataclasses.asdict(record).items() if name not in NOT_METRICS}
        milliseconds = round(record.time * 1000)
        metrics = [Metric(k, float(v), milliseconds, record.step) for k, v in values.items() if v is not None]
        with self._never_fatal("steps are missing there"):
            self._client.log_batch(self.run_id, metrics=metrics)

    def log_artifact(self, path: Path) -> None:
        if self._is_quiet():
            return
        with self._never_fatal(f"{path.name} is missing there"):
            self._client.log_artifact(self.run_id, str(path))

    def log_checkpoint(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        """`checkpoints/<name>.json` with all values; those that are numbers are also metrics `checkpoint_<value>`."""
        if self._is_quiet():
            return
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        metrics = [Metric(f"checkpoint_{key}", float(value), now, step) for key, value in numbers.items()]
        with self._never_fatal(f"checkpoint {name} is missing there"):
            self._client.log_batch(self.run_id, metrics=metrics)
            self._client.log_dict(self.run_id, dict(values), f"checkpoints/{name}.json")

    def finish(self, status: RunStatus) -> None:
        """Close the run; tried even when MLflow was failing, because nothing waits behind it."""
        with self._never_fatal(f"the run is not marked {status} there"):
            self._client.set_terminated(self.run_id, status=status)

    def _is_quiet(self) -> bool:
        return time.monotonic() < self._quiet_until

    @contextmanager
    def _never_fatal(self, consequence: str) -> Iterator[None]:
        """Turn any failure of MLflow, of its server or of the disk below into one warning."""
        try:
            with _hushed():
                yield
        except Exception as error:  # whatever MLflow raises: days of training are worth more than its view of them
            self._quiet_until = time.monotonic() + RETRY_SECONDS
            if consequence not in self._warned:
                self._warned.add(consequence)
                self._warn(_failure(consequence, error))


class Tracker:
    """The one place the train loop reports to; without writers (ranks other than 0) it does nothing."""

    def __init__(self, jsonl: JsonlWriter | None = None, mlflow: MlflowWriter | None = None) -> None:
        self._jsonl = jsonl
        self._mlflow = mlflow

    @property
    def mlflow_run_id(self) -> str | None:
        """None when MLflow is off or could not be opened."""
        return None if self._mlflow is None else self._mlflow.run_id

    def log_start(self, params: Mapping[str, Any], tags: Mapping[str, str], artifacts: Sequence[Path] = ()) -> None:
        """Log what the run is: parameters (maps may be nested), tags and files."""
        if self._mlflow is not None:
            self._mlflow.log_start(params, tags)
        for path in artifacts:
            self.log_artifact(path)

    def log_step(self, record: StepRecord) -> None:
        if self._jsonl is not None:
            self._jsonl.write(record)
        if self._mlflow is not None:
            self._mlflow.log_step(record)

    def log_artifact(self, path: Path) -> None:
        if self._mlflow is not None:
            self._mlflow.log_artifact(path)

    def log_checkpoint(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        """A checkpoint that is on disk: where, how large, what it cost."""
        if self._mlflow is not None:
            self._mlflow.log_checkpoint(name, step, values)

    def finish(self, status: RunStatus) -> None:
        if self._jsonl is not None:
            self._jsonl.close()
        if self._mlflow is not None:
            self._mlflow.finish(status)


def open_tracker(
    run_dir: Path,
    *,
    experiment: str,
    run_name: str | None = None,
    uri: str | None = None,
    enabled: bool = True,
    rank: int = 0,
    runs: Path | None = None,
    warn: Warn = warn_on_console,
) -> Tracker:
    """Open metrics.jsonl and, when `enabled`, the MLflow run of this run folder; ranks other than 0 get an idle one.

    `uri` None is sqlite in `runs` (by default the folder around `run_dir`). A store that cannot be written is a
    UserError; a server that does not answer is a warning, and the run goes on without MLflow.
    """
    if rank != 0:
        return Tracker()
    store = mlflow_store(uri, runs or run_dir.resolve().parent) if enabled else None
    jsonl = JsonlWriter(run_dir / METRICS_FILE)
    if store is None:
        return Tracker(jsonl)
    try:
        mlflow = _open_mlflow(store, run_dir, experiment, run_name or run_dir.name, warn)
    except Exception as error:  # as in MlflowWriter._never_fatal
        warn(_failure("this run is not in MLflow", error))
        return Tracker(jsonl)
    return Tracker(jsonl, mlflow)


def mlflow_store(uri: str | None, runs: Path) -> MlflowStore:
    """Resolve the tracking URI; the folder of a sqlite file is created, and artifacts go beside it."""
    runs = runs.resolve()
    if uri is None:
        uri = f"sqlite:///{runs / 'mlflow.db'}"
    scheme, _, rest = uri.partition("://")
    if scheme in ("http", "https") or scheme.startswith("databricks"):
        return MlflowStore(uri, artifact_location=None)
    if scheme != "sqlite":
        return MlflowStore(uri, artifact_location=(runs / "mlartifacts").as_uri())
    if not rest.startswith("/") or rest == "/":
        raise UserError(f"tracking.uri={uri} names no file; write sqlite:///relative.db or sqlite:////absolute.db")
    file, question, options = rest[1:].partition("?")
    database = Path(file).resolve()
    _require_writable(database)
    return MlflowStore(
        f"sqlite:///{database}{question}{options}", artifact_location=(database.parent / "mlartifacts").as_uri()
    )


def redact(text: str) -> str:
    """Hide the user and password of any URL in a text."""
    return re.sub(r"(?<=://)[^/@\s]+@", "***@", text)


def _open_mlflow(store: MlflowStore, run_dir: Path, experiment: str, run_name: str, warn: Warn) -> MlflowWriter:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient  # before hushing: the import sets its loggers' levels

    with _hushed():
        client = MlflowClient(tracking_uri=store.uri)
        run = _resume_run(client, run_dir / RUN_ID_FILE)
        if run is None:
            run = client.create_run(_experiment_id(client, experiment, store.artifact_location), run_name=run_name)
            _write_run_id(run_dir / RUN_ID_FILE, run.info.run_id)
        told = max((metric.step for metric in client.get_metric_history(run.info.run_id, "loss")), default=0)
    return MlflowWriter(client, run.info.run_id, known_params=run.data.params, warn=warn, steps_told=told)


def _resume_run(client: Any, run_id_file: Path) -> Any:
    """The run that an earlier start of this run folder made, set running again; None when there is none."""
    from mlflow.exceptions import MlflowException

    if not run_id_file.is_file():
        return None
    run_id = run_id_file.read_text().strip()
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None  # another store, or the run is gone: a new run, rather than none
    if run.info.lifecycle_stage != "active":
        return None
    client.update_run(run_id, status="RUNNING")
    return run


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


def _require_writable(database: Path) -> None:
    """Try it: permission bits say nothing on a read-only mount, and nothing to root."""
    remedy = "choose another tracking.uri, or set tracking.mlflow: false"
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=database.parent):
            pass
        if database.exists():
            database.open("r+b").close()
    except OSError as error:
        raise UserError(
            f"MLflow's store {database} cannot be written ({error.strerror}); sqlite needs to write the file and its "
            f"folder: {remedy}"
        ) from error


def _write_run_id(path: Path, run_id: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(run_id + "\n")
    partial.replace(path)


def _drop_torn_line(path: Path) -> None:
    """Cut off what a killed writer left behind the last whole line, so that the next row starts on its own."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _failure(consequence: str, error: Exception) -> str:
    """Whose failure, what it costs, and the first line of why: MLflow's messages run to pages and hold URLs."""
    reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
    return f"MLflow: {consequence}; training goes on and {METRICS_FILE} has every step ({redact(reason)})"


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
