"""What is in a unit's files: texts, and chats as text whose assistant's part counts.

Second stop of the data path: Unit -> RawDocument, streamed in an order that only the sources decide. Nothing here keeps
more than one batch of rows in memory. Documents that are tokenized already come through `source_tokens`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.chat import ChatTemplate
from pipeline.data.rows import Row, rows
from pipeline.data.sources import Unit
from pipeline.errors import DataError
from pipeline.recipe.schema import RowSource, Source, TextSource

OnSkip = Callable[[str], None]


@dataclass(frozen=True)
class RawDocument:
    """One text and where it was found."""

    name: str
    """A file's path below its source, or `file:row`."""
    text: str
    counted: tuple[tuple[int, int], ...] | None = None
    """Characters `[start, stop)` whose tokens count in the loss; None is all."""


def documents(
    unit: Unit, *, source: Source, chat: ChatTemplate | None = None, on_skip: OnSkip | None = None
) -> Iterator[RawDocument]:
    """The texts of a unit of `source`, one at a time, also those without a character.

    `chat` renders chats. `on_skip` is called with the name of each file that is not UTF-8 and that
    `on_undecodable: skip` passes over. Raises DataError naming file and row for what is no document.
    """
    match source:
        case TextSource():
            yield from _texts(unit, source=source, on_skip=on_skip)
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
    if source.content == "chat":
        return tuple(dict.fromkeys(value.split(".")[0] for value in source.roles.values()))
    return (source.columns.text or "text",)


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


_READERS: dict[str, Callable[[Row, RowSource, ChatTemplate | None], RawDocument]] = {
    "text": _text_of,
    "chat": _chat_of,
}
