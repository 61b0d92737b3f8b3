"""Where keys and values of a layer in chunks lie, and the sums of their gradients: on the device, or in host memory.

One layer's at a time. In host memory every block keeps its place from layer to layer; two of them are on the device at
once, one that is used and one that is on its way (FPDT, arXiv 2408.16978, §4.2).
"""

from typing import Literal

import torch

from pipeline.attention.chunks import Pair
from pipeline.memory.host_arena import HostArena
from pipeline.memory.offload import Copies, Handle, StreamCopies

Kind = Literal["k", "v", "dk", "dv"]
BLOCK: tuple[Kind, Kind] = ("k", "v")
SUMS: tuple[Kind, Kind] = ("dk", "dv")


class DeviceBlocks:
    """On the device that computes."""

    def __init__(self) -> None:
        self._blocks: dict[int, Pair] = {}
        self._sums: dict[int, Pair] = {}

    def begin(self) -> None:
        self._blocks.clear()
        self._sums.clear()

    def put(self, chunk: int, keys_values: Pair) -> None:
        self._blocks[chunk] = keys_values

    def start(self, chunk: int, *, grads: bool = False) -> None:
        """It is there."""

    def get(self, chunk: int) -> Pair:
        return self._blocks[chunk]

    def add_grads(self, chunk: int, rows: slice, grads: Pair) -> None:
        if chunk not in self._sums:
            self._sums[chunk] = _zeros_like(self._blocks[chunk])
        _add(self._sums[chunk], rows, grads)

    def take_grads(self, chunk: int) -> Pair | None:
        return self._sums.pop(chunk, None)

    def drop(self, chunk: int) -> None:
        self._blocks.pop(chunk, None)


class HostBlocks:
    """In host memory."""

    def __init__(self, *, capacity_bytes: int = 0, pinned: bool) -> None:
        self._copies: Copies | StreamCopies = StreamCopies() if pinned else Copies()
        self._arena = HostArena(capacity_bytes=capacity_bytes, pinned=pinned)
        self._places: dict[tuple[int, Kind, torch.Size, torch.dtype], torch.Tensor] = {}
        self._there: dict[tuple[int, Kind], Handle] = {}

    @property
    def arena(self) -> HostArena:
        return self._arena

    def begin(self) -> None:
        self._there.clear()
        self._places.clear()
        self._arena.clear()

    def put(self, chunk: int, keys_values: Pair) -> None:
        self._send_pair(chunk, BLOCK, keys_values)

    def start(self, chunk: int, *, grads: bool = False) -> None:
        self._start(chunk, (*BLOCK, *SUMS) if grads else BLOCK)

    def _start(self, chunk: int, kinds: tuple[Kind, ...]) -> None:
        for kind in kinds:
            handle = self._there.get((chunk, kind))
            if handle is not None and handle.resident is None:
                assert handle.waiting is not None
                self._copies.fetch(handle.waiting, handle)

    def get(self, chunk: int) -> Pair:
        self.start(chunk)
        k, v = (self._arrived(chunk, kind) for kind in BLOCK)
        return k, v

    def add_grads(self, chunk: int, rows: slice, grads: Pair) -> None:
        sums = self._sums(chunk)
        if sums is None:
            shapes = [self._there[chunk, kind].waiting for kind in BLOCK]
            k, v = (torch.empty_like(place, device=grads[0].device) for place in shapes if place is not None)
            sums = _zeros_like((k, v))
        _add(sums, rows, grads)
        self._send_pair(chunk, SUMS, sums)

    def take_grads(self, chunk: int) -> Pair | None:
        sums = self._sums(chunk)
        for kind in SUMS:
            self._there.pop((chunk, kind), None)
        return sums

    def drop(self, chunk: int) -> None:
        for kind in BLOCK:
            self._there.pop((chunk, kind), None)

    def _sums(self, chunk: int) -> Pair | None:
        if (chunk, "dk") not in self._there:
            return None
        self._start(chunk, SUMS)  # not the block: whoever wanted it has it
        dk, dv = (self._arrived(chunk, kind) for kind in SUMS)
        return dk, dv

    def _arrived(self, chunk: int, kind: Kind) -> torch.Tensor:
        """Whoever asked holds it from here on."""
        handle = self._there[chunk, kind]
        tensor, handle.resident = self._copies.arrived(handle), None
        return tensor

    def _send_pair(self, chunk: int, kinds: tuple[Kind, Kind], tensors: Pair) -> None:
        for kind, tensor in zip(kinds, tensors, strict=True):
            place = self._place(chunk, kind, tensor)
            handle = Handle(tensor.nbytes, tensor.device, waiting=place)
            self._copies.send(tensor, place, handle)
            self._there[chunk, kind] = handle

    def _place(self, chunk: int, kind: Kind, tensor: torch.Tensor) -> torch.Tensor:
        key = (chunk, kind, tensor.shape, tensor.dtype)
        if key not in self._places:
            _, self._places[key] = self._arena.take(tensor)
        return self._places[key]


def _zeros_like(block: Pair) -> Pair:
    """In float32 or wider: many chunks add to them."""
    k, v = (torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in block)
    return k, v


def _add(sums: Pair, rows: slice, grads: Pair) -> None:
    for total, grad in zip(sums, grads, strict=True):
        total[rows] += grad
