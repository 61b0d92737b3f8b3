"""Where the hidden states of a rank's part of the sequence lie between layers: on the device, or in host memory.

What computes reads and writes some rows at a time. On the device rows are views; in host memory they travel, and what
is read next is on its way. There a layer's output is also the next layer's checkpoint: it waits where it is.
"""

import ctypes
import weakref
from dataclasses import dataclass

import torch

from pipeline.memory.host_arena import HostArena
from pipeline.memory.offload import Copies, Handle, StreamCopies


@dataclass(eq=False)
class Link:
    """An output of one of our functions, and whether the next of them took it as it was.

    Then its gradient comes from there, fresh, and is nobody else's: it may be overwritten.
    """

    is_direct: bool = False


class OnDevice:
    """Whole hidden states on the device that computes; `between_layers`, or inside of one, where nobody links."""

    def __init__(self, *, between_layers: bool = True) -> None:
        self._between_layers = between_layers
        self._last: tuple[Link, torch.Tensor] | None = None
        """The newest output. It is held until it is taken: its address is nobody else's so long."""

    def entered(self, hidden_states: torch.Tensor) -> None:
        """One of our functions takes these as its input."""
        last, self._last = self._last, None
        if last is not None and last[1].data_ptr() == hidden_states.data_ptr():
            last[0].is_direct = True

    def made(self, hidden_states: torch.Tensor) -> Link:
        """One of our functions returns these."""
        link = Link()
        if self._between_layers:
            self._last = (link, hidden_states.detach())
        return link

    def begin(self) -> None:
        """A forward begins."""
        self._last = None

    def empty(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """For hidden states, or their gradient; free again once nobody holds it."""
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


class InHostMemory(OnDevice):
    """Whole hidden states in host memory, pinned where there is a GPU."""

    def __init__(self, *, capacity_bytes: int = 0, pinned: bool) -> None:
        super().__init__()
        self._copies: Copies | StreamCopies = StreamCopies() if pinned else Copies()
        self._pool = _Pool(HostArena(capacity_bytes=capacity_bytes, pinned=pinned))
        self._coming: dict[tuple[int, int], Handle] = {}

    @property
    def arena(self) -> HostArena:
        return self._pool.arena

    def begin(self) -> None:
        super().begin()
        self._coming.clear()
        self._pool.forget()

    def empty(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return self._pool.empty(shape, dtype)

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


class _Pool:
    """Tensors in an arena. Each lives as long as somebody holds it or a view of it, as on a device."""

    def __init__(self, arena: HostArena) -> None:
        self.arena = arena
        self._free: dict[int, list[torch.Tensor]] = {}
        self._lent = 0

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        like = torch.empty(shape, dtype=dtype, device="meta")
        free = self._free.setdefault(like.nbytes, [])
        piece = free.pop() if free else self.arena.take(torch.empty(like.nbytes, dtype=torch.uint8, device="meta"))[1]
        lease = (ctypes.c_uint8 * like.nbytes).from_address(piece.data_ptr())
        weakref.finalize(lease, self._give_back, piece)
        self._lent += 1
        return same_memory(torch.frombuffer(lease, dtype=dtype).view(shape))

    def _give_back(self, piece: torch.Tensor) -> None:
        self._free[piece.nbytes].append(piece)
        self._lent -= 1

    def forget(self) -> None:
        """Memory of one shape may serve another from here on, if none of it is lent."""
        if not self._lent:
            self._free.clear()
            self.arena.clear()


def same_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of its own over the same memory: autograd takes it for no view and for no input."""
    fresh = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return fresh.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
