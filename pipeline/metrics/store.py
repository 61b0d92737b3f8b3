"""Where MLflow keeps the runs of a folder of runs, and what its client needs to know before it is asked."""

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError

ENVIRONMENT = {
    # name: value set unless the user has set one            why
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # our own retries come later, and forget nothing
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",  # seconds; a thread waits, no step does. Its own is 120
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # between the lines of steps
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}


@dataclass(frozen=True)
class MlflowStore:
    """Where MLflow keeps runs, and where the artifacts of a new experiment go (None: the server decides)."""

    uri: str
    artifact_location: str | None

    @property
    def told(self) -> str:
        """The URI as it may be shown."""
        return redact(self.uri)


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
    """Hide the user and password of any URL in a text, and what its query calls a secret."""
    hidden = re.sub(r"(?<=://)[^/\s]+@", "***@", text)
    return re.sub(r"([?&][^=&\s]*(?:token|secret|password|key)[^=&\s]*=)[^&\s]+", r"\1***", hidden, flags=re.IGNORECASE)


def set_environment() -> None:
    """What MLflow's client is to do, where the user has not said so already."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


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
