"""torch's own CUDA kernels: `aten::_flash_attention_forward` and `_backward`, its copy of FlashAttention 2, varlen.

Read: the schemas of torch 2.13 and its `torch.nn.attention.varlen`, which calls the same operators but hides backward
behind autograd; the copy's sources as of torch 2.10 and later. The copy has no soft-cap and one head dim for queries
and values. Nothing has to be installed; it runs on Hopper and Blackwell as on Ampere, so slower than 3 and 4.

64-bit: as flash-attn 2 up to 2.7 (flash_attention_2.py), dq_accum's offsets are 32-bit. Calls are split (split.py).

Earlier keys: the copy handles windows as flash-attn 2 does (flash_attention_2.py); is_causal=True only sets the right
side to 0, so with is_causal=False the two sides alone decide. Absent sides are -1.

Deterministic: the operator reads torch's global switch, so it is set around backward and put back.

Not used: cuDNN. Its varlen operator in torch takes no window and no grouped KV heads, torch's own varlen attention
leaves it off in 2.13, and one call per document would launch thousands for a packed sample.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pipeline.attention.kernels.flash_attention_2 import capabilities_of, longest
from pipeline.attention.kernels.interface import Capabilities, Scoring
from pipeline.attention.kernels.presence import AbsentError, installed_version
from pipeline.attention.kernels.varlen import VarlenBackend
from pipeline.attention.segments import Segments

NAME = "torch"
OLDEST = "2.11.0a0"  # NVIDIA's images carry versions like 2.11.0a0+nv
INSTALL = "pip install 'torch>=2.11'"


def load(compute_capability: tuple[int, int]) -> tuple[VarlenBackend, str]:
    """The backend and its version. Raises AbsentError if this torch has no flash kernels for this GPU."""
    version = installed_version("torch", oldest=OLDEST, install=INSTALL)
    if not torch.backends.cuda.is_flash_attention_available():
        raise AbsentError("this build of torch has no flash attention; install a CUDA build")
    if compute_capability < (8, 0):
        raise AbsentError(f"it needs compute capability 8.0, this GPU has {'.'.join(map(str, compute_capability))}")
    return _TorchFlash(capabilities_of(compute_capability, softcap=False)), f"torch {version}"


class _TorchFlash:
    name = NAME

    def __init__(self, capabilities: Capabilities) -> None:
        self.capabilities = capabilities
        self._forward = torch.ops.aten._flash_attention_forward.default
        self._backward = torch.ops.aten._flash_attention_backward.default

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scoring: Scoring
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cu_seqlens, causal, window = _mask(segments, scoring)
        no_dropout, no_debug_mask = 0.0, False
        out, lse, *_ = self._forward(
            q, k, v, *cu_seqlens, *longest(segments), no_dropout, causal, no_debug_mask, scale=scoring.scale, **window
        )
        return out, lse

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        segments: Segments,
        scoring: Scoring,
        *,
        deterministic: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        cu_seqlens, causal, window = _mask(segments, scoring)
        no_dropout = 0.0
        # Dropout's random state; read by no kernel without dropout, but both must be tensors.
        unused = (torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device))
        with _deterministic_algorithms(deterministic):
            dq, dk, dv = self._backward(
                dout,
                q,
                k,
                v,
                out,
                lse,
                *cu_seqlens,
                *longest(segments),
                no_dropout,
                causal,
                *unused,
                scale=scoring.scale,
                **window,
            )
        return dq, dk, dv


def _mask(segments: Segments, scoring: Scoring) -> tuple[tuple[torch.Tensor, torch.Tensor], bool, dict[str, Any]]:
    """cu_seqlens of queries and keys, whether causal, and both sides of the window."""
    window = {
        "window_size_left": segments.window_left(scoring.window),
        "window_size_right": segments.window_right(scoring.window),
    }
    causal = segments.keys is None and scoring.window is None
    return (segments.cu_seqlens, segments.key_cu_seqlens), causal, window


@contextmanager
def _deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """torch's switch, where it is not already as wanted."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if not wanted or (before and not warn_only):
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
