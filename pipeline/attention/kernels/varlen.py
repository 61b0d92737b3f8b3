"""What all CUDA kernels share, around the two calls of a backend: padding, splitting, head dims, sinks.

A backend sees only rows of documents, contiguous tensors, head dims it runs, fewer than 2^31 elements, and no sinks.
Letters: T tokens, N of them in documents, K keys (N, or of `segments.keys`), H query heads, J KV heads, D head dim.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from pipeline.attention.kernels.interface import (
    AttentionGrads,
    Capabilities,
    Needs,
    Scoring,
    check_call,
    check_supported,
)
from pipeline.attention.kernels.sinks import add_sinks, sink_grads
from pipeline.attention.kernels.split import Piece, pieces
from pipeline.attention.segments import Segments


class VarlenBackend(Protocol):
    """One library's pair of calls. q, out [N, H, D]; k, v [K, J, D]; lse float32 [H, N], natural logarithm."""

    name: str
    capabilities: Capabilities

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scoring: Scoring
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse)."""
        ...

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
        """(dq, dk, dv), from the out and lse that the probabilities are to come from."""
        ...


@dataclass(frozen=True)
class _HeadDims:
    """Of the tensors (query, value) and of the calls, which may be wider."""

    query: int
    value: int
    call_query: int
    call_value: int


@dataclass(frozen=True)
class _Part:
    """What a piece's calls take of q, k and v."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @classmethod
    def of(cls, piece: Piece, dims: _HeadDims, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> "_Part":
        return cls(
            _cut(q, piece.tokens, piece.heads, dims.call_query),
            _cut(k, piece.keys, piece.kv_heads, dims.call_query),
            _cut(v, piece.keys, piece.kv_heads, dims.call_value),
        )


class VarlenKernel:
    """A backend as an AttentionKernel."""

    def __init__(self, backend: VarlenBackend, *, deterministic: bool = False) -> None:
        self.name = backend.name
        self.capabilities = backend.capabilities
        self._backend = backend
        self._deterministic = deterministic

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        segments: Segments,
        scoring: Scoring,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        check_call(sinks, segments, scoring)
        dims = self._head_dims(q, v, scoring)
        calls = self._pieces(q, k, dims, segments, scoring.window)
        if _is_one_plain_call(calls, q, k, dims):
            out, lse = self._backend.forward(q.contiguous(), k.contiguous(), v.contiguous(), segments, scoring)
        else:
            out = q.new_empty(*q.shape[:2], dims.value)
            out[segments.num_tokens :] = 0
            lse = q.new_full((q.shape[1], q.shape[0]), -math.inf, dtype=_wide(q.dtype))
            for piece in calls:
                part = _Part.of(piece, dims, q, k, v)
                piece_out, piece_lse = self._backend.forward(part.q, part.k, part.v, piece.segments, scoring)
                out[piece.tokens, piece.heads] = piece_out[..., : dims.value]
                lse[piece.heads, piece.tokens] = piece_lse
        if sinks is not None:
            add_sinks(out, lse, sinks, segments.num_tokens)
        return out, lse

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        out: torch.Tensor,
        lse: torch.Tensor,
        segments: Segments,
        scoring: Scoring,
    ) -> AttentionGrads:
        check_call(sinks, segments, scoring)
        dims = self._head_dims(q, v, scoring)
        calls = self._pieces(q, k, dims, segments, scoring.window)
        if _is_one_plain_call(calls, q, k, dims):
            dq, dk, dv = self._backend.backward(
                dout.contiguous(),
                q.contiguous(),
                k.contiguous(),
                v.contiguous(),
                out.contiguous(),
                lse.contiguous(),
                segments,
                scoring,
                deterministic=self._deterministic,
            )
        else:
            dq, dk, dv = self._backward_in_pieces(calls, dims, dout, q, k, v, out, lse, scoring)
        dsinks = None if sinks is None else sink_grads(dout, out, lse, sinks, segments.num_tokens)
        return AttentionGrads(dq, dk, dv, dsinks)

    def _backward_in_pieces(
        self,
        calls: list[Piece],
        dims: _HeadDims,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        scoring: Scoring,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(dq, dk, dv) of all rows and heads. Rows of padding stay zero."""
        groups = q.shape[1] // k.shape[1]
        are_sums = any(piece.heads.stop - piece.heads.start < groups for piece in calls)
        dtype = _wide(k.dtype) if are_sums else k.dtype  # a sum over pieces is rounded once, at its end
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
        for piece in calls:
            part = _Part.of(piece, dims, q, k, v)
            piece_dout, piece_out = (_cut(x, piece.tokens, piece.heads, dims.call_value) for x in (dout, out))
            piece_lse = lse[piece.heads, piece.tokens].contiguous()
            piece_dq, piece_dk, piece_dv = self._backend.backward(
                piece_dout,
                part.q,
                part.k,
                part.v,
                piece_out,
                piece_lse,
                piece.segments,
                scoring,
                deterministic=self._deterministic,
            )
            dq[piece.tokens, piece.heads] = piece_dq[..., : dims.query]
            dk[piece.keys, piece.kv_heads] += piece_dk[..., : dims.query]
            dv[piece.keys, piece.kv_heads] += piece_dv[..., : dims.value]
        return dq, dk.to(k.dtype), dv.to(v.dtype)

    def _head_dims(self, q: torch.Tensor, v: torch.Tensor, scoring: Scoring) -> _HeadDims:
        """Also refuses what the backend would ignore without a word, such as a soft-cap."""
        query, value = q.shape[-1], v.shape[-1]
        needs = Needs(
            head_dim=query,
            value_head_dim=value,
            dtype=q.dtype,
            window=scoring.window is not None,
            softcap=scoring.softcap is not None,
            deterministic=self._deterministic,
        )
        check_supported(self, needs)
        call_dims = self.capabilities.fitting(query, value)
        assert call_dims is not None, "check_supported has seen to it"
        return _HeadDims(query, value, *call_dims)

    def _pieces(
        self, q: torch.Tensor, k: torch.Tensor, dims: _HeadDims, segments: Segments, window: int | None
    ) -> list[Piece]:
        return pieces(
            self.capabilities,
            segments,
            heads=q.shape[1],
            kv_heads=k.shape[1],
            head_dim=max(dims.call_query, dims.call_value),
            window=window,
        )


def _is_one_plain_call(calls: list[Piece], q: torch.Tensor, k: torch.Tensor, dims: _HeadDims) -> bool:
    """Whether the backend can take and give the tensors as they are."""
    return (
        len(calls) == 1
        and calls[0].tokens == slice(0, q.shape[0])
        and calls[0].keys == slice(0, k.shape[0])
        and (dims.query, dims.value) == (dims.call_query, dims.call_value)
    )


def _cut(x: torch.Tensor, tokens: slice, heads: slice, head_dim: int) -> torch.Tensor:
    """Contiguous: a view's strides would still span all heads, beyond 2^31 elements. Zeros up to `head_dim`."""
    part = x[tokens, heads]
    missing = head_dim - part.shape[-1]
    return F.pad(part, (0, missing)) if missing else part.contiguous()


def _wide(dtype: torch.dtype) -> torch.dtype:
    """float32; float64 where a test runs a backend in it."""
    return torch.promote_types(dtype, torch.float32)
