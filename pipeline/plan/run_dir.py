"""The run folder: one owner of every path in it. It alone suffices to understand or restart a run."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.plan.job import JobPlan
from pipeline.recipe.load import dump


def runs_root() -> Path:
    """Where runs, their MLflow store and packed data sets lie: $ALST_RUNS, else ./runs."""
    return Path(os.environ.get("ALST_RUNS") or "runs").resolve()


def packed_dir(plan: JobPlan) -> Path:
    """The packed data set of a plan; recipes that ask for the same bytes share it."""
    return runs_root() / "packed" / plan.packing_key


@dataclass(frozen=True)
class RunDir:
    """The paths of one run."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def code(self) -> Path:
        return self.path / "code"

    @property
    def commit(self) -> Path:
        return self.path / "commit.txt"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def plot(self) -> Path:
        return self.path / "training.png"

    def nan_record(self, step: int) -> Path:
        """What is known of a step, counted from 1, whose loss or gradient was not finite."""
        return self.path / "nan" / f"step-{step}.json"

    def logs(self, *, job: str, restart: int = 0) -> Path:
        """Of one job's start: `rank<k>.log` per rank."""
        return self.path / "logs" / job / str(restart)


def create_run_dir(plan: JobPlan) -> RunDir:
    """A new folder `<runs>/<name>-<time>` with the resolved recipe and the plan in it.

    Raises UserError if it cannot be written.
    """
    root = runs_root()
    stamp = f"{plan.recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        run_dir = RunDir(_new_folder(root, stamp))
        run_dir.recipe.write_text(dump(plan.recipe), encoding="utf-8")
        run_dir.plan.write_text(json.dumps(plan.to_json(), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{root}: {error.strerror}; set ALST_RUNS to a folder that can be written") from None
    return run_dir


def _new_folder(root: Path, stamp: str) -> Path:
    """`root/stamp`, with -2, -3, … if runs start in the same second."""
    number = 1
    while True:
        folder = root / (stamp if number == 1 else f"{stamp}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
