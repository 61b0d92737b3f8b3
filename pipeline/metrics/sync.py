"""`alst track sync`: a run folder into MLflow, as far as it is not there. Also while the run goes on, and again."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pipeline.errors import AlstError, RunError, UserError
from pipeline.metrics.mirror import Mirror, Told
from pipeline.metrics.store import mlflow_store, redact
from pipeline.plan.job import read_plan
from pipeline.plan.run_dir import RunDir

T = TypeVar("T")


def sync(run_dir: RunDir, *, uri: str | None = None) -> tuple[str, Told]:
    """Where the run is in MLflow now, and what was told. `uri` is the recipe's unless given, or sqlite.

    Raises UserError without MLflow, RunError if it fails; what it took is there, and the next call goes on.
    """
    mirror = _mirror(run_dir, uri)
    _with_failures_told(mirror, mirror.tell)
    return mirror.store.told, mirror.told


def register(run_dir: RunDir, folder: Path, *, name: str, uri: str | None = None) -> str:
    """A folder of weights as the next version of a registered model, under the run. Returns the version.

    Raises as `sync`.
    """
    mirror = _mirror(run_dir, uri)
    return _with_failures_told(mirror, lambda: mirror.log_model(folder, name=name))


def _mirror(run_dir: RunDir, uri: str | None) -> Mirror:
    recipe = read_plan(run_dir.plan).recipe
    store = mlflow_store(uri or recipe.tracking.uri, run_dir.root)
    experiment = recipe.tracking.experiment or recipe.name
    return Mirror(run_dir, store, experiment=experiment, upload=recipe.tracking.upload_checkpoints)


def _with_failures_told(mirror: Mirror, work: Callable[[], T]) -> T:
    try:
        return work()
    except ImportError as error:
        raise UserError(f"mlflow is not installed ({error}); install alst-pipeline[train]") from None
    except AlstError:
        raise
    except Exception as error:  # whatever MLflow raises; its messages run to pages and hold URLs
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise RunError(f"MLflow at {mirror.store.told}: {redact(reason)}; call this again once it answers") from error
    finally:
        mirror.close()
