"""Rows of a unit's files: JSON lines, plain or compressed, Parquet, Arrow. Only the columns asked for.

Inside the first stop of the data path: Unit -> Row, one at a time, of which `source_documents` makes texts; or Unit ->
IntegerRows, many at a time, of which `source_tokens` makes tokenized documents.
"""

import gzip
import io
import json
import mmap
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.data.sources import COMPRESSED, SourceFile, Unit
from pipeline.errors import DataError

END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # of an Arrow IPC stream
PARQUET_ROWS = 256  # decoded at a time
GATHERED_ROWS = 1024  # of JSON lines; a Python integer takes 8 to 36 bytes
GATHERED_INTEGERS = 1 << 20


class Row(NamedTuple):
    """The columns of one row. A tuple: there are millions of them."""

    name: str
    """`file:row`, rows from 1; where a file is divided `file@byte:row`, rows from that byte on."""
    where: str
    """For messages: the whole path."""
    values: dict[str, Any]


class IntegerLists(NamedTuple):
    """Lists of integers end to end: list i is `values[offsets[i]:offsets[i + 1]]`."""

    values: NDArray[Any]
    offsets: NDArray[np.int64]
    """[lists + 1], from 0 on"""
    stored_at: int | None = None
    """Byte of the unit's file at which the values lie as they are; None where they do not."""


class IntegerRows(NamedTuple):
    """Consecutive rows whose columns are lists of integers."""

    names: pa.StringArray
    """Of every row, as in `Row`"""
    where: Callable[[int], str]
    """A row's place for messages"""
    columns: dict[str, IntegerLists]


def rows(unit: Unit, *, type: str, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a unit of a jsonl, parquet or huggingface source. Raises DataError naming file and row."""
    for file in unit.files:
        with _read_errors(file):
            if type == "jsonl":
                yield from _json_rows(file, unit, columns)
            else:
                yield from _table_rows(_BATCHES[type](file, columns), file=file, columns=columns)


def integer_rows(unit: Unit, *, type: str, columns: Sequence[str]) -> Iterator[IntegerRows]:
    """The same rows, some at a time. Raises DataError where a cell is no list of integers."""
    for file in unit.files:
        with _read_errors(file):
            if type == "jsonl":
                yield from _gathered(_json_rows(file, unit, columns), columns=columns)
            else:
                yield from _table_integers(_BATCHES[type](file, columns), file=file, columns=columns)


@contextmanager
def _read_errors(file: SourceFile) -> Iterator[None]:
    try:
        yield
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
                yield Row(f"{name}:{number}", where, _json_values(line, where=where, columns=columns))


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


def _parquet_batches(file: SourceFile, columns: Sequence[str]) -> Iterator["LocatedBatch"]:
    with pq.ParquetFile(file.path) as opened:
        _check_columns(opened.schema_arrow, columns=columns, path=file.path)
        for batch in opened.iter_batches(PARQUET_ROWS, columns=list(columns)):
            yield batch, None


def _arrow_batches(file: SourceFile, columns: Sequence[str]) -> Iterator["LocatedBatch"]:
    """The file is mapped: of tokens that can stay where they are, only the offsets are read."""
    if not file.size:
        raise pa.ArrowInvalid("it is empty")
    with file.path.open("rb") as opened:
        mapping = mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ)  # ends with the last array in it
    if mapping[-len(END_OF_STREAM) :] != END_OF_STREAM:
        raise pa.ArrowInvalid("its end is missing")  # cut between two record batches, it would look whole
    source = pa.BufferReader(pa.py_buffer(mapping))
    messages = pa.ipc.MessageReader.open_stream(source)
    try:
        schema = pa.ipc.read_schema(messages.read_next_message())
    except StopIteration:
        raise pa.ArrowInvalid("it has no schema") from None
    _check_columns(schema, columns=columns, path=file.path)
    for batch in _located_batches(source, messages, schema):
        yield batch
        mapping.madvise(mmap.MADV_DONTNEED)  # or a corpus of mapped pages would count as our memory


_BATCHES: dict[str, Callable[[SourceFile, Sequence[str]], Iterator["LocatedBatch"]]] = {
    "parquet": _parquet_batches,
    "huggingface": _arrow_batches,
}


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


def _table_rows(
    batches: Iterable[LocatedBatch], *, file: SourceFile, columns: Sequence[str], first: int = 1
) -> Iterator[Row]:
    number = first - 1
    for batch, _ in batches:
        for row in zip(*(batch.column(column) for column in columns), strict=True):
            number += 1
            values = {column: cell.as_py() for column, cell in zip(columns, row, strict=True)}
            yield Row(f"{file.name}:{number}", f"{file.path} row {number}", values)


def _table_integers(
    batches: Iterable[LocatedBatch], *, file: SourceFile, columns: Sequence[str]
) -> Iterator[IntegerRows]:
    """A batch of rows at a time, as they lie in memory, where no list or integer is missing."""
    first = 1
    for batch, body in batches:
        found = {column: _lists(batch.column(column), body) for column in columns}
        lists = {column: value for column, value in found.items() if value is not None}
        if len(lists) < len(found):
            yield from _gathered(_table_rows([(batch, None)], file=file, columns=columns, first=first), columns=columns)
        else:
            numbers = pa.array(np.arange(first, first + batch.num_rows)).cast(pa.string())
            names = pc.binary_join_element_wise(f"{file.name}", numbers, ":")
            yield IntegerRows(names, partial(_row_of_table, file.path, first), lists)
        first += batch.num_rows


def _row_of_table(path: Path, first: int, row: int) -> str:
    return f"{path} row {first + row}"


def _row_of(taken: list[Row], row: int) -> str:
    return taken[row].where


def _lists(column: pa.Array, body: _Body | None) -> IntegerLists | None:
    """The cells of a column that holds nothing but lists of integers; None of any other."""
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not is_list or not pa.types.is_integer(kind.value_type) or column.null_count or column.values.null_count:
        return None
    offsets = column.offsets.to_numpy().astype(np.int64)
    values = column.values.to_numpy()[offsets[0] : offsets[-1]]
    return IntegerLists(values, offsets - offsets[0], body.offset_of(values) if body else None)


def _gathered(found: Iterator[Row], *, columns: Sequence[str]) -> Iterator[IntegerRows]:
    """Rows as arrays, some at a time; one row alone may be larger."""
    while taken := list(_some(found)):
        yield IntegerRows(
            pa.array([row.name for row in taken], pa.string()),
            partial(_row_of, taken),
            {column: _joined([_integers(row, column=column) for row in taken]) for column in columns},
        )


def _some(found: Iterator[Row]) -> Iterator[Row]:
    size = 0
    for row in islice(found, GATHERED_ROWS):
        yield row
        size += sum(len(value) for value in row.values.values() if isinstance(value, list))
        if size > GATHERED_INTEGERS:
            return


def _joined(lists: list[NDArray[np.int64]]) -> IntegerLists:
    offsets = np.array([0, *accumulate(map(len, lists))], np.int64)
    return IntegerLists(np.concatenate(lists), offsets)


def _integers(row: Row, *, column: str) -> NDArray[np.int64]:
    value = row.values[column]
    if isinstance(value, list) and all(type(item) in (int, bool) for item in value):
        try:
            return np.array(value, dtype=np.int64)
        except OverflowError:
            pass
    raise DataError(f"{row.where} has no list of integers in column {column!r}; repair or drop the row")
