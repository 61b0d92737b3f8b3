"""A rank's part of a checkpoint on its way to disk: copied aside where memory allows, written behind training's back.

The only files that DeepSpeed writes come through here (`CopyingEngine`), each with a checksum of what was meant to be
written; it is compared with what the disk gives back before the file counts as saved.
"""

import io
import os
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import psutil
import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine

from pipeline.errors import RunError
from pipeline.files import sync
from pipeline.plan.checkpoint_dir import SavedFile, crc32_of

COPY_MARGIN = 1.5
"""A copy is made if this many times its size is free in host memory: loader, offload and allocator live there too."""

WRITE_BYTES = 64 * 2**20
"""At a time, so that a writer can tell that it gets on."""

FLUSH_BYTES = 2**30
"""Bytes that the kernel may hold back: of more, one flush could take longer than a stall."""


class CopyingEngine(CheckpointEngine):
    """DeepSpeed's checkpoint engine that only takes states in; `take` hands them out for writing."""

    def __init__(self) -> None:
        super().__init__()
        self.name = type(self).__name__
        self._states: list[tuple[Path, Any]] = []

    def create(self, info: CheckpointCommitInfo) -> None:
        self._states = []

    def save(self, state_dict: Any, path: str) -> None:
        self._states.append((Path(path), state_dict))

    def load(self, path: str, map_location: Any = None) -> Any:
        return torch.load(path, map_location=map_location, weights_only=False)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True

    def preserves_storage_sharing(self) -> bool:
        """False: nothing is written before `take`, which decides about copies itself."""
        return False

    def take(self) -> list[tuple[Path, Any]]:
        """(path, state) of every file that DeepSpeed wanted written."""
        states, self._states = self._states, []
        return states


class PartWriter:
    """Writes this rank's files of one checkpoint, in a thread."""

    def __init__(
        self, states: list[tuple[Path, Any]], *, folder: Path, asynchronous: bool, ranks_per_node: int
    ) -> None:
        self._folder = folder
        self.files: tuple[SavedFile, ...] = ()
        self.error: str | None = None
        """Why this part is not on disk; None if it is."""
        self.moved_bytes = 0
        """Written or read back so far."""
        self._thread: threading.Thread | None = None
        self.is_copied = asynchronous and _room_for_copy(states, ranks_per_node)
        """The tensors are copied aside, so that training may change its own before they are written."""
        self._states = [(path, host_copy(state)) for path, state in states] if self.is_copied else states

    def start(self, *, then: Callable[[], None]) -> None:
        """Write everything, then call `then`; both in a thread."""

        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

        def run() -> None:
            if device is not None:
                torch.cuda.set_device(device)  # of tensors that were not copied aside
            try:
                self._write()
            finally:
                then()

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _write(self) -> None:
        """A failure is kept, not raised: training goes on without this save."""
        states, self._states = self._states, []
        try:
            self.files = tuple(
                write_state(state, path, folder=self._folder, moved=self._moved) for path, state in states
            )
        except Exception as error:  # whatever it is: in a thread nobody else would hear of it, and all would wait
            self.error = (str(error).splitlines() or [repr(error)])[0]

    def _moved(self, count: int) -> None:
        self.moved_bytes += count


def write_state(state: Any, path: Path, *, folder: Path, moved: Callable[[int], None]) -> SavedFile:
    """torch.save to a file inside `folder`, flushed to the disk and read back; `moved` hears of bytes as they go.

    Raises OSError or RuntimeError if it cannot be written, RunError if the disk gives back something else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb", buffering=0) as file:
        counted = _Checksummed(file, moved)
        torch.save(state, cast(IO[bytes], counted))
    sync(path)
    if path.stat().st_size != counted.size_bytes or crc32_of(path, moved) != counted.crc32:
        raise RunError(f"{path} does not hold what was written to it; the disk is failing")
    return SavedFile(str(path.relative_to(folder)), counted.size_bytes, counted.crc32)


class _Checksummed:
    """A file for torch.save to write to, that keeps size and checksum of what came."""

    def __init__(self, file: io.FileIO, moved: Callable[[int], None]) -> None:
        self._file = file
        self._moved = moved
        self._held_back = 0
        self.size_bytes = 0
        self.crc32 = 0

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), WRITE_BYTES):
            self._write(view[start : start + WRITE_BYTES])
        return len(view)

    def _write(self, view: memoryview) -> None:
        self.crc32 = zlib.crc32(view, self.crc32)
        written = 0
        while written < len(view):
            written += self._file.write(view[written:]) or 0
        self.size_bytes += written
        self._held_back += written
        if self._held_back >= FLUSH_BYTES:
            self.flush()
        self._moved(written)

    def flush(self) -> None:
        os.fsync(self._file.fileno())
        self._held_back = 0


def _room_for_copy(states: list[tuple[Path, Any]], ranks_per_node: int) -> bool:
    """Whether every rank of this node may copy its states aside. A matter of this rank alone: nobody need agree."""
    mine = sum(tensor_bytes(state) for _, state in states)
    return psutil.virtual_memory().available > COPY_MARGIN * mine * ranks_per_node


def host_copy(state: Any) -> Any:
    """The state with every tensor copied into host memory. Sizes stay sizes: DeepSpeed's own readers count on it."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return type(state)({name: host_copy(value) for name, value in state.items()})
    if type(state) in (list, tuple):
        return type(state)(host_copy(value) for value in state)
    return state


def tensor_bytes(state: Any) -> int:
    """Of all tensors in nested maps and lists."""
    if isinstance(state, torch.Tensor):
        return int(state.nbytes)
    if isinstance(state, dict):
        return sum(tensor_bytes(value) for value in state.values())
    if isinstance(state, list | tuple):
        return sum(tensor_bytes(value) for value in state)
    return 0
