"""What is in a unit's files: texts, chats as text whose assistant's part counts, and documents tokenized already.

Second stop of the data path: Unit -> RawDocument or TokenizedDocument, streamed in an order that only the sources
decide. Nothing here keeps more than one batch of rows in memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.chat import ChatTemplate
from pipeline.data.loss_runs import Runs, clipped, runs_of_mask
from pipeline.data.packed_dataset import TOKEN_BYTES, PackedDataset
from pipeline.data.rows import Row, as_integers, rows
from pipeline.data.sources import Unit, resolve_source_path
from pipeline.errors import DataError
from pipeline.recipe.schema import PackedSource, RowSource, Source, TextSource

IGNORE_LABEL = -100

OnSkip = Callable[[str], None]


@dataclass(frozen=True)
class RawDocument:
    """One text and where it was found."""

    name: str
    """A file's path below its source, or `file:row`."""
    text: str
    counted: tuple[tuple[int, int], ...] | None = None
    """Characters `[start, stop)` whose tokens count in the loss; None is all."""


class TokenizedDocument(NamedTuple):
    """Token ids as a source holds them. A tuple: there are millions of them."""

    name: str
    input_ids: NDArray[Any]
    """Integers [tokens]; not yet checked against a vocabulary"""
    loss_runs: Runs | None
    """Tokens that count; None is all."""
    stored_at: int | None = None
    """Byte of the unit's file at which they lie as 32-bit integers; None where they do not."""


def documents(
    unit: Unit, *, source: Source, chat: ChatTemplate | None = None, on_skip: OnSkip | None = None
) -> Iterator[RawDocument | TokenizedDocument]:
    """The documents of a unit of `source`, one at a time, also those without a character.

    `chat` renders chats. `on_skip` is called with the name of each file that is not UTF-8 and that
    `on_undecodable: skip` passes over. Raises DataError naming file and row for what is no document.
    """
    match source:
        case TextSource():
            yield from _texts(unit, source=source, on_skip=on_skip)
        case PackedSource():
            yield from _packed(unit, source=source)
        case RowSource():
            read = _READERS[source.content]
            for row in rows(unit, type=source.type, columns=_columns(source)):
                yield read(row, source, chat)


def _texts(unit: Unit, *, source: TextSource, on_skip: OnSkip | None) -> Iterator[RawDocument]:
    for file in unit.files:
        text = _read_text(file.path, skip=source.on_undecodable == "skip")
        if text is not None:
            yield RawDocument(file.name, text)
        elif on_skip:
            on_skip(file.name)


def _read_text(path: Path, *, skip: bool) -> str | None:
    """The file's text, or None where it is not UTF-8 and `skip` allows that."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        if skip:
            return None
        raise DataError(
            f"{path} is not UTF-8 (byte {error.start}); convert it, exclude it, or set on_undecodable: skip"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check its permissions, or exclude it") from error


def _columns(source: RowSource) -> tuple[str, ...]:
    columns = source.columns
    match source.content:
        case "text":
            return (columns.text or "text",)
        case "tokens":
            asked = (columns.input_ids, columns.labels, columns.loss_mask)
            return tuple(column for column in asked if column is not None)
        case "chat":
            return tuple(dict.fromkeys(value.split(".")[0] for value in source.roles.values()))


def _text_of(row: Row, source: RowSource, _: ChatTemplate | None) -> RawDocument:
    column = source.columns.text or "text"
    return RawDocument(row.name, _checked_text(row.values[column], where=row.where, what=f"column {column!r}"))


def _checked_text(text: Any, *, where: str, what: str) -> str:
    if not isinstance(text, str):
        raise DataError(f"{where} has a {type(text).__name__} in {what}; it must be a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} has half a surrogate pair at character {error.start}, which is no text; repair or drop the line"
        ) from error
    return text


def _chat_of(row: Row, source: RowSource, chat: ChatTemplate | None) -> RawDocument:
    assert chat is not None
    text, counted = chat.render(_messages(row, source=source), where=row.where)
    return RawDocument(row.name, text, counted)


def _messages(row: Row, *, source: RowSource) -> list[dict[str, str]]:
    """The chat's messages, with the roles of the template."""
    split = {role: value.split(".") for role, value in source.roles.items()}
    column, *rest = next(iter(split.values()))
    if not rest:
        return [
            {"role": role, "content": _checked_text(row.values[name], where=row.where, what=f"column {name!r}")}
            for role, (name,) in split.items()
        ]
    key, content, role_of = (
        rest[0],
        source.columns.content or "content",
        {path[2]: role for role, path in split.items()},
    )
    found = row.values[column]
    if not isinstance(found, list) or not found:
        raise DataError(f"{row.where} has {type(found).__name__} in column {column!r}; it must be a list of messages")
    messages = []
    for number, message in enumerate(found, start=1):
        role = message.get(key) if isinstance(message, dict) else None
        if role not in role_of:
            raise DataError(
                f"{row.where} has the role {role!r} in message {number}, and data.sources[].roles names "
                f"{sorted(role_of)}; add it there, e.g. system: {column}.{key}.system, or drop the row"
            )
        text = _checked_text(message.get(content), where=row.where, what=f"{content!r} of message {number}")
        messages.append({"role": role_of[role], "content": text})
    return messages


def _tokens_of(row: Row, source: RowSource, _: ChatTemplate | None) -> TokenizedDocument:
    columns = source.columns
    assert columns.input_ids is not None
    input_ids = _integers(row, column=columns.input_ids)
    stored_at = row.stored_at.get(columns.input_ids) if input_ids.itemsize == TOKEN_BYTES else None
    if columns.labels:
        labels = _integers(row, column=columns.labels, like=input_ids)
        counts = labels != IGNORE_LABEL
        if (wrong := np.flatnonzero(counts & (labels != input_ids))).size:
            at = int(wrong[0])
            raise DataError(
                f"{row.where} has the label {labels[at]} at token {at}, which is {input_ids[at]}; a label is its own "
                f"token, or {IGNORE_LABEL} where it does not count: shift labels back by one, or repair the row"
            )
        return TokenizedDocument(row.name, input_ids, runs_of_mask(counts), stored_at)
    if columns.loss_mask:
        mask = _integers(row, column=columns.loss_mask, like=input_ids)
        if (wrong := np.flatnonzero((mask != 0) & (mask != 1))).size:
            at = int(wrong[0])
            raise DataError(f"{row.where} has {mask[at]} in its loss mask at token {at}; it must be 0 or 1")
        return TokenizedDocument(row.name, input_ids, runs_of_mask(mask == 1), stored_at)
    return TokenizedDocument(row.name, input_ids, None, stored_at)


def _integers(row: Row, *, column: str, like: NDArray[Any] | None = None) -> NDArray[Any]:
    found = as_integers(row.values[column])
    if found is None:
        raise DataError(f"{row.where} has no list of integers in column {column!r}; repair or drop the row")
    if like is not None and len(found) != len(like):
        raise DataError(
            f"{row.where} has {len(found)} values in column {column!r} and {len(like)} tokens; they must be as many"
        )
    return found


def _packed(unit: Unit, *, source: PackedSource) -> Iterator[TokenizedDocument]:
    """The documents of a part file, one read of a sample at a time; checksums are verified."""
    dataset = PackedDataset.open(resolve_source_path(source.path))
    (part,) = (number for number, part in enumerate(dataset.manifest.parts) if part.name == unit.files[0].name)
    for sample in np.flatnonzero(dataset.index.part == part).tolist():
        known = dataset.sample(sample)
        tokens = dataset.read_tokens(sample, 0, known.n_tokens, verify=True)
        for number, (start, stop) in enumerate(pairwise(known.cu_seqlens.tolist())):
            runs = clipped(known.loss_runs, start=start, stop=stop)
            whole = len(runs) == 1 and runs[0].tolist() == [0, stop - start]
            name = f"sample {sample} document {number}"
            stored_at = int(dataset.index.payload_offset[sample]) + TOKEN_BYTES * start
            yield TokenizedDocument(name, tokens[start:stop], None if whole else runs, stored_at)


_READERS: dict[str, Callable[[Row, RowSource, ChatTemplate | None], RawDocument | TokenizedDocument]] = {
    "text": _text_of,
    "chat": _chat_of,
    "tokens": _tokens_of,
}
