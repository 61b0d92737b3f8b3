"""Until when a task may run. The batch script asks Slurm (`job.sh`) and exports what it was told: in a container there
is nobody to ask."""

import os
import time

from pipeline.launch.stop import terminated_at, was_warned

JOB_END = "ALST_JOB_END"
"""Unix seconds; empty where the job has no time limit."""

GRACE_SECONDS = "ALST_GRACE_SECONDS"
"""From the signal of a preemption until Slurm kills."""

KILL_SECONDS = "ALST_KILL_SECONDS"
"""From a SIGTERM that follows USR2 until Slurm kills: the grace may have begun with that."""


def seconds_left() -> float | None:
    """Until Slurm kills this process, as far as that is known."""
    ends = []
    if end := os.environ.get(JOB_END):
        ends.append(float(end))
    asked = terminated_at()
    if asked is not None:
        ends.append(asked + float(os.environ.get(KILL_SECONDS if was_warned() else GRACE_SECONDS) or 0))
    return min(ends) - time.time() if ends else None
