"""Attention on the CPU in blocks of queries and keys, with online softmax: memory grows with T, never with T x T.

The algorithm of FlashAttention-2 (arXiv 2307.08691) in matmuls; scores are float32, or float64 for float64 inputs.
Letters: T tokens of queries, or of keys, H query heads, J KV heads, G = H / J, D head dim, Q and K tokens of a block
of queries or keys.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pipeline.attention.kernels.interface import AttentionGrads, Capabilities, Scoring, check_call
from pipeline.attention.segments import Segments

QUERY_BLOCK = 128  # the scores of a block stay in a core's cache; 64 and 128 ran alike at head dim 32, 256 slower
KEY_BLOCK = 8192  # bounds the scores of one block: 128 x 8192 x 4 bytes = 4 MiB per head


@dataclass(frozen=True)
class _Block:
    """Queries [q0, q1) against keys [k0, k1). Query a stands at `a + shift`, counted in keys."""

    q0: int
    q1: int
    k0: int
    k1: int
    shift: int


class CpuKernel:
    name = "cpu"
    capabilities = Capabilities(
        dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
        head_dims=None,
        window=True,
        softcap_max_head_dim=sys.maxsize,
        deterministic_max_head_dim=sys.maxsize,
        max_elements=None,
    )

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
        kv_heads = k.shape[1]
        # The scale goes into the queries: one pass less over the scores, which are the bulk of the work.
        q_JGTD = _group(q, kv_heads) * scoring.scale
        k_JTD, v_JTD = _wide(k).transpose(0, 1), _wide(v).transpose(0, 1)
        out_JGTD = q_JGTD.new_zeros(*q_JGTD.shape[:3], v.shape[-1])
        lse_JGT = q_JGTD.new_full(q_JGTD.shape[:3], -math.inf)
        for q0, q1, blocks in _query_blocks(segments, scoring.window):
            softmax = _OnlineSoftmax.start(out_JGTD[:, :, q0:q1], sinks)
            for block in blocks:
                scores, _ = _scores(q_JGTD, k_JTD, block, scoring)
                softmax.add(scores, v_JTD[:, block.k0 : block.k1])
            out_JGTD[:, :, q0:q1], lse_JGT[:, :, q0:q1] = softmax.finish()
        return _ungroup(out_JGTD).to(q.dtype), lse_JGT.flatten(0, 1)

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
        kv_heads = k.shape[1]
        q_JGTD = _group(q, kv_heads) * scoring.scale
        k_JTD, v_JTD = _wide(k).transpose(0, 1), _wide(v).transpose(0, 1)
        dout_JGTD = _group(dout, kv_heads)
        delta_JGT1 = (dout_JGTD * _group(out, kv_heads)).sum(-1, keepdim=True)
        lse_JGT1 = lse.view(*q_JGTD.shape[:3], 1)
        dq_JGTD = torch.zeros_like(q_JGTD)
        dk_JTD, dv_JTD = torch.zeros_like(k_JTD), torch.zeros_like(v_JTD)
        for q0, q1, blocks in _query_blocks(segments, scoring.window):
            queries = slice(q0, q1)
            dout_block = dout_JGTD[:, :, queries]
            for block in blocks:
                keys = slice(block.k0, block.k1)
                scores, slope = _scores(q_JGTD, k_JTD, block, scoring)
                weights = scores.sub_(lse_JGT1[:, :, queries]).exp_()
                dv_JTD[:, keys] += _transposed_times(weights, dout_block)
                dscores = _times(dout_block, v_JTD[:, keys].transpose(1, 2)).sub_(delta_JGT1[:, :, queries])
                dscores.mul_(weights)
                if slope is not None:
                    dscores.mul_(slope)
                dq_JGTD[:, :, queries] += _times(dscores, k_JTD[:, keys])
                dk_JTD[:, keys] += _transposed_times(dscores, q_JGTD[:, :, queries])
        return AttentionGrads(
            dq=_ungroup(dq_JGTD.mul_(scoring.scale)).to(q.dtype),
            dk=dk_JTD.transpose(0, 1).to(k.dtype),
            dv=dv_JTD.transpose(0, 1).to(v.dtype),
            dsinks=None if sinks is None else _sink_grads(sinks, lse_JGT1, delta_JGT1, segments.num_tokens),
        )


@dataclass
class _OnlineSoftmax:
    """Softmax over keys that come block by block: the running maximum, sum and weighted values of a query block."""

    peak: torch.Tensor
    """[J, G, Q, 1]"""
    total: torch.Tensor
    """[J, G, Q, 1], relative to the peak"""
    acc: torch.Tensor | None
    """[J, G, Q, D], relative to the peak; None before the first block"""

    @classmethod
    def start(cls, out_JGQD: torch.Tensor, sinks: torch.Tensor | None) -> "_OnlineSoftmax":
        """Before the first key; a sink is already in the sum."""
        kv_heads, groups, queries, _ = out_JGQD.shape
        if sinks is None:
            # The lowest finite number: a block may hide all its keys from a query, and -inf - -inf is not a number.
            peak = out_JGQD.new_full((kv_heads, groups, queries, 1), torch.finfo(out_JGQD.dtype).min)
            return cls(peak, torch.zeros_like(peak), None)
        peak = sinks.to(out_JGQD.dtype).view(kv_heads, groups, 1, 1).expand(-1, -1, queries, 1)
        return cls(peak, torch.ones_like(peak), None)

    def add(self, scores: torch.Tensor, values: torch.Tensor) -> None:
        """Masked scores [J, G, Q, K], which are overwritten, and their values [J, K, D]."""
        peak = torch.maximum(self.peak, scores.amax(-1, keepdim=True))
        weights = scores.sub_(peak).exp_()
        shrink = (self.peak - peak).exp_()
        self.total = self.total * shrink + weights.sum(-1, keepdim=True)
        weighted = _times(weights, values)
        self.acc = weighted if self.acc is None else self.acc.mul_(shrink).add_(weighted)
        self.peak = peak

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(out [J, G, Q, D], lse [J, G, Q])."""
        assert self.acc is not None, "every query sees a key"
        return self.acc / self.total, (self.peak + self.total.log())[..., 0]


def _query_blocks(segments: Segments, window: int | None) -> Iterator[tuple[int, int, list[_Block]]]:
    """Each block of queries with the blocks of keys that it sees."""
    shift = segments.first_position
    for start, stop in segments.documents():
        for q0 in range(start, stop, QUERY_BLOCK):
            q1 = min(stop, q0 + QUERY_BLOCK)
            first = start if window is None else max(start, q0 + shift - window + 1)
            last = min(q1 + shift, segments.num_keys)
            starts = range(first, last, KEY_BLOCK)
            yield q0, q1, [_Block(q0, q1, k0, min(last, k0 + KEY_BLOCK), shift) for k0 in starts]


def _scores(
    q_JGTD: torch.Tensor, k_JTD: torch.Tensor, block: _Block, scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Masked scores [J, G, Q, K] of scaled queries, and the slope of the soft-cap there (None without one)."""
    scores = _times(q_JGTD[:, :, block.q0 : block.q1], k_JTD[:, block.k0 : block.k1].transpose(1, 2))
    slope = None
    if scoring.softcap is not None:
        capped = scores.div_(scoring.softcap).tanh_()
        slope = 1 - capped.square()
        scores = capped.mul_(scoring.softcap)
    _hide(scores, block, scoring.window)
    return scores, slope


def _hide(scores: torch.Tensor, block: _Block, window: int | None) -> None:
    """-inf where a query may not see a key; touches only the columns where that can be."""
    ahead = max(0, block.q0 + block.shift + 1 - block.k0)  # keys up to the first query are behind every query
    if ahead < scores.shape[-1]:
        queries, keys = _places(block, slice(ahead, None), scores.device)
        scores[..., ahead:].masked_fill_(keys > queries, -math.inf)
    if window is None:
        return
    behind = block.q1 + block.shift - window - block.k0  # keys from here on are inside every query's window
    if behind > 0:
        queries, keys = _places(block, slice(None, behind), scores.device)
        scores[..., :behind].masked_fill_(keys <= queries - window, -math.inf)


def _places(block: _Block, columns: slice, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the queries [Q, 1] and of some of the keys [1, columns], counted in keys."""
    queries = torch.arange(block.q0 + block.shift, block.q1 + block.shift, device=device)[:, None]
    return queries, torch.arange(block.k0, block.k1, device=device)[None, columns]


def _sink_grads(sinks: torch.Tensor, lse_JGT1: torch.Tensor, delta_JGT1: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """A sink's probability p takes from every value: d loss / d sink = -sum over tokens of p * delta."""
    shape = lse_JGT1.shape[:2]
    weights = (sinks.to(lse_JGT1.dtype).view(*shape, 1, 1) - lse_JGT1[:, :, :num_tokens]).exp()
    return -(weights * delta_JGT1[:, :, :num_tokens]).sum((2, 3)).flatten().to(sinks.dtype)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """In the dtype of the scores: float32, or float64 for float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _group(x_THD: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[T, H, D] -> [J, G, T, D]: the query heads of a KV head together, so that keys need no copies."""
    tokens, heads, dim = x_THD.shape
    return _wide(x_THD).reshape(tokens, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3).contiguous()


def _ungroup(x_JGTD: torch.Tensor) -> torch.Tensor:
    """[J, G, T, D] -> [T, H, D]."""
    return x_JGTD.flatten(0, 1).transpose(0, 1).contiguous()


def _times(x_JGQA: torch.Tensor, y_JAB: torch.Tensor) -> torch.Tensor:
    """[J, G, Q, A] x [J, A, B] -> [J, G, Q, B]."""
    kv_heads, groups, queries, _ = x_JGQA.shape
    return torch.bmm(x_JGQA.reshape(kv_heads, groups * queries, -1), y_JAB).view(kv_heads, groups, queries, -1)


def _transposed_times(x_JGQA: torch.Tensor, y_JGQB: torch.Tensor) -> torch.Tensor:
    """[J, G, Q, A] x [J, G, Q, B] -> [J, A, B]: summed over the queries of a KV head's group."""
    kv_heads = x_JGQA.shape[0]
    return torch.bmm(
        x_JGQA.reshape(kv_heads, -1, x_JGQA.shape[-1]).transpose(1, 2), y_JGQB.reshape(kv_heads, -1, y_JGQB.shape[-1])
    )
