"""What a person sees of the ranks on this machine: rank 0's lines and, on a terminal, a bar below them."""

import re
import sys
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

STEP = re.compile(r"^step +(\d+)/(\d+) .* ETA (\S+)")
"""Rank 0's line of a step."""


class Screen:
    """Shows lines as they come. Use as a context manager, so that the bar is taken down whatever happens."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._bar: Progress | None = None
        # The stream alone says whether it is a terminal: FORCE_COLOR shall not put a bar into a log.
        terminal = self._stream.isatty()
        console = Console(file=self._stream, force_terminal=terminal, force_interactive=terminal)
        if terminal and not console.is_dumb_terminal:
            columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("ETA {task.fields[eta]}"))
            self._bar = Progress(TextColumn("training"), *columns, console=console, transient=True, expand=True)

    def __enter__(self) -> "Screen":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, line: str) -> None:
        """A line with its end."""
        if self._bar is None:
            self._stream.write(line)
        else:
            self._bar.console.print(line, end="", markup=False, highlight=False, soft_wrap=True)
            self._follow(self._bar, line)
        self._stream.flush()

    def _follow(self, bar: Progress, line: str) -> None:
        """The bar is there from the first step on."""
        found = STEP.match(line)
        if found is None:
            return
        step, steps, eta = int(found[1]), int(found[2]), found[3]
        if not bar.tasks:
            bar.add_task("training", total=steps, eta=eta)
            bar.start()
        bar.update(bar.task_ids[0], completed=step, eta=eta)
