"""A plan on this machine: one process per rank, the same stages a job would run."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pipeline.errors import RunError, UserError
from pipeline.launch.entry import Stage
from pipeline.launch.screen import Screen
from pipeline.plan.environment import applied, environment
from pipeline.plan.job import JobPlan
from pipeline.plan.run_dir import RunDir

POLL_SECONDS = 0.1
GRACE_SECONDS = 10  # between SIGTERM and SIGKILL: long enough to close a log, short enough to wait for
TAIL_LINES = 20


@dataclass(frozen=True)
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    log: Path


def run_local(plan: JobPlan, run_dir: RunDir) -> None:
    """Pack what is not packed yet, then train. Raises UserError or RunError naming the first rank that failed."""
    check_one_node(plan)
    run_ranks(plan, run_dir, stage="pack", ranks=1)
    run_ranks(plan, run_dir, stage="train", ranks=plan.world_size)


def check_one_node(plan: JobPlan) -> None:
    """Raises UserError if the plan is for more than this machine."""
    if plan.nodes != 1:
        raise UserError(
            f"hardware.nodes = {plan.nodes}: this machine is one node; set hardware.nodes=1, or submit to a cluster"
        )


def run_ranks(plan: JobPlan, run_dir: RunDir, *, stage: Stage, ranks: int) -> None:
    """Run `ranks` processes of a stage to their end; when one fails, end the others."""
    logs = run_dir.new_logs(job=f"local-{stage}")
    cpus_per_rank = max(1, len(os.sched_getaffinity(0)) // ranks)
    shared = applied(environment(plan, cpus_per_rank=cpus_per_rank))
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(ranks)}
    with _started(run_dir, stage, ranks, shared, logs) as started:
        failed = _first_to_fail(started)
    if failed is not None:
        _raise(failed, stage)


@contextmanager
def _started(run_dir: RunDir, stage: Stage, ranks: int, shared: dict[str, str], logs: Path) -> Iterator[list[_Rank]]:
    """The ranks' processes; whatever happens, none is left when the block ends."""
    # -P: the folder it is called from may hold a `pipeline` of its own.
    command = [sys.executable, "-P", "-m", "pipeline.cli", "run", str(run_dir.plan), "--stage", stage]
    before = signal.signal(signal.SIGTERM, _leave)
    started: list[_Rank] = []
    copiers: list[threading.Thread] = []
    try:
        for number in range(ranks):
            log = logs / f"rank{number}.log"
            env = shared | {"RANK": str(number), "LOCAL_RANK": str(number)}
            if number == 0:
                process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                copiers.append(_copy_to_console(process.stdout, log))
            else:
                with log.open("wb") as file:
                    process = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)
            started.append(_Rank(number, process, log))
        yield started
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut this short
        _end(started)
        for copier in copiers:
            copier.join(timeout=GRACE_SECONDS)
        signal.signal(signal.SIGTERM, before)


def _leave(number: int, _: object) -> None:
    """SIGTERM's default would end this process at once and leave the ranks."""
    raise SystemExit(128 + number)


def _copy_to_console(pipe: IO[bytes] | None, log: Path) -> threading.Thread:
    """Rank 0 is heard on the console as well as in its log."""
    assert pipe is not None

    def copy() -> None:
        with log.open("wb") as file, Screen() as screen:
            for line in iter(pipe.readline, b""):
                with suppress(OSError):  # a full disk: the console still has it, and rank 0 must not wait for this pipe
                    file.write(line)
                    file.flush()
                screen.show(line.decode(errors="replace"))

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    return thread


def _first_to_fail(ranks: list[_Rank]) -> _Rank | None:
    """Wait for all to end well (None), or for the first that does not.

    A rank ended by a signal comes first: that the others lost their connection to it is what follows.
    """
    while True:
        codes = [rank.process.poll() for rank in ranks]
        failed = [(code, rank) for rank, code in zip(ranks, codes, strict=True) if code not in (None, 0)]
        if failed:
            return next((rank for code, rank in failed if code < 0), failed[0][1])
        if all(code == 0 for code in codes):
            return None
        time.sleep(POLL_SECONDS)


def _end(ranks: list[_Rank]) -> None:
    """End what still runs: politely, then not."""
    running = [rank.process for rank in ranks if rank.process.poll() is None]
    for process in running:
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in running:
        try:
            process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _raise(failed: _Rank, stage: Stage) -> None:
    code = failed.process.returncode
    if code == UserError.exit_code and failed.number == 0:
        raise UserError(f"{stage} stopped; the reason is above, and in {failed.log}")
    how = f"was ended by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
    tail = failed.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    text = "\n".join(f"  | {line}" for line in tail)
    message = f"{stage}: rank {failed.number} {how}; the other ranks were ended. End of {failed.log}:\n{text}"
    raise UserError(message) if code == UserError.exit_code else RunError(message)


def _signal_name(number: int) -> str:
    """`SIGKILL`; `signal 36` for one without a name."""
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
