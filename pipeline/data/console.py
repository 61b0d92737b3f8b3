"""Packing as a person watches it: a bar on a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from pipeline.data.progress import PackProgress, ReportProgress

LOG_SECONDS = 5.0  # between two lines of one stage in a log


@contextmanager
def console_progress() -> Iterator[ReportProgress]:
    """What `pack` reports to, shown on stderr: stdout belongs to results."""
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield _LogLines()
        return
    bar = Progress(
        TextColumn("{task.description:9}"),
        BarColumn(),
        TextColumn("{task.fields[text]}"),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    with bar:
        yield _Bars(bar)


class _Bars:
    """A bar per stage."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task_of: dict[str, int] = {}

    def __call__(self, progress: PackProgress) -> None:
        if progress.stage not in self._task_of:
            self._task_of[progress.stage] = self._bar.add_task(progress.stage, text="")
        self._bar.update(
            self._bar.task_ids[self._task_of[progress.stage]],
            completed=progress.bytes_done,
            total=progress.bytes_total,
            text=_counts(progress),
        )


class _LogLines:
    """A line at a stage's end, and every few seconds before it."""

    def __init__(self) -> None:
        self._stage = ""
        # A stage begins where the one before it last reported: its own first report is already work done.
        self._began = self._last = time.monotonic()

    def __call__(self, progress: PackProgress) -> None:
        now = time.monotonic()
        if progress.stage != self._stage:
            self._stage, self._began = progress.stage, self._last
        done = progress.bytes_done >= progress.bytes_total
        if not done and now - self._last < LOG_SECONDS:
            return
        self._last = now
        seconds = max(now - self._began, 1e-3)
        rate = progress.bytes_done / 1e6 / seconds
        left = (progress.bytes_total - progress.bytes_done) / 1e6 / max(rate, 1e-6)
        eta = "done" if done else f"ETA {left:.0f} s"
        print(f"{progress.stage:9} {_counts(progress)}, {rate:,.1f} MB/s, {eta}", file=sys.stderr, flush=True)


def _counts(progress: PackProgress) -> str:
    return f"{progress.documents:,} documents, {progress.tokens:,} tokens"
