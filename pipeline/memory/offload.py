"""Where tensors wait from forward to backward: on the device, in host memory, or on disk.

Backward asks for them in the opposite order, so host memory is a stack: one block, filled from the bottom up and given
back from the top down. On a GPU the copies run on streams of their own; what is asked for next is on its way back
before it is asked for. What was put last may stay on the device (`resident_tensors`), for it is asked for first. What
goes to disk passes through host memory, and is read twice as far ahead.
On a CPU copies take the place of transfers, with the same bytes counted.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pipeline.errors import RunError
from pipeline.memory.disk import Disk, Piece
from pipeline.memory.host_arena import HostArena
from pipeline.parallel.waits import waiting

IN_FLIGHT = 2  # tensors on their way out whose device memory is not given back yet


class Store(Protocol):
    """Where tensors wait. `exact` ones come back as they went; others may be rounded."""

    def put(self, tensor: torch.Tensor, *, exact: bool = ...) -> Any: ...

    def get(self, handle: Any) -> torch.Tensor: ...

    def look(self, handle: Any) -> torch.Tensor:
        """The tensor, which goes on waiting where it is."""
        ...

    def start(self, handle: Any) -> None:
        """It will be asked for next."""
        ...


@dataclass(eq=False)
class Handle:
    """A tensor in a store; `get` gives it back, once."""

    nbytes: int
    device: torch.device
    resident: torch.Tensor | None = None
    """On its device: not sent, or back again"""
    version: int = 0
    """Of the tensor when it was put, where it is still the same memory"""
    position: int = 0
    """How many were put before it and are still there"""
    waiting: torch.Tensor | None = None
    """In host memory"""
    number: int = -1
    """Of its memory in the arena"""
    piece: Piece | None = None
    """On disk"""
    arrival: Any = None
    """Of the last copy: on its stream"""

    @property
    def was_sent(self) -> bool:
        return self.waiting is not None or self.piece is not None


class HostStore:
    """Puts tensors into host memory, or on `disk` those that `is_on_disk` says by position, and brings them back.

    `capacity_bytes` are taken at once, and more where that is not enough; the last `resident_tensors` stay on the
    device; `ahead` tensors are on their way back before they are asked for. Raises RunError if the machine has not
    that memory, or the disk fails.
    """

    def __init__(
        self,
        *,
        capacity_bytes: int = 0,
        resident_tensors: int = 0,
        ahead: int = 1,
        disk: Disk | None = None,
        is_on_disk: Callable[[int], bool] = lambda position: False,
    ) -> None:
        self.held_bytes = 0
        self.peak_bytes = 0
        """The most that waited in host memory at once."""
        self.disk = disk
        self._is_on_disk = is_on_disk
        self._capacity_bytes, self._resident_tensors, self._ahead = capacity_bytes, resident_tensors, ahead
        self._arena: HostArena | None = None
        self._copies: Copies | StreamCopies | None = None
        self._open: list[Handle] = []
        """All that were put and not asked for, the last on top."""
        self._residents: deque[Handle] = deque()

    @property
    def reserved_bytes(self) -> int:
        """Of host memory, from the first tensor on."""
        return 0 if self._arena is None else self._arena.reserved_bytes

    @property
    def pinned_bytes(self) -> int:
        """Of what is reserved, what the kernel may not move."""
        if self._arena is None or not self._arena.pinned_bytes:
            return 0
        return self._arena.pinned_bytes + (0 if self.disk is None else self.disk.staged_bytes)

    @property
    def spilled_bytes(self) -> int:
        """The most that waited on disk at once."""
        return 0 if self.disk is None else self.disk.peak_bytes

    def reserve(self, *, pinned: bool) -> None:
        """Takes the memory now; else it is taken with the first tensor."""
        self._copies = StreamCopies() if pinned else Copies()
        self._arena = HostArena(capacity_bytes=self._capacity_bytes, pinned=pinned)

    @waiting("offload_stall")
    def put(self, tensor: torch.Tensor, *, exact: bool = True) -> Handle:
        """Sends the tensor to where it waits, or what was put before it where the last ones stay on their device."""
        if self._copies is None:
            self.reserve(pinned=tensor.is_cuda)
        handle = Handle(tensor.nbytes, tensor.device, tensor.detach(), tensor._version, len(self._open))
        self._open.append(handle)
        self._residents.append(handle)
        if len(self._residents) > self._resident_tensors:
            self._send(self._residents.popleft())
        return handle

    @waiting("offload_stall")
    def get(self, handle: Handle) -> torch.Tensor:
        """The tensor, on its device. The ones below it are on their way then."""
        self._open.remove(handle)
        if handle.was_sent:
            tensor = self._brought_back(handle)
        else:
            self._residents.remove(handle)
            tensor = unchanged(handle)
        handle.resident = None  # whoever holds the handle must not hold the tensor
        for below in self._open[: -self._ahead - 1 : -1]:
            self._fetch(below)
        for below in self._open[-self._ahead - 1 : -2 * self._ahead - 1 : -1]:
            self._start_reading(below)
        return tensor

    @waiting("offload_stall")
    def look(self, handle: Handle) -> torch.Tensor:
        if not handle.was_sent:
            return unchanged(handle)
        tensor = self._on_device(handle)
        handle.resident = None
        return tensor

    def start(self, handle: Handle) -> None:
        if handle.was_sent:
            self._fetch(handle)

    def _send(self, handle: Handle) -> None:
        assert self._copies is not None
        tensor = unchanged(handle)
        if self.disk is not None and self._is_on_disk(handle.position):
            handle.piece = self.disk.take(tensor)
            self._copies.send(tensor, handle.piece.waiting, handle)
            self.disk.write(handle.piece, after=handle.arrival)
        else:
            assert self._arena is not None
            handle.number, handle.waiting = self._arena.take(tensor)
            self._copies.send(tensor, handle.waiting, handle)
            self.held_bytes += handle.nbytes
            self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        handle.resident = None

    def _start_reading(self, handle: Handle) -> None:
        if handle.piece is not None and handle.resident is None:
            assert self.disk is not None
            self.disk.start_reading(handle.piece)

    def _fetch(self, handle: Handle) -> None:
        """Starts the way back to the device, if the tensor is in host memory by now."""
        assert self._copies is not None
        if handle.resident is not None:
            return
        if handle.waiting is not None:
            self._copies.fetch(handle.waiting, handle)
        elif handle.piece is not None:
            assert self.disk is not None
            self.disk.start_reading(handle.piece)
            if self.disk.is_read(handle.piece):
                self._fetch_piece(handle, handle.piece)

    def _fetch_piece(self, handle: Handle, piece: Piece) -> None:
        assert self._copies is not None
        assert self.disk is not None
        self._copies.fetch(self.disk.fetched(piece), handle)
        self.disk.free_slot(piece, read_by=handle.arrival)

    def _on_device(self, handle: Handle) -> torch.Tensor:
        """What was sent, once it is back."""
        assert self._copies is not None
        if handle.piece is not None and handle.resident is None:
            assert self.disk is not None
            self.disk.start_reading(handle.piece, wait_for_slot=True)
            self._fetch_piece(handle, handle.piece)
        self._fetch(handle)
        return self._copies.arrived(handle)

    def _brought_back(self, handle: Handle) -> torch.Tensor:
        tensor = self._on_device(handle)
        if handle.piece is not None:
            assert self.disk is not None
            self.disk.give_back(handle.piece)
        else:
            assert self._arena is not None
            self._arena.give_back(handle.number)
            self.held_bytes -= handle.nbytes
        return tensor


def unchanged(handle: Handle) -> torch.Tensor:
    """The tensor that stayed where it was. Raises RunError if somebody changed it."""
    assert handle.resident is not None
    if handle.resident._version != handle.version:
        raise RunError("the model changed a layer's input or attention output in place; this model is not supported")
    return handle.resident


class Copies:
    """On a CPU: copies, at once."""

    def send(self, tensor: torch.Tensor, into: torch.Tensor, handle: Handle) -> None:
        into.copy_(tensor)

    def fetch(self, waiting: torch.Tensor, handle: Handle) -> None:
        handle.resident = waiting.clone()

    def arrived(self, handle: Handle) -> torch.Tensor:
        assert handle.resident is not None
        return handle.resident

    def settle(self) -> None:
        """What was sent is there, for every reader."""


class StreamCopies:
    """On a GPU: a stream for each direction, and events that say who waits for whom."""

    def __init__(self) -> None:
        self._out, self._back = torch.cuda.Stream(), torch.cuda.Stream()
        self._leaving: deque[tuple[torch.cuda.Event, torch.Tensor]] = deque()

    def send(self, tensor: torch.Tensor, into: torch.Tensor, handle: Handle) -> None:
        """The copy waits for what computes the tensor, and for reads of the host memory it goes to."""
        self._out.wait_stream(torch.cuda.current_stream())
        self._out.wait_stream(self._back)
        with torch.cuda.stream(self._out):
            into.copy_(tensor, non_blocking=True)
        handle.arrival = self._out.record_event()
        self._leaving.append((handle.arrival, tensor))
        while len(self._leaving) > IN_FLIGHT:  # its memory is used again by computation: not before it has been read
            event, _ = self._leaving.popleft()
            torch.cuda.current_stream().wait_event(event)

    def fetch(self, waiting: torch.Tensor, handle: Handle) -> None:
        """Starts the way back. The memory it goes to may still be read by what was computed before."""
        handle.resident = torch.empty_like(waiting, device=handle.device)
        self._back.wait_stream(torch.cuda.current_stream())
        if handle.arrival is not None:  # it was sent from here, and not yet known to be there
            self._back.wait_event(handle.arrival)
        with torch.cuda.stream(self._back):
            handle.resident.copy_(waiting, non_blocking=True)
        handle.arrival = self._back.record_event()

    def arrived(self, handle: Handle) -> torch.Tensor:
        """What computes from here on waits for the copy; so does the reuse of memory that is still leaving."""
        assert handle.resident is not None
        while self._leaving:
            event, _ = self._leaving.popleft()
            torch.cuda.current_stream().wait_event(event)
        torch.cuda.current_stream().wait_event(handle.arrival)
        return handle.resident

    def settle(self) -> None:
        """Waits on the host: from here on it, too, may read what was sent."""
        self._out.synchronize()
        self._leaving.clear()


class DeviceStore:
    """Keeps tensors where they are: activation checkpointing without offload.

    Nothing is copied, so nobody may change them: `get` raises RunError if somebody did.
    """

    held_bytes = peak_bytes = pinned_bytes = spilled_bytes = 0

    def put(self, tensor: torch.Tensor, *, exact: bool = True) -> Handle:
        return Handle(tensor.nbytes, tensor.device, tensor.detach(), tensor._version)

    def get(self, handle: Handle) -> torch.Tensor:
        tensor = unchanged(handle)
        handle.resident = None
        return tensor

    def look(self, handle: Handle) -> torch.Tensor:
        return unchanged(handle)

    def start(self, handle: Handle) -> None:
        """It is there."""
