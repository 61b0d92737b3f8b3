"""Where documents come from: text files and JSON lines, streamed in an order that only the sources decide.

First stop of the data path: source -> RawDocument. Nothing here keeps more than one text in memory.
"""

import json
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.files import digest
from pipeline.errors import DataError
from pipeline.recipe.schema import JsonlSource, TextSource

OnSkip = Callable[[str], None]


@dataclass(frozen=True)
class RawDocument:
    """One text and where it was found."""

    source: int
    """Index of the source in the recipe."""
    name: str
    """A file's path below its source, or `file:line`."""
    text: str


def documents(
    source: TextSource | JsonlSource, *, index: int = 0, on_skip: OnSkip | None = None
) -> Iterator[RawDocument]:
    """The documents of a source, one at a time, files in sorted order.

    Texts without a character are passed over. `on_skip` is called with the name of each file that is not UTF-8 and
    that `on_undecodable: skip` passes over. Raises DataError for a source that is missing, empty or unreadable, and
    for a document that is not text.
    """
    files = source_files(source)
    if isinstance(source, JsonlSource):
        yield from _jsonl_documents(source, path=files[0].path, index=index)
        return
    for file in files:
        text = _read_text(file.path, skip=source.on_undecodable == "skip")
        if text is None:
            if on_skip:
                on_skip(file.name)
        elif text:
            yield RawDocument(index, file.name, text)


def fingerprint(source: TextSource | JsonlSource) -> str:
    """sha256 (hex) over what decides the source's documents: its settings, and each file's relative path and size.

    The folder's own path is left out: a copy elsewhere is the same source. An edit that keeps a file's size goes
    unseen; reading every byte of a corpus to see it would cost as much as packing.
    """
    files = [[file.name, file.size] for file in source_files(source)]
    return digest({"settings": source.model_dump(exclude={"path"}), "files": files})


def source_bytes(source: TextSource | JsonlSource) -> int:
    """Bytes of all files of a source."""
    return sum(file.size for file in source_files(source))


def resolve_source_path(path: str) -> Path:
    """The path behind a recipe's `path`: `python:stdlib` is this Python's standard library, `~` the home folder."""
    if path == "python:stdlib":
        return Path(sysconfig.get_path("stdlib"))
    if path.startswith("python:"):
        raise DataError(f"data source {path!r} is not known; the only one of its kind is python:stdlib")
    return Path(path).expanduser()


@dataclass(frozen=True)
class SourceFile:
    """A file of a source: its path, its name below the source, its bytes."""

    path: Path
    name: str
    size: int


def source_files(source: TextSource | JsonlSource) -> list[SourceFile]:
    """The files of a source, sorted by name; at least one. Raises DataError if the path is missing or empty."""
    path = resolve_source_path(source.path)
    try:
        if path.is_dir():
            if isinstance(source, TextSource):
                return _folder_files(source, folder=path)
            raise DataError(f"data source {path} is a folder, and type jsonl reads one file; name the file")
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise DataError(
            f"data source {path} does not exist; set data.sources[].path to a {source.type} file"
        ) from error
    except OSError as error:
        raise DataError(f"data source {path} cannot be read: {error.strerror}; check its permissions") from error
    if size == 0:
        raise DataError(f"data source {path} is empty; a source needs at least one document: name another file")
    return [SourceFile(path, path.name, size)]


def _folder_files(source: TextSource, *, folder: Path) -> list[SourceFile]:
    """The files of `folder` that match; links that lead out of it are not followed."""
    try:
        matches = list(folder.glob(source.glob))
    except (NotImplementedError, ValueError) as error:
        raise DataError(f"glob {source.glob!r} of {folder} is not one: {error}; write it like **/*.txt") from error
    root, found = folder.resolve(), []
    for path in matches:
        relative = path.relative_to(folder)
        if set(relative.parts) & set(source.exclude) or not path.resolve().is_relative_to(root) or not path.is_file():
            continue
        found.append(SourceFile(path, relative.as_posix(), path.stat().st_size))
    if not any(file.size for file in found):
        raise DataError(
            f"data source {folder} has no file with text that matches {source.glob!r} outside {list(source.exclude)} "
            f"({len(matches)} names match; empty files and links that lead out of the folder do not count); "
            "set data.sources[].glob"
        )
    return sorted(found, key=lambda file: file.name)


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


def _jsonl_documents(source: JsonlSource, *, path: Path, index: int) -> Iterator[RawDocument]:
    """The texts of a JSON-lines file; blank lines and empty texts are passed over."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    text = _text_of_line(line, where=f"{path} line {number}", column=source.text_column)
                    if text:
                        yield RawDocument(index, f"{path.name}:{number}", text)
    except OSError as error:
        raise DataError(f"data source {path} cannot be read: {error.strerror}; check its permissions") from error


def _text_of_line(line: bytes, *, where: str, column: str) -> str:
    """The text in one line of JSON; every way in which it can be missing is a DataError that names the line."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 (byte {error.start} of the line); convert the file") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}); every line must be one object") from error
    if not isinstance(record, dict) or column not in record:
        keys = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise DataError(f"{where} has no column {column!r} but {keys}; set data.sources[].text_column")
    text = record[column]
    if not isinstance(text, str):
        raise DataError(f"{where} has a {type(text).__name__} in column {column!r}; it must be a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} has half a surrogate pair at character {error.start}, which is no text; repair or drop the line"
        ) from error
    return text
