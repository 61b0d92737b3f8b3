"""flash-attn 3 (Hopper), built from `hopper/` of the flash-attention repository: `torch.ops.flash_attn_3`.

Read: the repository at its tags v2.8.0 and v2.8.3 and in August 2026. The Python functions changed their keywords
(window_size, later window_size_left and _right; causal, later is_causal); the registered operators did not, except for
what bwd returns, which is not used: it fills dq, dk and dv. The stable-ABI build registers the same operators.

64-bit: tensors go through TMA with int64 strides. Backward's float32 dq_accum (and dk, dv with grouped KV heads) is
[heads, padded tokens * head_dim] with int64 head strides, but the offset in a head, padded tokens * head_dim, is an
int: it wraps when one head alone reaches 2^31 elements, 16.7M tokens at head dim 128. Calls are split below 2^31
elements in all, as for every backend (split.py); a single document beyond the limit of one head is refused.

Earlier keys: aligned at their last, as in flash-attn 2. A left side from keys - 1 on becomes -1, a right one from
queries - 1 on too, and -1 beside a given side becomes keys - 1 or queries - 1, which hide nothing. Deterministic
backward of 2.8 with a window waits for a block of keys that no query sees and that never counts itself as done (since
repaired, commit 5c1627a7): such keys do not get here (split.py).
"""

from importlib import import_module
from typing import Any

import torch

from pipeline.attention.kernels.interface import Capabilities, Scoring
from pipeline.attention.kernels.presence import AbsentError, installed_version
from pipeline.attention.kernels.varlen import VarlenBackend
from pipeline.attention.segments import Segments

NAME = "flash_attention_3"
OLDEST = "3.0.0b1"
INSTALL = "build it from hopper/ of the flash-attention repository, at v2.8.0 or later"


def load(compute_capability: tuple[int, int]) -> tuple[VarlenBackend, str]:
    """The backend and its version. Raises AbsentError, or what the package's import raises."""
    version = installed_version("flash_attn_3", oldest=OLDEST, install=INSTALL)
    if compute_capability[0] != 9:
        raise AbsentError(f"it is for Hopper (9.0), this GPU has {'.'.join(map(str, compute_capability))}")
    import_module("flash_attn_interface")  # registers the operators
    operators = torch.ops.flash_attn_3
    return _FlashAttention3(operators.fwd.default, operators.bwd.default), f"flash-attn-3 {version}"


class _FlashAttention3:
    name = NAME
    capabilities = Capabilities(
        dtypes=(torch.bfloat16, torch.float16),
        head_dims=tuple((dim, dim) for dim in range(8, 257, 8)),
        window=True,
        softcap_max_head_dim=256,
        deterministic_max_head_dim=192,  # bwd refuses "hdim 256", its name for all above 192
        max_elements=2**31 - 1,
        max_documents=2**16 - 1,
    )

    def __init__(self, forward: Any, backward: Any) -> None:
        self._forward = forward
        self._backward = backward

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scoring: Scoring
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # One split: the heuristic may cut keys among thread blocks and merge in another order, for no gain in training.
        out, lse, *_ = self._forward(q, k, v, num_splits=1, **_keywords(segments, scoring))
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
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        keywords = _keywords(segments, scoring)
        self._backward(dout, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, deterministic=deterministic, **keywords)
        return dq, dk, dv


def _keywords(segments: Segments, scoring: Scoring) -> dict[str, Any]:
    """Of both operators."""
    return {
        "cu_seqlens_q": segments.cu_seqlens,
        "cu_seqlens_k": segments.key_cu_seqlens,
        "max_seqlen_q": segments.max_len,
        "max_seqlen_k": segments.max_keys,
        "softmax_scale": scoring.scale,
        "is_causal": segments.keys is None,
        "window_size_left": segments.window_left(scoring.window),
        "window_size_right": segments.window_right(scoring.window),
        "softcap": scoring.softcap or 0.0,
    }
