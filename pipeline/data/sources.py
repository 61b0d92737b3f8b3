"""Where documents come from: the files of every source, and how they are divided into units of work.

First stop of the data path: source -> Unit. A unit is what one token part is made of; the sources alone decide units,
so that any number of tasks agrees on them. What is in the files, `source_documents` reads.
"""

import os
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash

from pipeline.data.files import digest, read_json
from pipeline.data.manifest import MANIFEST_NAME, read_manifest
from pipeline.errors import DataError
from pipeline.plan.hub_cache import hub_cache, snapshot_of
from pipeline.recipe.schema import (
    HuggingFaceSource,
    JsonlSource,
    PackedSource,
    ParquetSource,
    Source,
    TextSource,
)

UNIT_BYTES = 256 << 20  # a minute of one core's tokenizing; what is tokenized again after a kill
COMPRESSED = (".gz", ".zst")
HASH_BLOCK_BYTES = 64 << 20  # what a thread hashes at a time
HASH_READ_BYTES = 1 << 20
HASH_THREADS = 4
AMOUNTS = {"weight", "tokens"}  # of a source: they decide the plan, not the tokens


@dataclass(frozen=True)
class SourceFile:
    """A file of a source: its path, its name below the source, its bytes."""

    path: Path
    name: str
    size: int


@dataclass(frozen=True)
class Unit:
    """Whole files of a source, or the bytes `[begin, end)` of one."""

    source: int
    """Index of the source in the recipe."""
    files: tuple[SourceFile, ...]
    begin: int = 0
    end: int | None = None
    """null is the end of the files."""

    @property
    def size(self) -> int:
        """Bytes."""
        return (sum(file.size for file in self.files) if self.end is None else self.end) - self.begin


def units(sources: Sequence[Source]) -> list[Unit]:
    """The units of all sources, in the order that decides the documents' ids; about UNIT_BYTES each.

    Text files are gathered, large JSON-lines files are divided between lines, and any other file is a unit.
    """
    return [unit for index, source in enumerate(sources) for unit in _units_of(source, index=index)]


def _units_of(source: Source, *, index: int) -> Iterator[Unit]:
    files = source_files(source)
    if isinstance(source, TextSource):
        yield from _gathered(files, index=index)
        return
    for file in files:
        if isinstance(source, JsonlSource) and file.path.suffix not in COMPRESSED and file.size > UNIT_BYTES:
            for begin in range(0, file.size, UNIT_BYTES):
                yield Unit(index, (file,), begin, min(begin + UNIT_BYTES, file.size))
        else:
            yield Unit(index, (file,))


def _gathered(files: list[SourceFile], *, index: int) -> Iterator[Unit]:
    """Units of whole files; a file larger than a unit is one of its own."""
    gathered: list[SourceFile] = []
    size = 0
    for file in files:
        if gathered and size + file.size > UNIT_BYTES:
            yield Unit(index, tuple(gathered))
            gathered, size = [], 0
        gathered.append(file)
        size += file.size
    yield Unit(index, tuple(gathered))


def content_hash(unit: Unit) -> str:
    """xxh3 (hex) over the hashes of the unit's blocks, several read at a time: 20 GB/s on two cores."""
    with ThreadPoolExecutor(HASH_THREADS) as threads:
        hashes = threads.map(lambda block: _hash_of(*block), _blocks(unit))
        return xxhash.xxh3_128(b"".join(hashes)).hexdigest()


def _blocks(unit: Unit) -> Iterator[tuple[Path, int, int]]:
    """Path, first byte and size of the blocks of its files; an empty file has one, of no byte."""
    for file in unit.files:
        end = file.size if unit.end is None else unit.end
        for begin in range(unit.begin, max(end, unit.begin + 1), HASH_BLOCK_BYTES):
            yield file.path, begin, min(HASH_BLOCK_BYTES, end - begin)


def _hash_of(path: Path, begin: int, size: int) -> bytes:
    """xxh3 of bytes of a file."""
    hasher, memory = xxhash.xxh3_128(), memoryview(bytearray(min(size, HASH_READ_BYTES)))
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(begin)
            while size > 0 and (count := file.readinto(memory[:size])):
                hasher.update(memory[:count])
                size -= count
    except OSError as error:
        raise _unreadable(path, error) from error
    return hasher.digest()


def changed_ns(unit: Unit) -> int:
    """When the newest file of the unit was changed, in ns since the epoch."""
    return max(file.path.stat().st_mtime_ns for file in unit.files)


def fingerprint(source: Source) -> str:
    """sha256 (hex) over what decides the source's documents: its settings, and each file's relative path and size.

    The folder's own path is left out: a copy elsewhere is the same source. An edit that keeps a file's size is seen by
    `content_hash`, which is asked where a file is newer than what was made of it.
    """
    files = [[file.name, file.size] for file in source_files(source)]
    return digest({"settings": source.model_dump(exclude={"path"}), "files": files})


def unit_fingerprint(unit: Unit, *, source: Source) -> str:
    """sha256 (hex) over what decides the tokens of a unit, but for its content and the tokenizer."""
    files = [[file.name, file.size] for file in unit.files]
    settings = source.model_dump(exclude={"path", *AMOUNTS})
    return digest({"settings": settings, "files": files, "range": [unit.begin, unit.end]})


def resolve_source_path(path: str) -> Path:
    """The path behind a recipe's `path`: `python:stdlib` is this Python's standard library, `~` the home folder."""
    if path == "python:stdlib":
        return Path(sysconfig.get_path("stdlib"))
    if path.startswith("python:"):
        raise DataError(f"data source {path!r} is not known; the only one of its kind is python:stdlib")
    return Path(path).expanduser()


def source_files(source: Source) -> list[SourceFile]:
    """The files of a source in order; at least one. Raises DataError if the path is missing or empty."""
    path = resolve_source_path(source.path)
    match source:
        case PackedSource():
            return _packed_files(path)
        case HuggingFaceSource():
            return _hugging_face_files(source, path=path)
    try:
        if path.is_dir():
            return _folder_files(source, folder=path)
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise DataError(
            f"data source {path} does not exist; set data.sources[].path to a {source.type} file"
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    if size == 0:
        raise DataError(f"data source {path} is empty; a source needs at least one document: name another file")
    return [SourceFile(path, path.name, size)]


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"data source {path} cannot be read: {error.strerror or error}; check its permissions")


def _folder_files(source: TextSource | JsonlSource | ParquetSource, *, folder: Path) -> list[SourceFile]:
    """The files of `folder` that match; links that lead out of it are not followed."""
    try:
        matches = list(folder.glob(source.glob))
    except (NotImplementedError, ValueError) as error:
        raise DataError(f"glob {source.glob!r} of {folder} is not one: {error}; write it like **/*.txt") from error
    excluded = set(source.exclude) if isinstance(source, TextSource) else set()
    root, found = folder.resolve(), []
    for path in matches:
        relative = path.relative_to(folder)
        if set(relative.parts) & excluded or not path.resolve().is_relative_to(root) or not path.is_file():
            continue
        found.append(SourceFile(path, relative.as_posix(), path.stat().st_size))
    if not any(file.size for file in found):
        raise DataError(
            f"data source {folder} has no file with text that matches {source.glob!r} outside {sorted(excluded)} "
            f"({len(matches)} names match; empty files and links that lead out of the folder do not count); "
            "set data.sources[].glob"
        )
    return sorted(found, key=lambda file: file.name)


def _packed_files(folder: Path) -> list[SourceFile]:
    manifest = read_manifest(folder)
    if manifest is None:
        raise DataError(f"data source {folder} has no {MANIFEST_NAME}; name a packed data set, made with `alst pack`")
    return [SourceFile(folder / part.name, part.name, part.size_bytes) for part in manifest.parts]


def _hugging_face_files(source: HuggingFaceSource, *, path: Path) -> list[SourceFile]:
    """The Arrow files of a data set that `save_to_disk` wrote, or of one on the hub, in the library's cache."""
    looks_local = path.exists() or path.is_absolute() or source.path.startswith((".", "~"))
    paths = _saved_files(source, folder=path) if looks_local else _hub_files(source.model_dump_json())
    try:
        files = [SourceFile(file, file.name, file.stat().st_size) for file in paths]
    except OSError as error:
        raise _unreadable(Path(str(error.filename)), error) from error
    if not files:
        raise DataError(f"data source {source.path} holds no rows; name another data set")
    return files


def _saved_files(source: HuggingFaceSource, *, folder: Path) -> list[Path]:
    if splits := read_json(folder / "dataset_dict.json"):
        folder = folder / _split_of(source, splits["splits"])
    state = read_json(folder / "state.json")
    if state is None:
        raise DataError(f"data source {folder} has no state.json; name a folder that `save_to_disk` wrote, or the hub")
    return [folder / entry["filename"] for entry in state["_data_files"]]


@lru_cache(maxsize=8)  # asked for files, fingerprint and units; each time it would ask the hub
def _hub_files(source_json: str) -> list[Path]:
    source = HuggingFaceSource.model_validate_json(source_json)
    if source.split and "[" in source.split:
        raise DataError(f"split {source.split!r} is a slice; name the split, and say how much by weight or tokens")
    import datasets

    # Offline the library takes whatever of a data set was loaded last; `alst stage` fetched this very revision.
    staged = datasets.config.HF_HUB_OFFLINE and snapshot_of(
        hub_cache(os.environ), "dataset", source.path, source.revision
    )
    path, revision = (str(staged), None) if staged else (source.path, source.revision)
    try:
        found: Any = datasets.load_dataset(path, source.name, split=source.split, revision=revision)
    except Exception as error:  # the library raises many kinds, from the hub, the network and the data
        raise DataError(
            f"data set {source.path!r} cannot be loaded: {error}; set data.sources[].path, name, split and revision to "
            "one on the hub, or to a folder that save_to_disk wrote"
        ) from error
    if isinstance(found, dict):
        found = found[_split_of(source, list(found))]
    return [Path(entry["filename"]) for entry in found.cache_files]


def _split_of(source: HuggingFaceSource, splits: list[str]) -> str:
    if source.split is None and len(splits) == 1:
        return splits[0]
    if source.split not in splits:
        raise DataError(f"{source.path} has the splits {splits}, not {source.split!r}; set data.sources[].split to one")
    return source.split
