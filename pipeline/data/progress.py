"""How far a stage of packing is; the command line turns it into a bar."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class PackProgress:
    """A stage's state. Bytes are of text while tokenizing and of the data set while writing."""

    stage: str
    documents: int
    tokens: int
    bytes_done: int
    bytes_total: int


ReportProgress = Callable[[PackProgress], None]


class StageProgress:
    """Adds up what a stage has done, and reports it."""

    def __init__(self, report: ReportProgress | None, *, stage: str, bytes_total: int) -> None:
        self._report, self._stage, self._total = report, stage, max(bytes_total, 1)
        self._documents = self._tokens = self._bytes = 0

    def advance(self, documents: int, tokens: int, bytes_done: int) -> None:
        """Adds what was done since the last call."""
        self._documents, self._tokens = self._documents + documents, self._tokens + tokens
        self._bytes = min(self._bytes + bytes_done, self._total)
        if self._report:
            self._report(PackProgress(self._stage, self._documents, self._tokens, self._bytes, self._total))
