"""Signals to a train job: noted at once, acted upon between two steps; or the process leaves, where no step can end.

USR2 comes before the time limit, from whoever says `scancel --signal=USR2 JOB`, and at preemption where the cluster is
set so; TERM at preemption, from `scancel`, and when another rank has failed. What becomes of the job then is decided
outside, by `job.sh`: Python only leaves a mark that says why it wants to be started again.
Under proctrack/linuxproc a process in a container is signalled twice, by Slurm and by Apptainer; once is told.
"""

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType

from pipeline.plan.run_dir import RunDir

SIGNALS = (signal.SIGUSR2, signal.SIGTERM)

LEFT = 75
"""Exit code of a process that left its work to a later start: EX_TEMPFAIL of sysexits.h."""

PREEMPTED = "preempted"
"""What a mark says after SIGTERM. It may mean something else, so `job.sh` asks Slurm whether it is true."""

_first: dict[signal.Signals, float] = {}
"""When each signal first came; Unix seconds."""


def listen() -> None:
    """From here on signals are noted. First of all in a process: until then they end it.

    A thread hears of them too: Python's own handler waits for the main thread, and that may wait for a GPU for hours.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, _handle)
    threading.Thread(target=_hear, args=(reader,), name="signals", daemon=True).start()


def asked() -> bool:
    return bool(_first)


def terminated_at() -> float | None:
    """When SIGTERM came; Unix seconds."""
    return _first.get(signal.SIGTERM)


def was_warned() -> bool:
    """Both signals came, USR2 first."""
    warned, terminated = _first.get(signal.SIGUSR2), terminated_at()
    return warned is not None and terminated is not None and warned < terminated


def reason() -> str:
    """Why the job wants to be started again."""
    if terminated_at() is not None:
        return PREEMPTED
    return "asked to stop by SIGUSR2" if asked() else "the next step could not have ended before the job"


def leave_mark(run_dir: RunDir, why: str) -> None:
    """For the batch script, which waits outside for the tasks to end; nobody does where there is no Slurm.

    The first is the cause. Those that come after it leave because Slurm ends them as soon as one has left.
    """
    if job := os.environ.get("SLURM_JOB_ID"):
        with suppress(FileExistsError), run_dir.requeue_mark(job).open("x", encoding="utf-8") as mark:
            mark.write(f"{why}\n")


def _handle(number: int, _: FrameType | None) -> None:
    _note(signal.Signals(number))


def _hear(reader: int) -> None:
    while True:
        for number in os.read(reader, 64):
            if number in SIGNALS:
                _note(signal.Signals(number))


def _note(number: signal.Signals) -> None:
    now = time.time()
    if _first.setdefault(number, now) is now:  # atomic: both the handler and the thread come here
        os.write(1, f"asked to stop by {number.name}: after this step, if checkpoints are saved\n".encode())
