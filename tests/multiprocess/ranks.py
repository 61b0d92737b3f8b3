"""Start the ranks of a test as real processes, and end them whatever happens."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


ON_CPU = {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


def run_ranks(
    module: str, *args: str, ranks: int, timeout: float, logs: Path, variables: Mapping[str, str] = ON_CPU
) -> None:
    """`python -m module args` once per rank, with `variables` in its environment.

    Fails with the end of the first bad rank's log, or at the timeout.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = os.environ | {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **variables,
        "PYTHONWARNINGS": "ignore",
    }
    files = [logs / f"rank{rank}.log" for rank in range(ranks)]
    processes = []
    try:
        for rank, log in enumerate(files):
            with log.open("wb") as file:
                env = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                command = [sys.executable, "-m", module, *args]
                processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT))
        for process, log in zip(processes, files, strict=True):
            code = process.wait(timeout)
            assert code == 0, f"{log.stem} ended with {code}:\n{log.read_text(errors='replace')[-3000:]}"
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
