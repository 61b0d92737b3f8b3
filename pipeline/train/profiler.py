"""One step of rank 0 under torch's profiler, and on a GPU with the history of its memory: what costs most, before
anything is made faster."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

SHOWN_OPERATORS = 60
MEMORY_EVENTS = 1_000_000  # of a step; the oldest are dropped beyond that


@contextmanager
def profiled(folder: Path, step: int) -> Iterator[None]:
    """What happens in the block goes to `folder`: a trace for chrome://tracing or Perfetto, a table of operators, and
    on a GPU a snapshot of memory for pytorch.org/memory_viz."""
    folder.mkdir(parents=True, exist_ok=True)
    name, on_gpu = f"step-{step:06d}", torch.cuda.is_initialized()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    if on_gpu:
        torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
    try:
        with profile(activities=activities, profile_memory=True) as record:
            yield
    finally:
        if on_gpu:
            torch.cuda.memory._dump_snapshot(str(folder / f"{name}-memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
    record.export_chrome_trace(str(folder / f"{name}.json.gz"))
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    table = record.key_averages().table(sort_by=order, row_limit=SHOWN_OPERATORS, max_name_column_width=80)
    (folder / f"{name}.txt").write_text(table + "\n", encoding="utf-8")
