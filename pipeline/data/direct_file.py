"""A file that is written once, past the page cache: a packed data set is read much later, and a dirty cache stalls the
writer at a fifth of the disk's speed. Where the file system cannot, it is written through the cache, and the cache is
emptied behind it.
"""

import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.direct_io import PAGE, is_direct, open_direct, page_memory, whole_pages, write_at

STAGE_BYTES = 1 << 20
SETTLE_BYTES = 16 << 20  # through the cache, 2.3 GB took 6 s at once and 1.3-1.7 s so; direct I/O takes 1.3 s


def aligned_tokens(count: int) -> NDArray[np.uint32]:
    """uint32 [count], zeros, in memory that direct I/O can write from."""
    return np.frombuffer(page_memory(4 * count), np.uint32, count)


class DirectFile:
    """Appends to a new file. Memory that starts at a page border of the file and of itself is written without a copy.

    Raises OSError where the disk is full or the file cannot be made; use it in a `with`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stage = memoryview(page_memory(STAGE_BYTES))
        self._staged = 0
        self._written = 0
        self._settled = 0
        self._descriptor = open_direct(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    @property
    def position(self) -> int:
        """Bytes so far."""
        return self._written + self._staged

    def __enter__(self) -> "DirectFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            os.close(self._descriptor)

    def write(self, data: Any) -> None:
        """Appends the bytes of a buffer."""
        view = memoryview(data).cast("B")
        if self._staged % PAGE == 0 and len(view) >= PAGE and _address(view) % PAGE == 0:
            self._flush()
            direct = len(view) // PAGE * PAGE
            self._write_out(view[:direct])
            view = view[direct:]
        while view:
            size = min(len(view), STAGE_BYTES - self._staged)
            self._stage[self._staged : self._staged + size] = view[:size]
            self._staged += size
            view = view[size:]
            if self._staged == STAGE_BYTES:
                self._flush()

    def _flush(self) -> None:
        """Writes what is staged; whole pages only."""
        self._write_out(self._stage[: self._staged])
        self._staged = 0

    def _write_out(self, view: memoryview) -> None:
        write_at(self._descriptor, view, self._written, self._path)
        self._written += len(view)
        if self._written - self._settled >= SETTLE_BYTES:
            self._settle()

    def _settle(self) -> None:
        """Gives back the pages of the cache, so that the same few are used again and none is dirty for long."""
        if not is_direct(self._descriptor):
            os.fdatasync(self._descriptor)
            os.posix_fadvise(self._descriptor, self._settled, 0, os.POSIX_FADV_DONTNEED)
        self._settled = self._written

    def _finish(self) -> None:
        """Writes the last page whole and cuts the file to its length."""
        size = self.position
        self._staged = whole_pages(self._staged)
        self._flush()
        os.ftruncate(self._descriptor, size)
        os.fsync(self._descriptor)
        self._settle()


def _address(view: memoryview) -> int:
    return np.frombuffer(view, np.uint8).__array_interface__["data"][0]
