"""Where tensors wait from forward to backward: on the device, or in host memory.

Backward asks for them in the opposite order, so host memory is a stack: one block, filled from the bottom up and given
back from the top down. On a GPU the copies run on streams of their own; what is asked for next is on its way back
before it is asked for. What was put last may stay on the device (`resident_bytes`), for it is asked for first.
On a CPU copies take the place of transfers, with the same bytes counted.
"""

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import RunError
from pipeline.parallel.waits import waiting
from pipeline.plan.host_memory import ARENA_ALIGNMENT as ALIGNMENT

GROWTH_BYTES = 64 << 20  # of a block that was not planned: small runs and tests
IN_FLIGHT = 2  # tensors on their way out whose device memory is not given back yet
GIB = 1 << 30


class HostArena:
    """Host memory in few large blocks, a stack. Pinned blocks have exactly the bytes that were asked for.

    torch's own pinned memory is rounded up to powers of two, block by block.
    """

    def __init__(self, *, capacity_bytes: int = 0, pinned: bool) -> None:
        self._pinned = pinned
        self._blocks: list[torch.Tensor] = []
        self._tops: list[int] = []
        """Bytes in use of every block."""
        self._taken: list[tuple[int, int]] = []
        """Block, and its top before, of every piece that was taken."""
        self._returned: set[int] = set()
        if capacity_bytes:
            self._grow(capacity_bytes)

    @property
    def reserved_bytes(self) -> int:
        return sum(block.nbytes for block in self._blocks)

    @property
    def pinned_bytes(self) -> int:
        return self.reserved_bytes if self._pinned else 0

    def take(self, like: torch.Tensor) -> tuple[int, torch.Tensor]:
        """Memory for a tensor of that shape and dtype, and its number."""
        size = -(-like.nbytes // ALIGNMENT) * ALIGNMENT
        block = next((b for b, top in enumerate(self._tops) if top + size <= self._blocks[b].nbytes), None)
        if block is None:
            self._grow(max(size, GROWTH_BYTES))
            block = len(self._blocks) - 1
        begin = self._tops[block]
        self._taken.append((block, begin))
        self._tops[block] = begin + size
        piece = self._blocks[block][begin : begin + like.nbytes]
        return len(self._taken) - 1, piece.view(like.dtype).view(like.shape)

    def give_back(self, number: int) -> None:
        """Piece `number` is done with; memory is free again once all that was taken after it is."""
        self._returned.add(number)
        while self._taken and len(self._taken) - 1 in self._returned:
            self._returned.discard(len(self._taken) - 1)
            block, begin = self._taken.pop()
            self._tops[block] = begin

    def _grow(self, size: int) -> None:
        _check_room(size)
        block = torch.empty(size, dtype=torch.uint8)
        if self._pinned:
            _pin(block)
        self._blocks.append(block)
        self._tops.append(0)


def _check_room(size: int) -> None:
    """Raises RunError if the machine has not that much memory left."""
    memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(memory["MemAvailable"].split()[0]) << 10
    if size > available:
        raise RunError(
            f"offload needs {size / GIB:.1f} GiB of host memory on this rank, and {available / GIB:.1f} GiB are left; "
            "raise memory.activation_checkpoint.layers_per_group, set keep_attention: false, or use more nodes"
        )


def _pin(block: torch.Tensor) -> None:
    failed = torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.nbytes, 0)
    if int(failed):
        raise RunError(
            f"{block.nbytes / GIB:.1f} GiB of host memory cannot be pinned (cudaHostRegister: {failed}); raise the "
            "limit of locked memory (`ulimit -l`, or the container's), or offload less"
        )


@dataclass(eq=False)
class Handle:
    """A tensor in a store; `get` gives it back, once."""

    nbytes: int
    device: torch.device
    resident: torch.Tensor | None = None
    """On its device: not sent, or back again"""
    version: int = 0
    """Of the tensor when it was put, where it is still the same memory"""
    waiting: torch.Tensor | None = None
    """In host memory"""
    number: int = -1
    """Of its memory in the arena"""
    arrival: Any = None
    """Of the last copy: on its stream"""


class HostStore:
    """Puts tensors into host memory and brings them back.

    `capacity_bytes` are taken at once, and more where that is not enough; `resident_bytes` of what was put last stay on
    the device; `ahead` tensors are on their way back before they are asked for. Raises RunError if the machine has not
    that memory.
    """

    def __init__(self, *, capacity_bytes: int = 0, resident_bytes: int = 0, ahead: int = 1) -> None:
        self.held_bytes = 0
        self.peak_bytes = 0
        """The most that waited in host memory at once."""
        self._capacity_bytes, self._resident_limit, self._ahead = capacity_bytes, resident_bytes, ahead
        self._arena: HostArena | None = None
        self._copies: _Copies | _StreamCopies | None = None
        self._open: list[Handle] = []
        """All that were put and not asked for, the last on top."""
        self._residents: deque[Handle] = deque()
        self._resident_bytes = 0

    @property
    def reserved_bytes(self) -> int:
        """Of host memory, from the first tensor on."""
        return 0 if self._arena is None else self._arena.reserved_bytes

    @property
    def pinned_bytes(self) -> int:
        """Of what is reserved, what the kernel may not move."""
        return 0 if self._arena is None else self._arena.pinned_bytes

    @property
    def spilled_bytes(self) -> int:
        """The most that waited on disk at once; everything waits in host memory."""
        return 0

    @waiting("offload_stall")
    def put(self, tensor: torch.Tensor) -> Handle:
        """Sends the tensor to host memory, or what was put before it if there is room for it on its device."""
        if self._copies is None:
            self._copies = _StreamCopies() if tensor.is_cuda else _Copies()
            self._arena = HostArena(capacity_bytes=self._capacity_bytes, pinned=tensor.is_cuda)
        handle = Handle(tensor.nbytes, tensor.device, tensor.detach(), tensor._version)
        self._open.append(handle)
        self._residents.append(handle)
        self._resident_bytes += handle.nbytes
        while self._resident_bytes > self._resident_limit:
            self._send(self._residents.popleft())
        return handle

    @waiting("offload_stall")
    def get(self, handle: Handle) -> torch.Tensor:
        """The tensor, on its device. The ones below it are on their way then."""
        assert self._copies is not None
        assert self._arena is not None
        self._open.remove(handle)
        if handle.waiting is None:
            self._residents.remove(handle)
            self._resident_bytes -= handle.nbytes
            tensor = unchanged(handle)
            handle.resident = None
        else:
            self._fetch(handle)
            tensor = self._copies.arrived(handle)
            handle.resident = None  # whoever holds the handle must not hold the tensor
            self._arena.give_back(handle.number)
            self.held_bytes -= handle.nbytes
        for below in self._open[: -self._ahead - 1 : -1]:
            self._fetch(below)
        return tensor

    def _send(self, handle: Handle) -> None:
        assert self._copies is not None
        assert self._arena is not None
        self._resident_bytes -= handle.nbytes
        tensor = unchanged(handle)
        handle.number, handle.waiting = self._arena.take(tensor)
        self._copies.send(tensor, handle)
        handle.resident = None
        self.held_bytes += handle.nbytes
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    def _fetch(self, handle: Handle) -> None:
        if handle.waiting is not None and handle.resident is None:
            assert self._copies is not None
            self._copies.fetch(handle)


def unchanged(handle: Handle) -> torch.Tensor:
    """The tensor that stayed where it was. Raises RunError if somebody changed it."""
    assert handle.resident is not None
    if handle.resident._version != handle.version:
        raise RunError("the model changed a layer's input or attention output in place; this model is not supported")
    return handle.resident


class _Copies:
    """On a CPU: copies, at once."""

    def send(self, tensor: torch.Tensor, handle: Handle) -> None:
        assert handle.waiting is not None
        handle.waiting.copy_(tensor)

    def fetch(self, handle: Handle) -> None:
        assert handle.waiting is not None
        handle.resident = handle.waiting.clone()

    def arrived(self, handle: Handle) -> torch.Tensor:
        assert handle.resident is not None
        return handle.resident


class _StreamCopies:
    """On a GPU: a stream for each direction, and events that say who waits for whom."""

    def __init__(self) -> None:
        self._out, self._back = torch.cuda.Stream(), torch.cuda.Stream()
        self._leaving: deque[tuple[torch.cuda.Event, torch.Tensor]] = deque()

    def send(self, tensor: torch.Tensor, handle: Handle) -> None:
        """The copy waits for what computes the tensor, and for reads of the host memory it goes to."""
        assert handle.waiting is not None
        self._out.wait_stream(torch.cuda.current_stream())
        self._out.wait_stream(self._back)
        with torch.cuda.stream(self._out):
            handle.waiting.copy_(tensor, non_blocking=True)
        handle.arrival = self._out.record_event()
        self._leaving.append((handle.arrival, tensor))
        while len(self._leaving) > IN_FLIGHT:  # its memory is used again by computation: not before it has been read
            event, _ = self._leaving.popleft()
            torch.cuda.current_stream().wait_event(event)

    def fetch(self, handle: Handle) -> None:
        """Starts the way back. The memory it goes to may still be read by what was computed before."""
        assert handle.waiting is not None
        handle.resident = torch.empty_like(handle.waiting, device=handle.device)
        self._back.wait_stream(torch.cuda.current_stream())
        self._back.wait_event(handle.arrival)
        with torch.cuda.stream(self._back):
            handle.resident.copy_(handle.waiting, non_blocking=True)
        handle.arrival = self._back.record_event()

    def arrived(self, handle: Handle) -> torch.Tensor:
        """What computes from here on waits for the copy; so does the reuse of memory that is still leaving."""
        assert handle.resident is not None
        while self._leaving:
            event, _ = self._leaving.popleft()
            torch.cuda.current_stream().wait_event(event)
        torch.cuda.current_stream().wait_event(handle.arrival)
        return handle.resident


class DeviceStore:
    """Keeps tensors where they are: activation checkpointing without offload.

    Nothing is copied, so nobody may change them: `get` raises RunError if somebody did.
    """

    held_bytes = peak_bytes = pinned_bytes = spilled_bytes = 0

    def put(self, tensor: torch.Tensor) -> Handle:
        return Handle(tensor.nbytes, tensor.device, tensor.detach(), tensor._version)

    def get(self, handle: Handle) -> torch.Tensor:
        tensor = unchanged(handle)
        handle.resident = None
        return tensor
