"""Who may work in an output folder: tasks of one job together, or one process alone. Locks end with their process."""

import errno
import fcntl
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import DataError

PATIENCE_SECONDS = 5.0  # the first task holds the folder alone for the instant in which it writes its key
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextmanager
def shared_by_job(folder: Path, *, key: str, alone: bool) -> Iterator[None]:
    """Holds `folder` together with processes of the same `key`, or `alone`.

    Raises DataError if it is held by another job, or by anyone when we want it alone.
    """
    with _opened(folder / "job.lock") as descriptor:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not _join(descriptor, key=key, alone=alone):
            if time.monotonic() > deadline:
                raise _busy(folder)
            time.sleep(PATIENCE_SECONDS / 20)
        yield


def _join(descriptor: int, *, key: str, alone: bool) -> bool:
    """The first to come writes the key; tasks of that key share the lock from then on."""
    first = _lock(descriptor, fcntl.LOCK_EX)
    if first:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, key.encode(), 0)
    if alone:
        return first
    return _lock(descriptor, fcntl.LOCK_SH) and os.pread(descriptor, len(key) + 1, 0) == key.encode()


@contextmanager
def held(folder: Path, name: str) -> Iterator[bool]:
    """Holds a piece of work; False if another process does."""
    with _opened(folder / f"{name}.lock") as descriptor:
        yield _lock(descriptor, fcntl.LOCK_EX)


@contextmanager
def one_task(folder: Path, name: str) -> Iterator[None]:
    """Holds a task. Raises DataError if another process does."""
    with held(folder, name) as free:
        if not free:
            raise _busy(folder)
        yield


@contextmanager
def one_after_another(folder: Path, name: str) -> Iterator[None]:
    """Holds a piece of work, after whoever holds it now."""
    with _opened(folder / f"{name}.lock") as descriptor:
        _lock(descriptor, fcntl.LOCK_EX, wait=True)
        yield


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, kind: int, *, wait: bool = False) -> bool:
    try:
        fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warnings.warn(
            "the file system has no locks; do not start the same work twice there", RuntimeWarning, stacklevel=1
        )
    return True


def _busy(folder: Path) -> DataError:
    return DataError(
        f"{folder.parent} is being packed by another process; wait for it, end it, or choose another --output"
    )
