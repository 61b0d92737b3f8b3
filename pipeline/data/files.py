"""Reading what packing wrote: JSON, digests, and bytes at an offset. Writing is `pipeline.files`."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pipeline.errors import DataError


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in `path`, or None where there is no such file. Raises DataError if it is not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); it was damaged: delete it and run `alst pack` again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds no JSON object; it was damaged: delete it and run `alst pack` again")
    return value


def digest(value: Any) -> str:
    """sha256 (hex) of a JSON value; equal values give equal digests on any machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_bytes_at(path: Path, *, offset: int, target: memoryview) -> None:
    """Fills `target` from byte `offset` of `path`, and reads no other byte of it.

    Raises DataError if the file ends before `target` is full.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):
            # Without it the kernel reads ahead: 4.5 times the slice was read from disk (docs/packing).
            os.posix_fadvise(descriptor, offset, len(target), os.POSIX_FADV_RANDOM)
        fill(descriptor, offset=offset, target=target, path=path)
    finally:
        os.close(descriptor)


def fill(descriptor: int, *, offset: int, target: memoryview, path: Path) -> None:
    """Fills `target` from byte `offset` of an open file, 2 GiB a call at most. Raises DataError at the file's end."""
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:]], offset + done)
        if count == 0:
            raise DataError(
                f"{path} ends at byte {offset + done}, and {offset + len(target)} are needed; it was cut off: "
                "copy the data set again, or delete it and pack again"
            )
        done += count
