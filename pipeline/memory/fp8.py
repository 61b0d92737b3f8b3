"""What is offloaded, in eight bits: float8_e4m3fn with a scale for every row, and so half of the bytes.

Not exact: an element is rounded by up to 2^-4 of itself, and what backward computes from it with it. How far gradients
are off then is measured in docs/memory.md.
"""

from dataclasses import dataclass

import torch

from pipeline.memory.offload import Handle, Store

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
SCALE_BYTES = 4
TILE_ROWS = 4096  # that are in float32 at a time


@dataclass(eq=False)
class NarrowHandle:
    """A tensor in a store, in eight bits."""

    narrow: Handle
    shape: torch.Size
    dtype: torch.dtype


class Fp8Store:
    """Keeps tensors in `store`, narrow; what is put as `exact` as it is."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def put(self, tensor: torch.Tensor, *, exact: bool = False) -> Handle | NarrowHandle:
        if exact:
            handle: Handle = self.store.put(tensor)
            return handle
        return NarrowHandle(self.store.put(narrowed(tensor)), tensor.shape, tensor.dtype)

    def get(self, handle: Handle | NarrowHandle) -> torch.Tensor:
        if isinstance(handle, Handle):
            return self.store.get(handle)
        return widened(self.store.get(handle.narrow), handle.dtype).view(handle.shape)

    def look(self, handle: Handle | NarrowHandle) -> torch.Tensor:
        if isinstance(handle, Handle):
            return self.store.look(handle)
        return widened(self.store.look(handle.narrow), handle.dtype).view(handle.shape)

    def start(self, handle: Handle | NarrowHandle) -> None:
        self.store.start(handle if isinstance(handle, Handle) else handle.narrow)


def narrowed(tensor: torch.Tensor) -> torch.Tensor:
    """[..., width] -> uint8 [rows, width + 4]: each row's elements, and the float32 that they are multiplied by."""
    rows = tensor.detach().reshape(-1, tensor.shape[-1])
    out = torch.empty(rows.shape[0], rows.shape[1] + SCALE_BYTES, dtype=torch.uint8, device=tensor.device)
    for tile, into in zip(rows.split(TILE_ROWS), out.split(TILE_ROWS), strict=True):
        wide = tile.float()
        scale = wide.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
        into[:, :-SCALE_BYTES] = (wide / scale).to(FP8).view(torch.uint8)
        into[:, -SCALE_BYTES:] = scale.view(torch.uint8)
    return out


def widened(narrow: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The rows that `narrowed` was given, rounded: [rows, width]."""
    out = torch.empty(narrow.shape[0], narrow.shape[1] - SCALE_BYTES, dtype=dtype, device=narrow.device)
    for tile, into in zip(narrow.split(TILE_ROWS), out.split(TILE_ROWS), strict=True):
        scale = tile[:, -SCALE_BYTES:].contiguous().view(torch.float32)
        into.copy_(tile[:, :-SCALE_BYTES].contiguous().view(FP8).float() * scale)
    return out
