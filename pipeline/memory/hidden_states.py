"""Where the hidden states of a rank's part of the sequence lie between layers: on the device, or in host memory.

What computes reads and writes some rows at a time. On the device rows are views; in host memory they travel, and what
is read next is on its way. There a layer's output is also the next layer's checkpoint: it waits where it is.
"""

from dataclasses import dataclass

import torch

from pipeline.memory.host_arena import HostArena
from pipeline.memory.offload import Copies, Handle, StreamCopies


@dataclass(eq=False)
class Link:
    """An output of one of our functions, and whether the next of them took it as it was.

    Then its gradient comes from there, fresh, and is nobody else's: it may be overwritten.
    """

    data_ptr: int
    is_direct: bool = False


class OnDevice:
    """Whole hidden states on the device that computes."""

    host_bytes = 0

    def __init__(self) -> None:
        self._last: Link | None = None

    def entered(self, hidden_states: torch.Tensor) -> None:
        """One of our functions takes these as its input."""
        if self._last is not None and self._last.data_ptr == hidden_states.data_ptr():
            self._last.is_direct = True

    def made(self, hidden_states: torch.Tensor) -> Link:
        """One of our functions returns these."""
        self._last = Link(hidden_states.data_ptr())
        return self._last

    def begin(self) -> None:
        """A micro-batch begins; nothing is left of the one before."""
        self._last = None

    def empty(self, shape: torch.Size, dtype: torch.dtype, device: torch.device, *, kept: bool = True) -> torch.Tensor:
        """For hidden states, or their gradient. `kept`: a backward follows, which gives them back."""
        return torch.empty(shape, dtype=dtype, device=device)

    def start(self, whole: torch.Tensor, rows: slice, device: torch.device) -> None:
        """These rows will be read next."""

    def read(self, whole: torch.Tensor, rows: slice, device: torch.device) -> torch.Tensor:
        """Rows of [1, S, hidden], on the device."""
        return whole[:, rows]

    def write(self, whole: torch.Tensor, rows: slice, part: torch.Tensor) -> None:
        whole[:, rows] = part

    def settle(self) -> None:
        """What was written is there, for everybody."""

    def give_back(self, data_ptr: int) -> None:
        """Nobody reads what lies there again."""


class InHostMemory(OnDevice):
    """Whole hidden states in host memory, pinned where there is a GPU."""

    def __init__(self, *, capacity_bytes: int = 0, pinned: bool) -> None:
        super().__init__()
        self._copies: Copies | StreamCopies = StreamCopies() if pinned else Copies()
        self._arena = HostArena(capacity_bytes=capacity_bytes, pinned=pinned)
        self._taken: dict[int, torch.Tensor] = {}
        """By address."""
        self._free: list[torch.Tensor] = []
        self._coming: dict[tuple[int, int], Handle] = {}

    @property
    def arena(self) -> HostArena:
        return self._arena

    def begin(self) -> None:
        super().begin()
        self._free += self._taken.values()
        self._taken.clear()
        self._coming.clear()

    def empty(self, shape: torch.Size, dtype: torch.dtype, device: torch.device, *, kept: bool = True) -> torch.Tensor:
        if not kept:
            return torch.empty(shape, dtype=dtype)
        like = torch.empty(shape, dtype=dtype, device="meta")
        fitting = next((n for n, piece in enumerate(self._free) if piece.shape == shape and piece.dtype == dtype), None)
        piece = self._arena.take(like)[1] if fitting is None else self._free.pop(fitting)
        self._taken[piece.data_ptr()] = piece
        return same_memory(piece)

    def start(self, whole: torch.Tensor, rows: slice, device: torch.device) -> None:
        key = (whole.data_ptr(), rows.start)
        if key not in self._coming:
            part = whole[:, rows]
            handle = Handle(part.nbytes, device, waiting=part)
            self._copies.fetch(part, handle)
            self._coming[key] = handle

    def read(self, whole: torch.Tensor, rows: slice, device: torch.device) -> torch.Tensor:
        self.start(whole, rows, device)
        return self._copies.arrived(self._coming.pop((whole.data_ptr(), rows.start)))

    def write(self, whole: torch.Tensor, rows: slice, part: torch.Tensor) -> None:
        self._copies.send(part, whole[:, rows], Handle(part.nbytes, part.device))

    def settle(self) -> None:
        self._copies.settle()

    def give_back(self, data_ptr: int) -> None:
        piece = self._taken.pop(data_ptr, None)
        if piece is not None:
            self._free.append(piece)


def same_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of its own over the same memory: autograd takes it for no view and for no input."""
    fresh = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return fresh.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
