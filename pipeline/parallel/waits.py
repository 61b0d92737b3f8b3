"""What a rank's computation waits for inside forward and backward: other ranks, tensors that were offloaded.

On a GPU events on the computing stream say how long it stood still; on a CPU the call's own wall time does, because
exchange and copies run in it.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

Wait = Literal["communication", "offload_stall"]
WAITS: tuple[Wait, ...] = ("communication", "offload_stall")

_seconds: dict[Wait, float] = dict.fromkeys(WAITS, 0.0)
_events: list[tuple[Wait, Any, Any]] = []
"""What waited, and the events before and after it; times are asked for once the device is done."""


@contextmanager
def waiting(what: Wait) -> Iterator[None]:
    """Count the time of the block, as a context or as a decorator."""
    if torch.cuda.is_initialized():
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        yield
        after.record()
        _events.append((what, before, after))
        return
    start = time.perf_counter()
    yield
    _seconds[what] += time.perf_counter() - start


def take_waits() -> dict[Wait, float]:
    """Seconds waited since this was last asked. On a GPU to be asked once it is synchronised."""
    for what, before, after in _events:
        _seconds[what] += before.elapsed_time(after) / 1000
    taken = dict(_seconds)
    _events.clear()
    _seconds.update(dict.fromkeys(WAITS, 0.0))
    return taken
