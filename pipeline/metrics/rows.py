"""Rows of a run folder: one JSON object per line, of steps in metrics.jsonl, of what happened in events.jsonl.

They are the truth of a run; MLflow is a view of them.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.metrics.console import warn as warn_on_console

METRICS_FILE = "metrics.jsonl"
Warn = Callable[[str], None]
Row = dict[str, Any]


class JsonlWriter:
    """Appends an object per line. A line is handed to the kernel whole, so a killed process leaves whole lines.

    What a full disk does not take is kept, and written with a later line.
    """

    def __init__(self, path: Path, *, warn: Warn = warn_on_console) -> None:
        _drop_torn_line(path)
        self._file = path.open("ab", buffering=0)
        self._pending = b""
        self._warn = warn

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one object; a number that is not finite becomes null, which every JSON reader takes."""
        row = {name: _finite(value) for name, value in row.items()}
        waiting = bool(self._pending)
        self._pending += json.dumps(row, allow_nan=False).encode() + b"\n"
        error = self._write_pending()
        if error is not None and not waiting:
            self._warn(f"{self._file.name}: {error.strerror}; lines are kept in memory until there is room")

    def close(self) -> None:
        if (error := self._write_pending()) is not None:
            self._warn(f"{self._file.name}: {error.strerror}; the last {self._pending.count(10)} lines are not in it")
        self._file.close()

    def _write_pending(self) -> OSError | None:
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) or 0 :]
        except OSError as error:
            return error
        return None


class Tail:
    """A file of rows that grows: each time those that are new. A last line without its end is left for later."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new(self) -> list[Row]:
        """Since this was last asked; nothing where the file is not there yet."""
        if not self._path.is_file():
            return []
        rows = []
        with self._path.open("rb") as lines:
            lines.seek(self._offset)
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                with suppress(DataError):  # a damaged line is passed over; `read_metrics` tells of it
                    rows.append(_parse_row(self._path, number, line))
        return rows


def read_metrics(path: Path) -> Iterator[Row]:
    """The rows of a metrics.jsonl in the order written; a last line without its end is left out."""
    if not path.is_file():
        raise DataError(f"{path} is not there; a run writes it with its first step, so name a run folder that has one")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return
            yield _parse_row(path, number, line)


def _parse_row(path: Path, number: int, line: bytes) -> Row:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise DataError(
            f"{path}, line {number}: {line[:60]!r} is not a JSON object; each line holds one, so remove that line"
        )
    return row


def read_steps(path: Path) -> list[Row]:
    """One row per step, in order; of a step done again after a restart, the last."""
    by_step = {row["step"]: row for row in read_metrics(path)}
    return [by_step[step] for step in sorted(by_step)]


def read_events(path: Path) -> list[Row]:
    """What happened to a run, in order: its starts, its checkpoints, its ends; nothing where there is no such file."""
    return list(read_metrics(path)) if path.is_file() else []


def _drop_torn_line(path: Path) -> None:
    """Cut off what a killed writer left behind the last whole line, so that the next row starts on its own."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
