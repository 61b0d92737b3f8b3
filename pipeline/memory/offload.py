"""Host memory for tensors that wait for backward, with its bytes counted. On a CPU the copy is a stand-in for the
transfer, and the count is the same."""

from dataclasses import dataclass

import torch

from pipeline.errors import RunError


@dataclass(frozen=True)
class Handle:
    """A tensor in the store; `get` gives it back, once."""

    waiting: torch.Tensor
    device: torch.device
    version: int = 0
    """Of the tensor when it was put, where it is still the same memory"""


class HostStore:
    """Puts tensors into host memory and brings them back."""

    def __init__(self) -> None:
        self.held_bytes = 0
        self.peak_bytes = 0
        """The most that waited at once."""

    def put(self, tensor: torch.Tensor) -> Handle:
        """A copy in host memory: pinned, and not waited for, if the tensor is on a GPU."""
        on_gpu = tensor.is_cuda
        waiting = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
        # Same stream as the computation: the GPU's memory is not reused before it has been copied.
        waiting.copy_(tensor, non_blocking=on_gpu)
        self.held_bytes += waiting.nbytes
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        return Handle(waiting, tensor.device)

    def get(self, handle: Handle) -> torch.Tensor:
        self.held_bytes -= handle.waiting.nbytes
        return handle.waiting.to(handle.device, non_blocking=True)


class DeviceStore:
    """Keeps tensors where they are: activation checkpointing without offload.

    Nothing is copied, so nobody may change them: `get` raises RunError if somebody did.
    """

    held_bytes = peak_bytes = 0

    def put(self, tensor: torch.Tensor) -> Handle:
        return Handle(tensor.detach(), tensor.device, tensor._version)

    def get(self, handle: Handle) -> torch.Tensor:
        if handle.waiting._version != handle.version:
            raise RunError(
                "the model changed a layer's input or attention output in place; this model is not supported"
            )
        return handle.waiting
