"""Reads and writes past the page cache, which large data would only fill; through it where the file system cannot."""

import errno
import mmap
import os
import warnings
from fcntl import F_GETFL, F_SETFL, fcntl
from pathlib import Path

PAGE = 4096  # direct I/O wants memory, file offset and size in multiples of it, on every common file system
DIRECT = getattr(os, "O_DIRECT", 0)


def whole_pages(size: int) -> int:
    """Bytes, rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


def page_memory(size: int) -> mmap.mmap:
    """Zeros that begin at a page, rounded up to whole pages: what direct I/O can read into and write from.

    In huge pages where there are: the kernel pins them sooner and hands them to the disk in larger pieces, which
    writes twice as fast (docs/packing.md).
    """
    memory = mmap.mmap(-1, max(PAGE, whole_pages(size)), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def open_direct(path: Path, flags: int) -> int:
    """A descriptor for direct I/O; one through the page cache, with a warning, where there is none."""
    try:
        return os.open(path, flags | DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    _warn(path)
    return os.open(path, flags, 0o666)


def is_direct(descriptor: int) -> bool:
    return bool(fcntl(descriptor, F_GETFL) & DIRECT)


def write_at(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
    """Writes all of `view`, at `offset`. Raises OSError naming `path` where the disk is full or fails."""
    while view:
        direct = is_direct(descriptor)
        try:
            count = os.pwrite(descriptor, view, offset)
        except OSError as error:
            _through_cache(descriptor, path, error, direct)
            continue
        view, offset = view[count:], offset + count


def read_at(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
    """Fills `view` from `offset` on. Raises OSError naming `path` where the disk fails or the file ends before."""
    while view:
        direct = is_direct(descriptor)
        try:
            count = os.preadv(descriptor, [view], offset)
        except OSError as error:
            _through_cache(descriptor, path, error, direct)
            continue
        if count == 0:
            raise OSError(errno.EIO, "the file ends before what was written to it", str(path))
        view, offset = view[count:], offset + count


def _through_cache(descriptor: int, path: Path, error: OSError, direct: bool) -> None:
    """Some file systems refuse direct I/O only when it is used. Raises the error if that was not it."""
    if error.errno != errno.EINVAL or not direct:
        error.filename = str(path)
        raise error
    fcntl(descriptor, F_SETFL, fcntl(descriptor, F_GETFL) & ~DIRECT)
    _warn(path)


def _warn(path: Path) -> None:
    """Once per process: Python shows a warning of one place and text once."""
    warnings.warn(
        f"the file system of {path.parent} has no direct I/O; writing through the page cache",
        RuntimeWarning,
        stacklevel=1,
    )
