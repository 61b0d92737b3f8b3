"""What is in a unit's files where they hold tokens: rows of token ids, and packed data sets.

Second stop of the data path, beside `source_documents`: Unit -> TokenizedDocuments, streamed in an order that only the
sources decide. Many documents at a time, as arrays: there are millions of them, and Python is slow.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.loss_runs import Runs, clipped, runs_of_mask
from pipeline.data.packed_dataset import TOKEN_BYTES, PackedDataset
from pipeline.data.rows import IntegerLists, IntegerRows, integer_rows
from pipeline.data.sources import Unit, resolve_source_path
from pipeline.errors import DataError
from pipeline.recipe.schema import PackedSource, RowSource, Source

IGNORE_LABEL = -100


class TokenizedDocuments(NamedTuple):
    """Documents whose tokens lie end to end: document i is `input_ids[offsets[i]:offsets[i + 1]]`."""

    names: pa.StringArray
    input_ids: NDArray[Any]
    """Integers [tokens]; not yet checked against a vocabulary"""
    offsets: NDArray[np.int64]
    """[documents + 1], from 0 on"""
    loss_runs: Sequence[Runs | None] | None
    """Of each document the tokens that count; None is all."""
    stored_at: int | None = None
    """Byte of the unit's file at which the tokens lie as 32-bit integers; None where they do not."""

    def name_at(self, token: int) -> str:
        """The name of the document that holds a token."""
        return str(self.names[int(np.searchsorted(self.offsets, token, side="right")) - 1])


def is_tokenized(source: Source) -> bool:
    """Whether the source holds token ids, and needs no tokenizer."""
    return isinstance(source, PackedSource) or (isinstance(source, RowSource) and source.content == "tokens")


def tokenized_documents(unit: Unit, *, source: Source) -> Iterator[TokenizedDocuments]:
    """The documents of a unit of a tokenized `source`. Raises DataError naming file and row for what is no document."""
    if isinstance(source, PackedSource):
        yield from _packed(unit, source=source)
    elif isinstance(source, RowSource):
        columns = source.columns
        asked = [column for column in (columns.input_ids, columns.labels, columns.loss_mask) if column is not None]
        for rows in integer_rows(unit, type=source.type, columns=asked):
            yield _documents_of(rows, source=source)


def _documents_of(rows: IntegerRows, *, source: RowSource) -> TokenizedDocuments:
    columns = source.columns
    assert columns.input_ids is not None
    tokens, runs = rows.columns[columns.input_ids], None
    if columns.labels:
        _check_as_long(rows, column=columns.labels, tokens=tokens)
        runs = _runs(_labels_count(rows, column=columns.labels, tokens=tokens), offsets=tokens.offsets)
    elif columns.loss_mask:
        _check_as_long(rows, column=columns.loss_mask, tokens=tokens)
        runs = _runs(_mask_counts(rows, column=columns.loss_mask), offsets=tokens.offsets)
    stored_at = tokens.stored_at if tokens.values.itemsize == TOKEN_BYTES else None
    return TokenizedDocuments(rows.names, tokens.values, tokens.offsets, runs, stored_at)


def _runs(counts: NDArray[np.bool_], *, offsets: NDArray[np.int64]) -> list[Runs | None]:
    return [runs_of_mask(counts[start:stop]) for start, stop in pairwise(offsets.tolist())]


def _labels_count(rows: IntegerRows, *, column: str, tokens: IntegerLists) -> NDArray[np.bool_]:
    """bool [tokens]: whose label is not ignored. Raises DataError for a label that is not its own token."""
    labels = rows.columns[column].values
    counts: NDArray[np.bool_] = labels != IGNORE_LABEL
    if (wrong := np.flatnonzero(counts & (labels != tokens.values))).size:
        where, at = _place(rows, tokens.offsets, int(wrong[0]))
        raise DataError(
            f"{where} has the label {labels[wrong[0]]} at token {at}, which is {tokens.values[wrong[0]]}; a label is "
            f"its own token, or {IGNORE_LABEL} where it does not count: shift labels back by one, or repair the row"
        )
    return counts


def _mask_counts(rows: IntegerRows, *, column: str) -> NDArray[np.bool_]:
    """bool [tokens]. Raises DataError for a value that is neither 0 nor 1."""
    mask, offsets, _ = rows.columns[column]
    if (wrong := np.flatnonzero((mask != 0) & (mask != 1))).size:
        where, at = _place(rows, offsets, int(wrong[0]))
        raise DataError(f"{where} has {mask[wrong[0]]} in its loss mask at token {at}; it must be 0 or 1")
    return mask == 1


def _check_as_long(rows: IntegerRows, *, column: str, tokens: IntegerLists) -> None:
    found, expected = np.diff(rows.columns[column].offsets), np.diff(tokens.offsets)
    if (wrong := np.flatnonzero(found != expected)).size:
        row = int(wrong[0])
        raise DataError(
            f"{rows.where(row)} has {found[row]} values in column {column!r} and {expected[row]} tokens; they must be "
            "as many"
        )


def _place(rows: IntegerRows, offsets: NDArray[np.int64], at: int) -> tuple[str, int]:
    """The row of value `at`, and its number there."""
    row = int(np.searchsorted(offsets, at, side="right")) - 1
    return rows.where(row), at - int(offsets[row])


def _packed(unit: Unit, *, source: PackedSource) -> Iterator[TokenizedDocuments]:
    """The documents of a part file, a sample at a time; checksums are verified."""
    dataset = PackedDataset.open(resolve_source_path(source.path))
    (part,) = (number for number, part in enumerate(dataset.manifest.parts) if part.name == unit.files[0].name)
    for sample in np.flatnonzero(dataset.index.part == part).tolist():
        known = dataset.sample(sample)
        bounds = known.cu_seqlens.astype(np.int64)
        runs = [clipped(known.loss_runs, start=start, stop=stop) for start, stop in pairwise(bounds.tolist())]
        every = [
            len(found) == 1 and found[0].tolist() == [0, size]
            for found, size in zip(runs, np.diff(bounds), strict=True)
        ]
        yield TokenizedDocuments(
            pa.array([f"sample {sample} document {number}" for number in range(len(runs))], pa.string()),
            dataset.read_tokens(sample, 0, known.n_tokens, verify=True),
            bounds,
            None if all(every) else [None if whole else found for whole, found in zip(every, runs, strict=True)],
            int(dataset.index.payload_offset[sample]),
        )
