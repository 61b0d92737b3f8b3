"""flash-attn 4 (Hopper and Blackwell), pure Python over NVIDIA's CuTe DSL: `flash_attn.cute.interface`.

Read: the wheels 4.0.0b5, b10 and b36. `_flash_attn_fwd` and `_flash_attn_bwd` take the same keywords in all three;
b36's forward returns five tensors, out and lse first. Soft-capping with cu_seqlens in backward is refused by b5 and
b10, so b36 is the oldest taken. flash-attn 2.8.3 brings an old copy of `flash_attn/cute`: installed after
flash-attn-4 it lies over it, which is recognised by its keywords.

It compiles each variant at its first use, on every rank; FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1 and
FLASH_ATTENTION_CUTE_DSL_CACHE_DIR keep the results on disk.

64-bit: as in flash-attn 3, the float32 accumulators are [heads, padded tokens * head_dim], and the offset in a head,
padded tokens * head_dim, is an Int32: one head of one call stays below 2^31 elements. Layout strides of the tensors
come from DLPack as the DSL types them, not audited; calls are split below 2^31 elements in all (split.py).

Earlier keys: aligned at their last, as in flash-attn 2; None is no bound, and numbers stay as they are. Both sides of a
window are given, as for a query's own rows, so that both take the same compiled variant; without a window, earlier
keys are a variant of their own (causal=False), compiled at its first use. Blackwell's own kernels for head dim 256
count blocks of a window apart from the others (Sm100FusedMask), read only in part.

Sinks: it has `learnable_sink`, forward and backward; unused, so that all backends share one tested path (sinks.py).
"""

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from pipeline.attention.kernels.interface import Capabilities, Scoring
from pipeline.attention.kernels.presence import AbsentError, installed_version
from pipeline.attention.kernels.varlen import VarlenBackend
from pipeline.attention.segments import Segments

NAME = "flash_attention_4"
OLDEST = "4.0.0b36"
INSTALL = "pip install --pre 'flash-attn-4>=4.0.0b36' (CUDA 13: 'flash-attn-4[cu13]')"


def capabilities_of(compute_capability: tuple[int, int]) -> Capabilities:
    """Of Hopper (9.x) or Blackwell (10.x, 11.x)."""
    hopper = compute_capability[0] == 9
    dims = range(8, 257 if hopper else 129, 8)
    pairs = tuple((query, value) for query in dims for value in dims)
    return Capabilities(
        dtypes=(torch.bfloat16, torch.float16),
        head_dims=pairs if hopper else (*pairs, (192, 128), (256, 256)),
        window=True,
        softcap_max_head_dim=256 if hopper else 192,  # Blackwell's own backward for head dim 256 refuses it
        deterministic_max_head_dim=256,
        max_elements=2**31 - 1,
        max_documents=2**16 - 1,
    )


def load(compute_capability: tuple[int, int]) -> tuple[VarlenBackend, str]:
    """The backend and its version. Raises AbsentError, or what the package's import raises."""
    version = installed_version("flash-attn-4", oldest=OLDEST, install=INSTALL)
    if compute_capability[0] not in (9, 10, 11):
        raise AbsentError(
            f"it is for Hopper and Blackwell (9.x to 11.x), this GPU has {'.'.join(map(str, compute_capability))}"
        )
    library = import_module("flash_attn.cute.interface")
    check_keywords(library._flash_attn_fwd, "return_lse")
    check_keywords(library._flash_attn_bwd, "deterministic")
    return _FlashAttention4(library, capabilities_of(compute_capability)), f"flash-attn-4 {version}"


def check_keywords(function: Callable[..., Any], *more: str) -> None:
    """Raises AbsentError if the function does not take the keywords that it will be given."""
    nothing = Segments(cu_seqlens=torch.zeros(1, dtype=torch.int32), bounds=(0,), max_len=0)
    missing = {*_keywords(nothing, Scoring(scale=1.0)), *more} - inspect.signature(function).parameters.keys()
    if missing:
        raise AbsentError(
            f"{function.__name__} has no {', '.join(sorted(missing))}: flash_attn/cute is the copy that flash-attn 2 "
            "brings; install flash-attn-4 after it: pip install --force-reinstall --no-deps --pre flash-attn-4"
        )


class _FlashAttention4:
    name = NAME

    def __init__(self, library: Any, capabilities: Capabilities) -> None:
        self.capabilities = capabilities
        self._forward = library._flash_attn_fwd
        self._backward = library._flash_attn_bwd

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scoring: Scoring
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, *_ = self._forward(q, k, v, return_lse=True, **_keywords(segments, scoring))
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
        keywords = _keywords(segments, scoring)
        dq, dk, dv = self._backward(q, k, v, out, dout, lse, deterministic=deterministic, **keywords)
        return dq, dk, dv


def _keywords(segments: Segments, scoring: Scoring) -> dict[str, Any]:
    """Of both calls. A window is given by its two sides alone, as the library's own causal calls are resolved."""
    return {
        "cu_seqlens_q": segments.cu_seqlens,
        "cu_seqlens_k": segments.key_cu_seqlens,
        "max_seqlen_q": segments.max_len,
        "max_seqlen_k": segments.max_keys,
        "softmax_scale": scoring.scale,
        "causal": segments.keys is None,
        "window_size_left": None if scoring.window is None else segments.window_left(scoring.window),
        "window_size_right": None if scoring.window is None else segments.window_right(scoring.window),
        "softcap": scoring.softcap or 0.0,
    }
