"""The checkpoints of a run folder: what each says of itself, which are whole, which may go. No torch in sight.

checkpoints/step-000120/            whole: the name appears when everything in it is written and verified
    checkpoint.json                 CheckpointRecord: step, position in the data, mesh, files with their checksums
    plan.json                       of the job that wrote it
    deepspeed/                      ZeRO's partitions, one file per rank
    rank-00000.pt                   random generators of rank 0
checkpoints/.writing-step-000140/   not whole; the next start removes it
checkpoints/damaged-step-000100/    was whole once and is not any more; kept for whoever wants to look
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, UserError
from pipeline.files import write_json

RECORD_VERSION = 1
RECORD_NAME = "checkpoint.json"
DEEPSPEED_NAME = "deepspeed"
READ_BYTES = 16 * 2**20
_NAME = re.compile(r"step-(\d+)")
_UNFINISHED = (".writing-", ".deleting-", ".universal-")


@dataclass(frozen=True)
class SavedFile:
    """One file of a checkpoint."""

    name: str
    """Relative to the checkpoint's folder."""
    size_bytes: int
    crc32: int


@dataclass(frozen=True)
class CheckpointRecord:
    """What a checkpoint says of itself."""

    step: int
    """Steps done."""
    samples_seen: int
    """Samples of the training order that are done; the next step begins with this position."""
    world_size: int
    dp: int
    sp: int
    zero_stage: int
    packing_key: str
    """Names the packed data set; positions mean nothing in another one."""
    sample_order: str
    """Names the order of its samples; positions mean other samples in another one."""
    commit: str
    saved_at: float
    """Unix seconds."""
    files: tuple[SavedFile, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk."""

    path: Path
    record: CheckpointRecord


def folder_name(step: int) -> str:
    return f"step-{step:06d}"


def writing_name(target: Path) -> str:
    """Of a checkpoint that is not whole yet."""
    return f".writing-{target.name}"


def step_folders(folder: Path) -> list[Path]:
    """The folders that were whole when they got their names, newest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def write_record(folder: Path, record: CheckpointRecord) -> None:
    values = asdict(record)
    write_json(folder / RECORD_NAME, {"record_version": RECORD_VERSION, "crc32": _record_crc32(values), **values})


def _record_crc32(values: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder, by its record alone.

    Raises DataError if the record is damaged or not there, UserError if it is of another version, OSError if it cannot
    be read.
    """
    file = path / RECORD_NAME
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        if (version := raw.pop("record_version")) != RECORD_VERSION:
            raise UserError(
                f"{file} has version {version}, this code {RECORD_VERSION}; go on with the code that wrote it"
            )
        crc32 = raw.pop("crc32")
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file} is damaged ({error})") from error
    names = {field.name for field in fields(CheckpointRecord)}
    if set(raw) != names or crc32 != _record_crc32(raw) or not path.name.endswith(folder_name(raw["step"])):
        raise DataError(f"{file} is damaged (it is not what was written)")
    return Checkpoint(path, CheckpointRecord(**raw | {"files": tuple(SavedFile(**file) for file in raw["files"])}))


def damage(checkpoint: Checkpoint, *, checksums: bool, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with this share of a checkpoint's files, or None. Sizes always, checksums if asked for.

    Ranks look at every `shares`-th file each: together at all of them, and each file is read once. Raises OSError if
    the disk does not answer: that is no damage.
    """
    for file in checkpoint.record.files[share::shares]:
        path = checkpoint.path / file.name
        if not path.exists():
            return f"{path} is not there"
        size = path.stat().st_size
        if size != file.size_bytes:
            return f"{path} has {size:,} bytes, not {file.size_bytes:,}"
        if checksums and crc32_of(path) != file.crc32:
            return f"{path} does not have the bytes that were written (its checksum differs)"
    return None


def crc32_of(path: Path, moved: Callable[[int], None] = lambda count: None) -> int:
    """Of a file's bytes on disk: what the kernel still holds of it is dropped first, where it can be.

    `moved` hears of bytes as they are read.
    """
    checksum = 0
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while block := file.read(READ_BYTES):
            checksum = zlib.crc32(block, checksum)
            moved(len(block))
    return checksum


def set_aside(path: Path) -> Path:
    """Give a damaged checkpoint a name that nobody resumes from. Returns its new path."""
    target, number = path.with_name(f"damaged-{path.name}"), 2
    while target.exists():
        target, number = path.with_name(f"damaged-{path.name}-{number}"), number + 1
    return path.rename(target)


def damaged_folders(folder: Path) -> list[Path]:
    """What `set_aside` left."""
    return sorted(folder.glob("damaged-*"))


def prune(folder: Path, *, keep_last: int, keep_every: int | None) -> list[Path]:
    """Remove all but the newest `keep_last`, and those whose step is a multiple of `keep_every`. Returns what went."""
    gone = []
    for path in step_folders(folder)[keep_last:]:
        step = int(path.name.removeprefix("step-"))
        if keep_every is None or step % keep_every:
            remove(path)
            gone.append(path)
    return gone


def remove(path: Path) -> None:
    """Remove a checkpoint; one that is half removed has no name that anybody resumes from."""
    doomed = path.with_name(f".deleting-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_unfinished(folder: Path) -> list[Path]:
    """Remove what a killed job left half written, half converted or half removed. Returns what went."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.name.startswith(_UNFINISHED)]
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return found
