"""What a running job may be asked for, and what it knows of the queue that it came from."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum


class Request(IntEnum):
    """What is to happen once the step under way has ended. Of several, the largest is done."""

    NOTHING = 0
    SAVE = 1
    REQUEUE = 2
    """Save and end, to be started again."""
    STOP = 3
    """Save and end, until somebody resumes the run."""


@dataclass(frozen=True)
class Queue:
    """The queue, as a rank sees it; the default is that of a process which no queue has started."""

    asked_to_requeue: Callable[[], bool] = lambda: False
    """By a signal."""
    seconds_left: Callable[[], float | None] = lambda: None
    """Until the process will be killed; None if nothing is known of that."""
    terminated: Callable[[], bool] = lambda: False
    """SIGTERM was among the signals: it is to go as soon as it can."""
    least_bus_bytes_per_second: float | None = None
    """Of an all-reduce between the ranks it gave; None if it is not looked at."""
    leave: Callable[[str, bool], None] = lambda why, again: None
    """End this process at once, with the reason, whatever its main thread does; `again`: the job is to be started again
    from its newest checkpoint."""
