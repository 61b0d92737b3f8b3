"""Someone who uses the cluster: a recipe, a folder of runs, and the command, as a person calls it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.metrics.rows import read_steps
from slurm.local_cluster import LocalCluster

ROOT = Path(__file__).resolve().parents[2]
WAIT_SECONDS = 900  # for a job of eight ranks: a minute on two free cores
RECIPE = f"""
base: {ROOT / "configs" / "tiny.yaml"}
name: job
model: {{config: {{vocab_size: 300}}}}
data:
  sources: [{{type: text, path: "python:stdlib", glob: "json/*.py", max_document_tokens: 700}}]
  tokenizer: {{vocab_size: 300, sample_mib: 1}}
  seq_len: 1024
memory: {{tiled_loss: {{tile_tokens: 100}}, tiled_mlp: {{tile_tokens: 300}}}}
train: {{steps: 8, self_check: null}}
checkpoint: {{every_steps: 1}}
evaluation: null
tracking: {{mlflow: false}}
"""


class User:
    """Someone with a recipe and a folder of runs, on the login node of a cluster."""

    def __init__(self, folder: Path, cluster: LocalCluster) -> None:
        self.folder, self.cluster = folder, cluster
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(RECIPE)

    def alst(self, *arguments: str, code: int = 0, **variables: str) -> str:
        """What the command printed; it must end with `code`."""
        process = self.start(*arguments, **variables)
        try:
            printed, _ = process.communicate(timeout=WAIT_SECONDS)
        finally:
            process.kill()
        assert process.returncode == code, printed[-4000:]
        return printed

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """The command, as it runs."""
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "pipeline.cli", *arguments],
            env=os.environ
            | self.cluster.environment
            | {"ALST_RUNS": str(self.folder / "runs"), "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
            | variables,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def submit(self, *arguments: str, cluster: str = "throw-away", **variables: str) -> Path:
        """The run folder of what was submitted now."""
        return run_in(self.alst("submit", str(self.recipe), "--cluster", cluster, *arguments, **variables))

    def train_here(self, *overrides: str) -> list[float]:
        """The losses of the recipe on this machine, without Slurm."""
        return losses(run_in(self.alst("train", str(self.recipe), *overrides)))

    def state(self, job: str) -> str:
        """As the accounting has it, once it knows that the job has ended: it learns of it behind the queue."""
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            state = self.cluster.ask("sacct", "-X", "-n", "-P", "-j", job, "-o", "State").strip()
            if state and not {"RUNNING", "PENDING", "REQUEUED"} & set(state.split()):
                return state
            assert time.monotonic() < deadline, f"job {job}: {state!r}"
            time.sleep(0.2)

    def wait(self, what: Callable[[], bool], run: Path) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not what():
            assert time.monotonic() < deadline, told(run)
            time.sleep(0.2)

    def wait_for_end(self, run: Path) -> None:
        self.wait(lambda: self.cluster.ask("squeue", "-h", "-j", ",".join(jobs(run).values())) == "", run)


def run_in(printed: str) -> Path:
    """The run folder that a command named."""
    (line,) = (line for line in printed.splitlines() if line.startswith("run folder: "))
    return Path(line.removeprefix("run folder: "))


def jobs(run: Path) -> dict[str, str]:
    """The newest job's id by stage."""
    return {job["stage"]: job["id"] for job in json.loads((run / "slurm" / "jobs.json").read_text())["jobs"]}


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_steps(run / "metrics.jsonl")] if (run / "metrics.jsonl").exists() else []


def told(run: Path) -> str:
    """The end of everything a run's jobs printed."""
    files = [*run.glob("slurm/*.err"), *run.glob("slurm/*.out"), *run.glob("logs/*/*/*.log")]
    return "\n".join(f"{file}:\n{file.read_text(errors='replace')[-1500:]}" for file in files)
