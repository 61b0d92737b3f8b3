"""A signal stops a job between two steps, and the batch script, which alone can, puts it back into the queue.

Python only notes the signal here; the ranks agree on it at the end of a step, save, and leave a mark in the run folder.
Under proctrack/linuxproc a process in a container is signalled twice, by Slurm and by Apptainer; once is told.
"""

import os
import shlex
import signal
import time
from types import FrameType

from pipeline.plan.run_dir import RunDir

SIGNAL = signal.SIGUSR2
"""What submitit asks Slurm to send before the time limit; and anyone may: `scancel --signal=USR2 JOB`."""

_asked_at: list[float] = []
"""When this process was first asked to stop; Unix seconds."""


def listen() -> None:
    """From here on the signal is noted. First of all in a process: until then it ends it."""
    signal.signal(SIGNAL, _note)


def asked() -> bool:
    return bool(_asked_at)


def leave_mark(run_dir: RunDir) -> None:
    """For the batch script, which waits outside for the tasks to end."""
    run_dir.requeue_mark(os.environ.get("SLURM_JOB_ID", "local")).touch()


def requeue_lines(run_dir: RunDir) -> tuple[str, ...]:
    """Of the batch script, behind its tasks, whose exit code stays the job's. There is no scontrol in a container."""
    mark = shlex.quote(str(run_dir.requeue_mark(""))) + '"$SLURM_JOB_ID"'
    again = f'rm {mark}; scontrol requeue "$SLURM_JOB_ID" || code=1'  # a job that cannot go on has failed
    return ("code=$?", f"if [ -e {mark} ]; then {again}; fi", 'exit "$code"')


def _note(number: int, _: FrameType | None) -> None:
    if not _asked_at:
        _asked_at.append(time.time())
        os.write(
            1, f"asked to stop by {signal.Signals(number).name}: after this step, if checkpoints are saved\n".encode()
        )
