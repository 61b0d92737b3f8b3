"""Attention of a sample in chunks: who sees whom, which blocks are asked for, and that the parts are the whole."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.attention.chunks import ChunkAttention, ChunkedSample, Pair
from pipeline.attention.kernels import Scoring
from pipeline.attention.kernels.cpu import CpuKernel
from pipeline.attention.segments import rectangles, segments_of
from pipeline.memory.keys_values import DeviceBlocks, HostBlocks
from pipeline.parallel.shard import Layout

CPU = torch.device("cpu")


def chunked(bounds: tuple[int, ...], seq_len: int, chunk_tokens: int) -> ChunkedSample:
    return ChunkedSample(segments_of(torch.tensor(bounds), device=CPU), Layout(seq_len, 1, chunk_tokens))


def seen_by_definition(bounds: tuple[int, ...], seq_len: int, window: int | None) -> torch.Tensor:
    """[query, key]."""
    seen = torch.zeros(seq_len, seq_len, dtype=torch.bool)
    for start, stop in pairwise(bounds):
        for query in range(start, stop):
            first = start if window is None else max(start, query - window + 1)
            seen[query, first : query + 1] = True
    return seen


def times_seen_in_chunks(sample: ChunkedSample, window: int | None) -> torch.Tensor:
    """[query, key]: in how many of the calls a query sees a key."""
    seq_len = sample.layout.seq_len
    times = torch.zeros(seq_len, seq_len, dtype=torch.int)
    for number, chunk in enumerate(sample.layout.chunks):
        own = sample.within(number)
        times[chunk.start : chunk.stop, chunk.start : chunk.stop] += seen_by_definition(
            own.bounds, chunk.tokens, window
        ).int()
        for block in sample.earlier(number, window):
            first_key = sample.layout.chunks[block.chunk].start + block.keys.start
            keys = block.keys.stop - block.keys.start
            for rows, sees_all in rectangles(block.queries, keys, gap=block.gap, window=window):
                for row in range(rows.start, rows.stop):
                    query = chunk.start + row
                    hidden = 0 if sees_all else max(0, query - window + 1 - first_key)
                    times[query, first_key + hidden : first_key + keys] += 1
    return times


@st.composite
def samples(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int, int | None]:
    seq_len = draw(st.integers(1, 40))
    n_tokens = draw(st.integers(1, seq_len))
    inner = draw(st.sets(st.integers(1, max(n_tokens - 1, 1)), max_size=6))
    bounds = (0, *sorted(bound for bound in inner if bound < n_tokens), n_tokens)
    window = draw(st.none() | st.integers(1, 12))
    return bounds, seq_len, draw(st.integers(1, 45)), window


@settings(max_examples=300, deadline=None)
@given(samples())
def test_every_key_that_a_query_may_see_is_seen_once_and_no_other(case):
    bounds, seq_len, chunk_tokens, window = case
    sample = chunked(bounds, seq_len, chunk_tokens)
    assert torch.equal(times_seen_in_chunks(sample, window), seen_by_definition(bounds, seq_len, window).int())


@settings(max_examples=300, deadline=None)
@given(samples())
def test_no_chunk_looks_back_beyond_what_is_still_there(case):
    bounds, seq_len, chunk_tokens, window = case
    sample = chunked(bounds, seq_len, chunk_tokens)
    first = [sample.first_seen(number, window) for number in range(len(sample.layout.chunks) + 1)]
    assert first == sorted(first)
    for number in range(len(sample.layout.chunks)):
        for block in sample.earlier(number, window):
            assert block.chunk >= first[number]


class Watched(DeviceBlocks):
    """Tells which blocks were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def get(self, chunk: int) -> Pair:
        self.asked.append(chunk)
        return super().get(chunk)


def test_blocks_without_a_document_in_common_are_not_touched():
    sample = chunked((0, 10, 30, 40), 40, 10)
    asked = []
    for number in range(4):
        blocks = Watched()
        for earlier in range(number):
            blocks.put(earlier, (torch.randn(10, 1, 4), torch.randn(10, 1, 4)))
        q, k, v = (torch.randn(10, 2, 4), torch.randn(10, 1, 4), torch.randn(10, 1, 4))
        ChunkAttention(sample, number, blocks).forward(CpuKernel(), q, k, v, None, Scoring(0.5))
        asked.append(blocks.asked)
    assert asked == [[], [], [1], []]


@pytest.mark.parametrize("blocks_of", [DeviceBlocks, lambda: HostBlocks(pinned=False)], ids=["device", "host"])
@pytest.mark.parametrize("window", [None, 3, 9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_parts_are_the_whole_forward_and_backward(blocks_of, window, dtype):
    bounds, seq_len, kernel = (0, 5, 31, 36), 38, CpuKernel()
    generator = torch.Generator().manual_seed(0)
    q, dout = (torch.randn(seq_len, 4, 8, generator=generator).to(dtype) for _ in range(2))
    k, v = (torch.randn(seq_len, 2, 8, generator=generator).to(dtype) for _ in range(2))
    sinks, scoring = torch.randn(4, generator=generator).to(dtype), Scoring(0.35, window=window)
    segments = segments_of(torch.tensor(bounds), device=CPU)
    out, lse = kernel.forward(q, k, v, sinks, segments, scoring)
    whole = kernel.backward(dout, q, k, v, sinks, out, lse, segments, scoring)
    sample, blocks = chunked(bounds, seq_len, 7), blocks_of()
    runs = []
    for number, chunk in enumerate(sample.layout.chunks):
        rows = slice(chunk.start, chunk.stop)
        attention = ChunkAttention(sample, number, blocks)
        attention.enter(k[rows], v[rows], window)
        runs.append((attention, rows, attention.forward(kernel, q[rows], k[rows], v[rows], sinks, scoring)))
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(torch.cat([out for *_, (out, _) in runs]), out, **close)
    dsinks = torch.zeros_like(sinks)
    for attention, rows, (part, part_lse) in reversed(runs):
        saved = (q[rows], k[rows], v[rows], sinks, part, part_lse)
        of = attention.backward(kernel, dout[rows], *saved, scoring)
        blocks.drop(attention.chunk)
        for name in ("dq", "dk", "dv"):
            torch.testing.assert_close(getattr(of, name), getattr(whole, name)[rows], **close, msg=name)
            assert getattr(of, name).dtype == dtype
        dsinks += of.dsinks
    torch.testing.assert_close(dsinks, whole.dsinks, **close)
    assert blocks.take_grads(0) is None, "all sums are taken"
