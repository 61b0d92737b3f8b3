"""Rows of a unit's files, one at a time: JSON lines, plain or compressed, Parquet, Arrow. Only the columns asked for.

Inside the first stop of the data path: Unit -> Row, which `source_documents` makes a document of.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.data.sources import COMPRESSED, SourceFile, Unit
from pipeline.errors import DataError

PARQUET_ROWS = 256  # decoded at a time


class Row(NamedTuple):
    """The columns of one row; lists of integers may be numpy arrays. A tuple: there are millions of them."""

    name: str
    """`file:row`, rows from 1; where a file is divided `file@byte:row`, rows from that byte on."""
    where: str
    """For messages: the whole path."""
    values: dict[str, Any]
    stored_at: dict[str, int]
    """Of columns whose integers lie in the file as they are: the byte at which they begin."""


def rows(unit: Unit, *, type: str, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a unit of a jsonl, parquet or huggingface source. Raises DataError naming file and row."""
    read: Callable[[SourceFile, Unit, Sequence[str]], Iterator[Row]] = {
        "jsonl": _json_rows, "parquet": _parquet_rows, "huggingface": _arrow_rows
    }[type]  # fmt: skip
    for file in unit.files:
        try:
            yield from read(file, unit, columns)
        except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
            raise DataError(
                f"data source {file.path} cannot be read: {error}; it is damaged, or of another format: replace it"
            ) from error


def _json_rows(file: SourceFile, unit: Unit, columns: Sequence[str]) -> Iterator[Row]:
    """Blank lines are passed over. A line belongs to the unit in which it begins."""
    name, place = (file.name, "") if unit.end is None else (f"{file.name}@{unit.begin}", f" from byte {unit.begin} on")
    with _opened(file.path) as opened:
        at = unit.begin
        if unit.begin:
            opened.seek(unit.begin - 1)
            at += len(opened.readline()) - 1
        number = 0
        while unit.end is None or at < unit.end:
            line = opened.readline()
            if not line:
                return
            at, number = at + len(line), number + 1
            if line.strip():
                where = f"{file.path}{place} line {number}"
                yield Row(f"{name}:{number}", where, _json_values(line, where=where, columns=columns), {})


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    if path.suffix not in COMPRESSED:
        with path.open("rb") as file:
            yield file
    elif path.suffix == ".gz":
        with gzip.open(path) as unpacked:
            yield io.BufferedReader(unpacked)
    else:
        with pa.input_stream(str(path), compression="zstd") as stream:
            yield io.BufferedReader(stream)


def _json_values(line: bytes, *, where: str, columns: Sequence[str]) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 (byte {error.start} of the line); convert the file") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}); every line must be one object") from error
    for column in columns:
        if not isinstance(record, dict) or column not in record:
            keys = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise DataError(f"{where} has no column {column!r} but {keys}; set data.sources[].columns or roles")
    return {column: record[column] for column in columns}


def _parquet_rows(file: SourceFile, _: Unit, columns: Sequence[str]) -> Iterator[Row]:
    with pq.ParquetFile(file.path) as opened:
        _check_columns(opened.schema_arrow, columns=columns, path=file.path)
        batches = opened.iter_batches(PARQUET_ROWS, columns=list(columns))
        yield from _table_rows(((batch, None) for batch in batches), file=file, columns=columns)


def _arrow_rows(file: SourceFile, _: Unit, columns: Sequence[str]) -> Iterator[Row]:
    with pa.OSFile(str(file.path)) as source:  # not mapped: a corpus of mapped pages would count as our memory
        messages = pa.ipc.MessageReader.open_stream(source)
        schema = pa.ipc.read_schema(messages.read_next_message())
        _check_columns(schema, columns=columns, path=file.path)
        yield from _table_rows(_located_batches(source, messages, schema), file=file, columns=columns)


@dataclass(frozen=True)
class _Body:
    """Where the buffers of a record batch lie, in memory and in the file."""

    address: int
    size: int
    offset: int

    def offset_of(self, values: NDArray[Any]) -> int | None:
        """Byte of the file at which the values begin; None where they were compressed there."""
        inside = values.__array_interface__["data"][0] - self.address
        return self.offset + inside if 0 <= inside < self.size else None


LocatedBatch = tuple[pa.RecordBatch, _Body | None]


def _located_batches(
    source: pa.NativeFile, messages: pa.ipc.MessageReader, schema: pa.Schema
) -> Iterator[LocatedBatch]:
    while True:
        try:
            message = messages.read_next_message()
        except StopIteration:
            return
        body = _Body(message.body.address, message.body.size, source.tell() - message.body.size)
        yield pa.ipc.read_record_batch(message, schema), body


def _check_columns(schema: pa.Schema, *, columns: Sequence[str], path: Path) -> None:
    for column in columns:
        if column not in schema.names:
            raise DataError(f"{path} has no column {column!r} but {schema.names}; set data.sources[].columns or roles")


def _table_rows(batches: Iterable[LocatedBatch], *, file: SourceFile, columns: Sequence[str]) -> Iterator[Row]:
    number = 0
    for batch, body in batches:
        cells = [_cells(batch.column(column), body) for column in columns]
        for row in zip(*cells, strict=True):
            number += 1
            values = {column: value for column, (value, _) in zip(columns, row, strict=True)}
            stored_at = {column: at for column, (_, at) in zip(columns, row, strict=True) if at is not None}
            yield Row(f"{file.name}:{number}", f"{file.path} row {number}", values, stored_at)


def _cells(column: pa.Array, body: _Body | None) -> Iterator[tuple[Any, int | None]]:
    """The cells of a column and where in the file they are stored; a list of integers without nulls as numpy array."""
    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not lists or not pa.types.is_integer(kind.value_type) or column.null_count or column.values.null_count:
        for cell in column:
            yield cell.as_py(), None
        return
    values = column.values.to_numpy()
    first = body.offset_of(values) if body else None
    for start, stop in pairwise(column.offsets.to_numpy().tolist()):
        yield values[start:stop], None if first is None else first + values.itemsize * start


def as_integers(value: Any) -> NDArray[Any] | None:
    """The integers of a cell, one dimension; None where it is anything else."""
    if isinstance(value, list) and all(type(item) in (int, bool) for item in value):
        try:
            return np.array(value, dtype=np.int64)
        except OverflowError:
            return None
    return value if isinstance(value, np.ndarray) and value.ndim == 1 else None
