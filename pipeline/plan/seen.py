"""What the steps of a run have cost: memory at its peak, time, tokens. Read from metrics.jsonl."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.plan.estimate import estimate
from pipeline.plan.hardware import GIB
from pipeline.plan.job import JobPlan


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
    mfu: float | None
    """None where no peak is known, on a CPU; so is the next."""
    hfu: float | None


def seen_in(rows: Sequence[dict[str, Any]]) -> Seen:
    """Of at least one row of metrics.jsonl."""
    calm = rows[1:] or rows
    gpu = [row["peak_device_bytes"] for row in rows if row["peak_device_bytes"] is not None]
    return Seen(
        gpu_bytes=max(gpu) if gpu else None,
        host_process_bytes=max(row["peak_host_rss_bytes"] for row in rows),
        step_seconds=statistics.median(row["step_seconds"] for row in calm),
        tokens_per_second=statistics.median(row["tokens_per_second"] for row in calm),
        mfu=_median([row.get("mfu") for row in calm]),
        hfu=_median([row.get("hfu") for row in calm]),
    )


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def figures(rows: Sequence[dict[str, Any]], plan: JobPlan, packed: Path | None = None) -> list[tuple[str, str, str]]:
    """(what, seen, planned) of at least one row, with the documents in `packed`; what neither knows is left out."""
    seen, planned = seen_in(rows), estimate(plan, packed=packed)
    seconds = None if planned.seconds is None else planned.seconds.total
    host = planned.load.host
    host_share = (host.total - host.by_name["system"]) / plan.recipe.hardware.gpus_per_node
    found = [
        ("GPU memory, fullest rank", _gib(seen.gpu_bytes), _gib(planned.load.gpu.allocated)),
        ("host memory, a rank", _gib(seen.host_process_bytes), _gib(host_share)),
        ("seconds per step", f"{seen.step_seconds:.2f}", "-" if seconds is None else f"{seconds:.2f}"),
        ("tokens per second", f"{seen.tokens_per_second:,.0f}", _rate(planned.tokens_per_second)),
        ("MFU", _share(seen.mfu), _share(planned.mfu)),
        ("HFU", _share(seen.hfu), _share(planned.hfu)),
    ]
    return [figure for figure in found if figure[1:] != ("-", "-")]


def seen_lines(rows: Sequence[dict[str, Any]], plan: JobPlan, packed: Path | None = None) -> Iterator[str]:
    """What was seen, beside what was planned for the documents in `packed`; nothing without a step."""
    if not rows:
        return
    yield f"{f'{len(rows)} steps':<32}{'seen':>12}{'planned':>12}"
    for name, figure, expected in figures(rows, plan, packed):
        yield f"  {name:<30}{figure:>12}{expected:>12}"


def _gib(count: float | None) -> str:
    return "-" if count is None else f"{count / GIB:.2f} GiB"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _rate(tokens_per_second: float | None) -> str:
    return "-" if tokens_per_second is None else f"{tokens_per_second:,.0f}"
