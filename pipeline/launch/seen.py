"""What the steps of a run have cost: memory at its peak, time, tokens. Read from metrics.jsonl."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class Seen:
    """What steps have cost."""

    gpu_bytes: int | None
    """Of the rank that took most; None on the CPU."""
    host_process_bytes: int
    """Of the process that took most."""
    step_seconds: float
    """Median; the first step, which also compiles and allocates, is left out where there are others."""
    tokens_per_second: float


def seen_in(rows: Sequence[dict[str, Any]]) -> Seen:
    """Of at least one row of metrics.jsonl."""
    calm = rows[1:] or rows
    gpu = [row["peak_device_bytes"] for row in rows if row["peak_device_bytes"] is not None]
    return Seen(
        gpu_bytes=max(gpu) if gpu else None,
        host_process_bytes=max(row["peak_host_rss_bytes"] for row in rows),
        step_seconds=statistics.median(row["step_seconds"] for row in calm),
        tokens_per_second=statistics.median(row["tokens_per_second"] for row in calm),
    )


def seen_lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What was seen, one figure a line; nothing if there was no step."""
    if not rows:
        return
    seen = seen_in(rows)
    figures = [
        ("GPU memory, fullest rank", "-" if seen.gpu_bytes is None else f"{seen.gpu_bytes / GIB:.2f} GiB"),
        ("host memory, largest process", f"{seen.host_process_bytes / GIB:.2f} GiB"),
        ("seconds per step", f"{seen.step_seconds:.2f}"),
        ("tokens per second", f"{seen.tokens_per_second:,.0f}"),
    ]
    yield f"seen in {len(rows)} steps"
    for name, figure in figures:
        yield f"  {name:<30}{figure:>12}"
