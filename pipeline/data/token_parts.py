"""Tokens on disk between tokenize and write: part files, their completion records, and reading them by document.

A part is made of one unit. It is three files and a completion record, written last: `.u32` holds the tokens of all its
documents end to end, `.runs` the loss runs of those of which not every token counts, `.arrow` a row per document. Where
the unit's own file holds the tokens as 32-bit integers already, they are read from there, and `.u32` is empty.
"""

import os
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.files import fill, read_json
from pipeline.data.loss_runs import EMPTY, Runs, clipped, whole
from pipeline.data.sources import Unit, changed_ns, content_hash
from pipeline.errors import DataError

DOCUMENT_SCHEMA = pa.schema(
    [("source", pa.int32()), ("name", pa.string()), ("first_token", pa.int64()), ("length", pa.int64())]
)
"""A row per document; its id is its row number. `first_token` is where it starts in a text that was cut."""

EVERY_TOKEN = -1
ROW_SCHEMA = pa.schema([*DOCUMENT_SCHEMA, ("offset", pa.int64()), ("loss_runs", pa.int32())])
"""`offset` is the byte at which the document's tokens begin; `loss_runs` is how many runs it has in `.runs`,
EVERY_TOKEN where all its tokens count."""

SPARE_FILES = 64  # that a process opens besides its token parts


@dataclass(frozen=True)
class TokenRecord:
    """The completion record of a token part."""

    key: str
    """Digest of the unit, the tokenizer and what else decides the tokens, but for the content."""
    content: str
    """`content_hash` of the unit."""
    texts: int
    texts_without_tokens: int
    files_skipped: int
    """Not UTF-8, and passed over as the recipe says."""
    documents: int
    """Texts, after `max_document_tokens` cut the long ones."""
    tokens: int
    in_place: bool
    """Whether the tokens are read from the unit's file."""


@dataclass(frozen=True)
class TokenPart:
    """Where a part of the tokens lies: `folder`, part `index` of `count`."""

    folder: Path
    index: int = 0
    count: int = 1
    unit_file: Path | None = None
    """The first file of its unit, as the sources name it now"""

    @property
    def name(self) -> str:
        return f"tokens-{self.index:05d}-of-{self.count:05d}"

    @property
    def tokens_path(self) -> Path:
        return self.folder / f"{self.name}.u32"

    @property
    def runs_path(self) -> Path:
        return self.folder / f"{self.name}.runs"

    @property
    def record_path(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def documents_path(self) -> Path:
        return self.folder / f"{self.name}.arrow"

    def tokens_file(self) -> Path:
        """The file that holds the tokens; the part must be complete."""
        record = read_json(self.record_path) or {}
        return self.unit_file if record.get("in_place") and self.unit_file is not None else self.tokens_path

    def record(self, *, key: str, unit: Unit | None = None) -> TokenRecord | None:
        """Its completion record, if it is complete and was made from the inputs that `key` stands for.

        With `unit`, also if its files are as they were: those that are newer than the record are hashed again.
        """
        value = read_json(self.record_path)
        if not value or value.get("key") != key:
            return None
        record = TokenRecord(**value)
        stale = (
            unit and changed_ns(unit) >= self.record_path.stat().st_mtime_ns and content_hash(unit) != record.content
        )
        return None if stale else record

    def forget(self) -> None:
        """Withdraws the completion record: first step of making the part again from other inputs."""
        self.record_path.unlink(missing_ok=True)


class TokenReader:
    """All token parts, read by document. Use it in a `with`; a document's id counts over all parts in order."""

    def __init__(self, parts: Sequence[TokenPart]) -> None:
        self._parts = parts
        tables = [read_document_rows(part.documents_path) for part in parts]
        self.lengths: NDArray[np.int64] = np.concatenate([table["length"].to_numpy() for table in tables])
        """[documents]"""
        self.sources: NDArray[np.int32] = np.concatenate([table["source"].to_numpy() for table in tables])
        """[documents]: index of each document's source in the recipe"""
        runs = [table["loss_runs"].to_numpy() for table in tables]
        self._run_counts = np.concatenate(runs)
        stored = [np.maximum(part, 0, dtype=np.int64) for part in runs]
        self._first_run = np.concatenate([np.cumsum(part) - part for part in stored])
        self._first_document = np.cumsum([0, *(table.num_rows for table in tables)])
        self._offsets = np.concatenate([table["offset"].to_numpy() for table in tables])
        self._paths = [part.tokens_file() for part in parts]
        self._descriptors: list[int] = []
        self._runs: list[Runs] = []

    def __enter__(self) -> "TokenReader":
        _allow_open_files(len(self._parts) + SPARE_FILES)
        self._descriptors = [os.open(path, os.O_RDONLY) for path in self._paths]
        self._runs = [_mapped_runs(part.runs_path) for part in self._parts]
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []

    def read_into(
        self, target: NDArray[np.uint32], *, document: NDArray[Any], start: NDArray[Any], ends: NDArray[Any]
    ) -> None:
        """Fills `target` with pieces end to end: each from token `start` of `document` on, up to `ends` in `target`.

        All arrays [pieces]. Raises DataError if a part was cut off.
        """
        parts = self._part_of(document)
        offsets = self._offsets[document] + 4 * start
        memory = target.view(np.uint8).data
        bounds = [0, *(4 * ends).tolist()]
        for part, offset, begin, end in zip(parts.tolist(), offsets.tolist(), bounds[:-1], bounds[1:], strict=True):
            piece = memory[begin:end]
            if os.preadv(self._descriptors[part], [piece], offset) != end - begin:
                fill(self._descriptors[part], offset=offset, target=piece, path=self._paths[part])

    def prefetch(self, *, document: NDArray[Any], start: NDArray[Any], stop: NDArray[Any]) -> None:
        """Asks the system to read pieces ahead, all at once: shuffled documents are random reads."""
        offsets = self._offsets[document] + 4 * start
        sizes = 4 * (stop - start)
        for part, offset, size in zip(self._part_of(document).tolist(), offsets.tolist(), sizes.tolist(), strict=True):
            os.posix_fadvise(self._descriptors[part], offset, size, os.POSIX_FADV_WILLNEED)

    def loss_runs(self, document: int, *, start: int, stop: int) -> Runs:
        """Which of the tokens `[start, stop)` of a document count, from `start` on."""
        count = int(self._run_counts[document])
        if count == EVERY_TOKEN:
            return whole(stop - start)
        first = int(self._first_run[document])
        runs = self._runs[int(self._part_of(np.array([document]))[0])]
        return clipped(runs[first : first + count], start=start, stop=stop)

    def name(self, document: int) -> str:
        """Where the document was found."""
        part = int(self._part_of(np.array([document]))[0])
        rows = read_document_rows(self._parts[part].documents_path)
        return str(rows["name"][document - int(self._first_document[part])])

    def every_token_counts(self, document: NDArray[Any]) -> bool:
        """Whether none of the documents has a token that does not count."""
        return bool((self._run_counts[document] == EVERY_TOKEN).all())

    def _part_of(self, document: NDArray[Any]) -> NDArray[np.int64]:
        return np.searchsorted(self._first_document, document, side="right") - 1


def _mapped_runs(path: Path) -> Runs:
    return np.memmap(path, np.int32, "r").reshape(-1, 2) if path.stat().st_size else EMPTY


def _allow_open_files(count: int) -> None:
    """A corpus of terabytes has more token parts than the 1,024 files that a process may open at first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and count > soft:
        if hard != resource.RLIM_INFINITY and count > hard:
            raise DataError(f"{count} files must be open at once and the limit is {hard}; raise it with `ulimit -Hn`")
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def read_document_rows(path: Path) -> pa.Table:
    """The table of documents in `path`. Raises DataError if it is missing or damaged."""
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_stream(source).read_all()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"document list {path} cannot be read ({error}); delete the data set and pack again") from error
