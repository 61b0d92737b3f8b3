"""A baseline on this machine: the product's packing, then one process per rank of `baselines.rank`.

    python -m benchmarks.baselines.launch reference RECIPE.yaml

Writes a run folder like `alst train`, with a metrics.jsonl of the same names. `alst bench` calls it.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from pipeline.errors import AlstError, RunError
from pipeline.launch.local import check_one_node, run_ranks
from pipeline.launch.snapshot import commit
from pipeline.plan.environment import applied, environment
from pipeline.plan.job import JobPlan, plan_job
from pipeline.plan.run_dir import RunDir, create_run_dir
from pipeline.recipe.load import load

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.1
TAIL_CHARACTERS = 3000


def run(kind: str, plan: JobPlan) -> RunDir:
    """Pack what is not packed yet, then train the baseline's way."""
    check_one_node(plan)
    run_dir = create_run_dir(plan)
    run_dir.commit.write_text(commit() + "\n")
    print(f"run folder: {run_dir.path}", flush=True)
    run_ranks(plan, run_dir, stage="pack", ranks=1)
    logs = run_dir.new_logs(job="local-train")
    started = [_start(kind, plan, run_dir, rank, port) for port in [_free_port()] for rank in range(plan.world_size)]
    try:
        _wait(started, logs)
    finally:
        for process in started:
            process.kill()
            process.wait()
    return run_dir


def _start(kind: str, plan: JobPlan, run_dir: RunDir, rank: int, port: int) -> subprocess.Popen[bytes]:
    cpus_per_rank = max(1, len(os.sched_getaffinity(0)) // plan.world_size)
    env = applied(environment(plan, cpus_per_rank=cpus_per_rank)) | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(plan.world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    command = [sys.executable, "-m", "benchmarks.baselines.rank", kind, str(run_dir.plan)]
    with _log(run_dir, rank).open("wb") as file:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)


def _log(run_dir: RunDir, rank: int) -> Path:
    return run_dir.logs(job="local-train") / f"rank{rank}.log"


def _wait(ranks: list[subprocess.Popen[bytes]], logs: Path) -> None:
    """Until all have ended well. Raises RunError with the end of the first bad rank's log."""
    while True:
        codes = [process.poll() for process in ranks]
        for rank, code in enumerate(codes):
            if code not in (None, 0):
                how = "was ended by SIGKILL" if code == -9 else f"ended with {code}"
                tail = (logs / f"rank{rank}.log").read_text(errors="replace")[-TAIL_CHARACTERS:]
                raise RunError(f"rank {rank} {how}:\n{tail}")
        if all(code == 0 for code in codes):
            return
        time.sleep(POLL_SECONDS)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def main() -> None:
    _, kind, recipe = sys.argv
    try:
        run(kind, plan_job(load(recipe)))
    except AlstError as error:
        print(f"alst: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
