"""What a run says while it goes on: one aligned line a step, tables at the end. `launch.screen` shows it."""

import math
import sys
from collections.abc import Iterable
from typing import TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pipeline.metrics.meter import StepRecord

GIB = 2**30
PIPED_WIDTH = 10_000  # columns; a log has no edge, and a path that is folded cannot be copied


class ProgressLine:
    """Prints a line per step, and others between them."""

    def __init__(self, total_steps: int, *, stream: TextIO | None = None) -> None:
        self._total_steps = total_steps
        self._console = _console(stream)

    def step(self, record: StepRecord) -> None:
        """Print the line of a finished step."""
        self.note(step_line(record, self._total_steps))

    def note(self, text: str) -> None:
        """Print any other line."""
        _print_plain(self._console, text)


def step_line(record: StepRecord, total_steps: int) -> str:
    """One line for one step; columns keep their place from line to line.

    The peak is the device's, or on the CPU the largest process's resident set.
    """
    width = len(str(total_steps))
    peak = record.peak_host_rss_bytes if record.peak_device_bytes is None else record.peak_device_bytes
    mfu = "-" if record.mfu is None else f"{record.mfu:.1%}"
    columns = (
        f"step {record.step:>{width}}/{total_steps}",
        f"loss {record.loss:>6.3f}",
        f"|g| {_norm(record.grad_norm):>7}",
        f"lr {record.learning_rate:.1e}",
        f"{record.tokens_per_second:>7,.0f} tok/s",
        f"peak {gib(peak):>10}",
        f"MFU {mfu:>5}",
        f"{binding(record):<12}",
        f"ETA {duration(record.eta_seconds)}",
    )
    return "  ".join([*columns, *_remarks(record)])


def binding(record: StepRecord) -> str:
    """What most of the step's accounted time went into, and how much of it: `compute 93%`."""
    parts = {
        "compute": record.forward_seconds + record.backward_seconds + record.optimizer_seconds,
        "offload": record.offload_stall_seconds,
        "comm": record.communication_seconds,
        "data": record.data_seconds,
    }
    largest = max(parts, key=lambda name: parts[name])
    total = sum(parts.values())
    return f"{largest} {parts[largest] / total:.0%}" if total else "-"


def _remarks(record: StepRecord) -> list[str]:
    """What only some steps have, behind the columns."""
    found = []
    if record.eval_loss is not None and record.eval_seconds is not None:
        found.append(f"held-out loss {record.eval_loss:.3f} in {record.eval_seconds:.1f} s")
    if record.loss_spike:
        found.append("LOSS SPIKE")
    return found


def print_table(title: str, rows: Iterable[tuple[str, str]], *, stream: TextIO | None = None) -> None:
    """Print names and values under a title; in a pipe no value is folded."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    console = _console(stream)
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    with console.capture() as capture:
        console.print(table, markup=False, highlight=False)
    for line in capture.get().splitlines():
        console.file.write(line.rstrip() + "\n")
    console.file.flush()


def warn(message: str) -> None:
    """Tell something that went wrong and does not stop the run."""
    _print_plain(_console(sys.stderr), f"warning: {message}", style="yellow")


def gib(number_of_bytes: int) -> str:
    """`1.31 GiB`."""
    return f"{number_of_bytes / GIB:,.2f} GiB"


def size(number_of_bytes: int) -> str:
    """`1.31 GiB`, `17.2 MiB`: in the unit that leaves something to read."""
    return gib(number_of_bytes) if number_of_bytes >= GIB // 10 else f"{number_of_bytes / 2**20:,.1f} MiB"


def duration(seconds: float | None) -> str:
    """`0:01:12`, with days in front when there are any; `-` when unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}d {hour:02}:{minute:02}:{second:02}" if days else f"{hour}:{minute:02}:{second:02}"


def _norm(grad_norm: float | None) -> str:
    if grad_norm is None:
        return "-"
    if grad_norm == 0 or not math.isfinite(grad_norm) or 0.01 <= grad_norm < 10_000:
        return f"{grad_norm:.2f}"
    return f"{grad_norm:.1e}"


def _console(stream: TextIO | None) -> Console:
    """A console whose only judge of being a terminal is the stream: FORCE_COLOR shall not colour a log."""
    stream = stream or sys.stdout
    terminal = stream.isatty()
    return Console(file=stream, force_terminal=terminal, force_interactive=terminal)


def _print_plain(console: Console, text: str, *, style: str | None = None) -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
    console.file.flush()
