"""flash-attn 2, 2.7 to 2.8 (Ampere and later): `flash_attn.flash_attn_interface`.

Read: 2.8.3's sdist, and the interface of 2.6, 2.7.0, 2.7.4, 2.8.0 and of the repository in August 2026. From 2.7 on
`_flash_attn_varlen_forward` and `_backward` keep their keywords; 2.6 has others and returns eight tensors.

64-bit: strides of q, k, v, out are int64 and forward is safe while heads * tokens < 2^31 (its lse offset is an int).
Backward is not: `BlockInfo::q_offset` is a template whose type is deduced from its arguments, and for the float32
dq_accum these are ints, so cu_seqlens[i] * heads * head_dim (rounded up) wraps at 2^31 elements: a document that
starts beyond gets another's place. Up to 2.7 the offset within a document wraps as well. 2.8.3 and 2.8.3.post1 still
have it; it was repaired in the repository in February 2026 (commit b62d93f3). So calls are split (split.py), which also
bounds what backward allocates: dq_accum, and with grouped KV heads dk and dv once per *query* head.

Deterministic: dq_accum once per ceil(SMs / (documents * heads)) thread blocks, in all at least SMs * tokens *
head_dim * 4 bytes (H100, head dim 128: 66 KiB per token).

Earlier keys (flash_api.cpp and the kernels of 2.7.0 and 2.8.3): queries and keys are aligned at their last, so query a
sees keys from `a + keys - queries - left` to `a + keys - queries + right`. A side that is not below max_seqlen_k
becomes -1, and -1 beside a side that is given becomes max_seqlen_k. With at most as many queries as keys, either
number on the right hides nothing; with more it would, so `window_left` refuses these. With -1 on both sides and
causal=False nothing is masked, whatever the lengths. Backward takes any lse: P is exp(s - lse), and delta comes from
the out and dout it is given. Keys that no query sees get zeros, but do not get here (split.py).
"""

from importlib import import_module
from typing import Any

import torch

from pipeline.attention.kernels.interface import Capabilities, Scoring
from pipeline.attention.kernels.presence import AbsentError, installed_version
from pipeline.attention.kernels.varlen import VarlenBackend
from pipeline.attention.segments import Segments

NAME = "flash_attention_2"
OLDEST = "2.7.0"
INSTALL = "pip install 'flash-attn>=2.8' --no-build-isolation"

SMALL_SHARED_MEMORY = ((8, 6), (8, 9), (12, 0), (12, 1))
"""Compute capabilities of workstation GPUs: their shared memory does not hold every backward above head dim 192."""


def capabilities_of(compute_capability: tuple[int, int], *, softcap: bool = True) -> Capabilities:
    """Of FlashAttention 2's kernels, also where another package brings them."""
    widest = 192 if compute_capability in SMALL_SHARED_MEMORY else 256
    return Capabilities(
        dtypes=(torch.bfloat16, torch.float16),
        head_dims=tuple((dim, dim) for dim in range(8, widest + 1, 8)),
        window=True,
        softcap_max_head_dim=widest if softcap else 0,
        deterministic_max_head_dim=widest,
        max_elements=2**31 - 1,
        max_documents=2**16 - 1,
    )


def load(compute_capability: tuple[int, int]) -> tuple[VarlenBackend, str]:
    """The backend and its version. Raises AbsentError, or what the package's import raises."""
    version = installed_version("flash-attn", oldest=OLDEST, install=INSTALL)
    if compute_capability < (8, 0):
        raise AbsentError(f"it needs compute capability 8.0, this GPU has {'.'.join(map(str, compute_capability))}")
    library = import_module("flash_attn.flash_attn_interface")
    return _FlashAttention2(library, capabilities_of(compute_capability)), f"flash-attn {version}"


def longest(segments: Segments) -> tuple[int, int]:
    """(queries, keys) of a document, at least 2: for 1 query, forward takes a path for decoding, laid out otherwise."""
    return max(segments.max_len, 2), max(segments.max_keys, 2)


class _FlashAttention2:
    name = NAME

    def __init__(self, library: Any, capabilities: Capabilities) -> None:
        self.capabilities = capabilities
        self._forward = library._flash_attn_varlen_forward
        self._backward = library._flash_attn_varlen_backward

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scoring: Scoring
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, *_ = self._forward(q, k, v, **_keywords(segments, scoring))
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
        self._backward(dout, q, k, v, out, lse, dq, dk, dv, deterministic=deterministic, **keywords)
        return dq, dk, dv


def _keywords(segments: Segments, scoring: Scoring) -> dict[str, Any]:
    """Of both calls."""
    max_queries, max_keys = longest(segments)
    return {
        "cu_seqlens_q": segments.cu_seqlens,
        "cu_seqlens_k": segments.key_cu_seqlens,
        "max_seqlen_q": max_queries,
        "max_seqlen_k": max_keys,
        "dropout_p": 0.0,
        "softmax_scale": scoring.scale,
        "causal": segments.keys is None,
        "window_size_left": segments.window_left(scoring.window),
        "window_size_right": segments.window_right(scoring.window),
        "softcap": scoring.softcap or 0.0,
        "alibi_slopes": None,
    }
