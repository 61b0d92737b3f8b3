"""Tensors that wait on a node's own disk. They pass through slots of page-aligned host memory; threads write and read
them, past the page cache where the file system can.

The file has no name: whatever becomes of the process, nothing is left of it. What cannot be written or read is an error
at the next tensor, and always before its own comes back.
"""

import errno
import os
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash

from pipeline.direct_io import open_direct, page_memory, read_at, whole_pages, write_at
from pipeline.errors import RunError
from pipeline.memory.host_arena import host_block

THREADS = 4
PART_BYTES = 16 << 20  # that a thread writes or reads at once
PROBE_BYTES = 64 << 20
GIB = 1 << 30
MOUNTS = Path("/proc/self/mounts")


@dataclass(eq=False)
class Slot:
    """Host memory that a tensor passes through."""

    memory: torch.Tensor
    read_by: Any = None
    """A CUDA event: the GPU still reads from it until then"""


@dataclass(eq=False)
class Piece:
    """A tensor on disk."""

    offset: int
    nbytes: int
    like: torch.Tensor
    """On the meta device: shape and dtype"""
    slot: Slot | None = None
    """While it is on its way"""
    written: list[Future[int]] = field(default_factory=list)
    """A checksum of every part, or 0"""
    read: list[Future[int]] = field(default_factory=list)

    @property
    def waiting(self) -> torch.Tensor:
        """The tensor in its slot."""
        assert self.slot is not None
        return self.slot.memory[: self.nbytes].view(self.like.dtype).view(self.like.shape)


class Disk:
    """A file for tensors: `capacity_bytes` are taken at once, and more where that is not enough.

    Slots take up to `staging_bytes` of host memory; a tensor waits for one until those before it are written. With
    `checksums` what is read is compared with what was written. Raises RunError if the folder or the room is not there.
    """

    def __init__(
        self, folder: Path, *, capacity_bytes: int, staging_bytes: int, pinned: bool, checksums: bool = False
    ) -> None:
        self.held_bytes = 0
        self.peak_bytes = 0
        self._folder, self._capacity_bytes, self._staging_bytes = folder, capacity_bytes, staging_bytes
        self._pinned, self._checksums = pinned, checksums
        self._descriptor = self._open(capacity_bytes)
        device = torch.cuda.current_device() if pinned else None
        self._threads = ThreadPoolExecutor(
            THREADS, thread_name_prefix="offload-disk", initializer=_work_for, initargs=(device,)
        )
        self._slots: list[Slot] = []
        self._free: list[Slot] = []
        self._writing: deque[Piece] = deque()
        self._end = 0
        self._holes: dict[int, list[int]] = {}
        """Offsets of what was given back, by size."""

    def _open(self, capacity_bytes: int) -> int:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if capacity_bytes > _free_bytes(self._folder):  # told before the disk is filled to its end to find it out
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            handle, name = tempfile.mkstemp(prefix="alst-offload-", dir=self._folder)
            os.close(handle)
            descriptor = open_direct(Path(name), os.O_RDWR)
            os.unlink(name)  # noqa: PTH108
            weakref.finalize(self, os.close, descriptor)
            if capacity_bytes:
                os.posix_fallocate(descriptor, 0, whole_pages(capacity_bytes))
        except OSError as error:
            raise self._failed(f"cannot make room for {capacity_bytes / GIB:.1f} GiB on this rank", error) from None
        return descriptor

    def check_rate(self, least: float) -> None:
        """Raises RunError if the disk writes and reads fewer bytes per second than `least`."""
        size = whole_pages(min(PROBE_BYTES, self._capacity_bytes))
        probe = torch.frombuffer(page_memory(size), dtype=torch.uint8)
        probe.random_()  # a disk that compresses is fast with zeros
        piece = Piece(0, size, torch.empty_like(probe, device="meta"), Slot(probe))
        began = time.monotonic()
        written = self._in_parts(piece, lambda view, offset, _: self._write_part(view, offset, None))
        sums = self._results(written, "cannot be written")
        read = self._in_parts(piece, lambda view, offset, part: self._read_part(view, offset, sums[part], None))
        self._results(read, "cannot be read")
        rate = 2 * size / (time.monotonic() - began)
        if rate < least:
            raise RunError(
                f"{self._folder}: {rate / 1e9:.2f} GB/s were seen on this rank, and it must be {least / 1e9:.2f} GB/s, "
                "half of what the plan counts on; set hardware.scratch_gigabytes_per_second to what the disk does, "
                "hardware.scratch to a faster one, or memory.activation_checkpoint.offload: cpu"
            )

    def take(self, tensor: torch.Tensor) -> Piece:
        """A piece for the tensor, in a slot that it can be copied into; waits for one."""
        self._finish_written()
        slot = self._slot(tensor.nbytes)
        while slot is None and self._writing:
            self._finish_oldest()
            slot = self._slot(tensor.nbytes)
        size = whole_pages(tensor.nbytes)
        holes = self._holes.get(size)
        offset = holes.pop() if holes else self._end
        self._end = max(self._end, offset + size)
        self.held_bytes += tensor.nbytes
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        return Piece(offset, tensor.nbytes, torch.empty_like(tensor, device="meta"), slot or self._new_slot(size))

    def write(self, piece: Piece, *, after: Any = None) -> None:
        """Starts to write what is in the piece's slot, once the CUDA event `after` has come."""
        piece.written = self._in_parts(piece, lambda view, offset, _: self._write_part(view, offset, after))
        self._writing.append(piece)

    def start_reading(self, piece: Piece, *, wait_for_slot: bool = False) -> bool:
        """Starts to read the piece into a slot, if one is free; whether it has."""
        if piece.read:
            return True
        self._finish_written()
        if piece in self._writing:
            if not wait_for_slot:
                return False
            while piece in self._writing:
                self._finish_oldest()
        slot = self._slot(piece.nbytes)
        if slot is None and not wait_for_slot:
            return False
        piece.slot = slot or self._new_slot(whole_pages(piece.nbytes))
        busy = piece.slot.read_by
        sums = self._results(piece.written, "cannot write layer inputs")
        piece.read = self._in_parts(piece, lambda view, offset, part: self._read_part(view, offset, sums[part], busy))
        return True

    def is_read(self, piece: Piece) -> bool:
        return bool(piece.read) and all(future.done() for future in piece.read)

    def fetched(self, piece: Piece) -> torch.Tensor:
        """The tensor in its slot, once it is read. Raises RunError if it could not be, or is not what was written."""
        self._results(piece.read, "cannot read layer inputs back")
        return piece.waiting

    def free_slot(self, piece: Piece, *, read_by: Any = None) -> None:
        """The piece is where it was wanted, and on disk; its slot is free once the CUDA event `read_by` has come."""
        assert piece.slot is not None
        piece.slot.read_by = read_by
        self._free.append(piece.slot)
        piece.slot, piece.read = None, []

    def give_back(self, piece: Piece) -> None:
        """The piece is done with; its slot is free already."""
        self.held_bytes -= piece.nbytes
        self._holes.setdefault(whole_pages(piece.nbytes), []).append(piece.offset)
        if self.held_bytes == 0:
            self._end, self._holes = 0, {}

    @property
    def staged_bytes(self) -> int:
        """Of host memory, for what is on its way."""
        return sum(slot.memory.nbytes for slot in self._slots)

    def _finish_written(self) -> None:
        while self._writing and all(future.done() for future in self._writing[0].written):
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        """Waits for what has been written longest; its slot is free then."""
        piece = self._writing.popleft()
        wait(piece.written)
        slot, piece.slot = piece.slot, None
        assert slot is not None
        self._free.append(slot)
        self._results(piece.written, "cannot write layer inputs")

    def _results(self, futures: list[Future[int]], what: str) -> list[int]:
        try:
            return [future.result() for future in futures]
        except OSError as error:
            raise self._failed(what, error) from None

    def _slot(self, nbytes: int) -> Slot | None:
        """The smallest free slot that is large enough, or a new one where the staging memory has room for it."""
        fitting = [slot for slot in self._free if slot.memory.nbytes >= nbytes]
        if fitting:
            slot = min(fitting, key=lambda slot: slot.memory.nbytes)
            self._free.remove(slot)
            return slot
        size = whole_pages(nbytes)
        return self._new_slot(size) if self.staged_bytes + size <= self._staging_bytes else None

    def _new_slot(self, size: int) -> Slot:
        slot = Slot(host_block(size, pinned=self._pinned))
        self._slots.append(slot)
        return slot

    def _in_parts(self, piece: Piece, work: Callable[[memoryview, int, int], int]) -> list[Future[int]]:
        """The piece's slot, part by part, each in a thread: (its memory, offset in the file, number)."""
        assert piece.slot is not None
        view = piece.slot.memory.numpy().data.cast("B")[: whole_pages(piece.nbytes)]
        begins = range(0, len(view), PART_BYTES)
        return [
            self._threads.submit(work, view[begin : begin + PART_BYTES], piece.offset + begin, part)
            for part, begin in enumerate(begins)
        ]

    def _write_part(self, view: memoryview, offset: int, after: Any) -> int:
        if after is not None:
            after.synchronize()
        write_at(self._descriptor, view, offset, self._folder / "offload")
        return xxhash.xxh3_64_intdigest(view) if self._checksums else 0

    def _read_part(self, view: memoryview, offset: int, checksum: int, busy: Any) -> int:
        if busy is not None:
            busy.synchronize()
        read_at(self._descriptor, view, offset, self._folder / "offload")
        if self._checksums and (found := xxhash.xxh3_64_intdigest(view)) != checksum:
            raise RunError(
                f"{self._folder}: what was read at byte {offset:,} is not what was written (checksum {found:x}, not "
                f"{checksum:x}); the disk is not to be trusted: set hardware.scratch to another, or exclude this node"
            )
        return 0

    def _failed(self, what: str, error: OSError) -> RunError:
        try:
            free = f"{_free_bytes(self._folder) / GIB:.1f} GiB are free"
        except OSError:
            free = "it cannot be looked at"
        return RunError(
            f"{self._folder}: {what} ({error.strerror}; {free}); make room there, set hardware.scratch to another "
            "folder, or memory.activation_checkpoint.offload: cpu"
        )


def _work_for(device: int | None) -> None:
    """A thread that waits for an event of a GPU makes a context on the first one, if it is of no other."""
    if device is not None:
        torch.cuda.set_device(device)


def _free_bytes(folder: Path) -> int:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def check_is_disk(folder: Path) -> None:
    """Raises RunError if the folder lies in memory, as /tmp does on many nodes: it would take what it is to spare."""
    mounts = [line.split()[1:3] for line in MOUNTS.read_text().splitlines()] if MOUNTS.exists() else []
    holding = [(place, kind) for place, kind in mounts if folder.resolve().is_relative_to(place)]
    kind = max(reversed(holding), key=lambda mount: len(mount[0]))[1] if holding else ""  # the last hides the others
    if kind in ("tmpfs", "ramfs"):
        raise RunError(
            f"{folder}: lies in memory ({kind}), and must be on a disk; set hardware.scratch (a cluster's `scratch`) "
            "to a folder on the node's own disk, or memory.activation_checkpoint.offload: cpu"
        )
