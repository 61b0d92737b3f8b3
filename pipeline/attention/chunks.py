"""Attention of a sample a chunk at a time: a chunk's queries against its own keys, and against blocks of earlier ones.

FPDT (arXiv 2408.16978) for packed documents. Only the document that holds a chunk's first token has keys in earlier
chunks, so blocks that share no document are never touched and the cost is that of the documents. Each block of keys is
a call of its own, which bounds what the kernel's backward allocates; the outputs are merged by their log-sum-exps.
Backward goes from the last chunk to the first: a block's gradients are complete when its own chunk's turn comes.

Letters: C tokens of a chunk over all SP ranks, H query heads and J KV heads of this rank, D and E head dims.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch

from pipeline.attention.kernels import AttentionKernel, Scoring
from pipeline.attention.kernels.interface import AttentionGrads
from pipeline.attention.kernels.sinks import add_sinks, sink_grads
from pipeline.attention.segments import Segments, rectangle, rectangles
from pipeline.parallel.shard import Layout

Pair = tuple[torch.Tensor, torch.Tensor]
"""k [C, J, D] and v [C, J, E] of a chunk, or their gradients."""


class KeysAndValues(Protocol):
    """Of one layer, a block for each chunk, wherever they lie."""

    def begin(self) -> None:
        """A forward begins; of what an earlier one may have left, nothing is wanted."""
        ...

    def put(self, chunk: int, keys_values: Pair) -> None: ...

    def start(self, chunk: int, *, grads: bool = ...) -> None:
        """The block, and what of its gradients there is, will be asked for next."""
        ...

    def get(self, chunk: int) -> Pair: ...

    def add_grads(self, chunk: int, rows: slice, grads: Pair) -> None:
        """Sums in float32 or wider, over some rows of the block."""
        ...

    def take_grads(self, chunk: int) -> Pair | None:
        """The sums, for the last time; None if nothing was added."""
        ...

    def drop(self, chunk: int) -> None:
        """Nobody will ask for the block again; it may be gone already."""
        ...


class KeysAreThereError(Exception):
    """Stops a layer once its keys and values are: what follows is not needed."""


@dataclass(frozen=True)
class EarlierBlock:
    """What queries [0, queries) of a chunk, all of one document, see of an earlier chunk."""

    chunk: int
    keys: slice
    """Rows of that chunk's block, up to its end"""
    queries: int
    gap: int
    """Tokens between its last key and the first query"""


@dataclass(frozen=True, eq=False)
class ChunkedSample:
    """The documents of a sample, as each of its chunks sees them."""

    segments: Segments
    layout: Layout
    _within: dict[int, Segments] = field(default_factory=dict)

    def within(self, chunk: int) -> Segments:
        """The documents, cut at the chunk's borders, from its first row on."""
        if chunk not in self._within:
            part, bounds = self.layout.chunks[chunk], self.segments.bounds
            last = min(part.stop, self.segments.num_tokens)
            inner = bounds[bisect_right(bounds, part.start) : bisect_left(bounds, last)]
            cut = (part.start, *inner, last) if part.start < last else (part.start,)
            starts = tuple(bound - part.start for bound in cut)
            self._within[chunk] = Segments(
                cu_seqlens=torch.tensor(starts, dtype=torch.int32).to(self.segments.cu_seqlens.device),
                bounds=starts,
                max_len=max((stop - start for start, stop in pairwise(starts)), default=0),
            )
        return self._within[chunk]

    def earlier(self, chunk: int, window: int | None) -> list[EarlierBlock]:
        """The blocks that the chunk's first document sees, the earliest first."""
        part, bounds = self.layout.chunks[chunk], self.segments.bounds
        if part.start >= self.segments.num_tokens:
            return []
        document = bisect_right(bounds, part.start) - 1
        reach = bounds[document] if window is None else max(bounds[document], part.start - window + 1)
        queries = min(bounds[document + 1], part.stop) - part.start
        blocks = []
        for number, block in enumerate(self.layout.chunks[:chunk]):
            if block.stop > reach:
                keys = slice(max(reach - block.start, 0), block.tokens)
                blocks.append(EarlierBlock(number, keys, queries, part.start - block.stop))
        return blocks

    def first_seen(self, chunk: int, window: int | None) -> int:
        """The earliest chunk that this one and all after it can see; there is none behind the last."""
        if chunk == len(self.layout.chunks):
            return chunk
        return next((block.chunk for block in self.earlier(chunk, window)), chunk)


@dataclass(eq=False)
class ChunkAttention:
    """A layer's attention while it runs on one chunk: the pair of calls of a kernel, over all keys the chunk sees."""

    sample: ChunkedSample
    chunk: int
    blocks: KeysAndValues
    only_keys: bool = False
    """Stop the layer as soon as its keys and values are there."""
    keeps_block: bool = True
    """Put the chunk's block where later chunks find it."""
    calls: int = 0
    """How often the layer asked for attention; must be once."""
    window: int | None = None
    """As the layer said when it did."""

    def enter(self, k: torch.Tensor, v: torch.Tensor, window: int | None) -> None:
        """Before the kernel is asked. Raises KeysAreThereError if nothing more is wanted."""
        self.calls, self.window = self.calls + 1, window
        if self.keeps_block:
            # A block must not hold more than itself: fused projections give views of queries, keys and values.
            self.blocks.put(self.chunk, (k.detach().contiguous(), v.detach().contiguous()))
        if self.only_keys:
            raise KeysAreThereError

    def forward(
        self,
        kernel: AttentionKernel,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        scoring: Scoring,
    ) -> Pair:
        """(out [C, H, E], lse [H, C])."""
        own = self.sample.within(self.chunk)
        out, lse = kernel.forward(q, k, v, None, own, scoring)
        earlier = self.sample.earlier(self.chunk, scoring.window)
        if earlier:
            total = out.to(lse.dtype)
            for block, (keys, values) in self._blocks(earlier):
                for rows, segments, seen in _calls(block, scoring, q.device):
                    part = kernel.forward(q[rows], keys, values, None, segments, seen)
                    _merge(total[rows], lse[:, rows], *part)
            out = total.to(out.dtype)
        if sinks is not None:
            add_sinks(out, lse, sinks, own.num_tokens)
        return out, lse

    def backward(
        self,
        kernel: AttentionKernel,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        out: torch.Tensor,
        lse: torch.Tensor,
        scoring: Scoring,
    ) -> AttentionGrads:
        """Of the chunk; what earlier blocks get is added to theirs."""
        own = self.sample.within(self.chunk)
        of = kernel.backward(dout, q, k, v, None, out, lse, own, scoring)
        dsinks = None if sinks is None else sink_grads(dout, out, lse, sinks, own.num_tokens)
        dq, earlier = of.dq, self.sample.earlier(self.chunk, scoring.window)
        if earlier:
            total = dq.to(lse.dtype)
            for block, (keys, values) in self._blocks(earlier, grads=True):
                for rows, segments, seen in _calls(block, scoring, q.device):
                    part = kernel.backward(
                        dout[rows], q[rows], keys, values, None, out[rows], lse[:, rows], segments, seen
                    )
                    total[rows] += part.dq
                    self.blocks.add_grads(block.chunk, block.keys, (part.dk, part.dv))
            dq = total.to(dq.dtype)
        dk, dv = self._with_those_of_later_chunks(of)
        return AttentionGrads(dq, dk, dv, dsinks)

    def _blocks(self, earlier: list[EarlierBlock], *, grads: bool = False) -> Iterator[tuple[EarlierBlock, Pair]]:
        """Each block with the keys and values that are seen of it; the next one is on its way."""
        self.blocks.start(earlier[0].chunk, grads=grads)
        for block, following in zip(earlier, [*earlier[1:], None], strict=True):
            keys, values = self.blocks.get(block.chunk)
            if following is not None:
                self.blocks.start(following.chunk, grads=grads)
            yield block, (keys[block.keys], values[block.keys])

    def _with_those_of_later_chunks(self, of: AttentionGrads) -> Pair:
        later = self.blocks.take_grads(self.chunk)
        if later is None:
            return of.dk, of.dv
        return (later[0] + of.dk).to(of.dk.dtype), (later[1] + of.dv).to(of.dv.dtype)


def _calls(block: EarlierBlock, scoring: Scoring, device: torch.device) -> Iterator[tuple[slice, Segments, Scoring]]:
    """(queries, who sees whom, how) of each call for a block: one, but where a window hides a part of it from some."""
    keys = block.keys.stop - block.keys.start
    for rows, sees_all in rectangles(block.queries, keys, gap=block.gap, window=scoring.window):
        segments = rectangle(rows.stop - rows.start, keys, gap=block.gap + rows.start, device=device)
        yield rows, segments, Scoring(scoring.scale, None if sees_all else scoring.window, scoring.softcap)


def _merge(total: torch.Tensor, lse: torch.Tensor, out: torch.Tensor, more: torch.Tensor) -> None:
    """Attention over some keys, and over others: what it is over both, in place. total, out [T, H, E]; lse [H, T]."""
    both = torch.logaddexp(lse, more)
    total.mul_((lse - both).exp_().t()[..., None]).add_(out * (more - both).exp_().t()[..., None])
    lse.copy_(both)
