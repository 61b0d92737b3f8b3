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
