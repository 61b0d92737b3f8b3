"""Attention to blocks of earlier keys: a call against its mask, and a document's parts against the whole."""

import random
from dataclasses import replace
from itertools import product

import pytest
import torch

from pipeline.attention.kernels import (
    Scoring,
    flash_attention_2,
    flash_attention_3,
    flash_attention_4,
    torch_cuda,
)
from pipeline.attention.kernels import cpu as cpu_kernel
from pipeline.attention.kernels.cpu import CpuKernel
from pipeline.attention.kernels.split import pieces
from pipeline.attention.kernels.varlen import VarlenKernel
from pipeline.attention.segments import rectangle, rectangles, segments_of
from pipeline.errors import UserError
from tests.attention_parts import parts_of, random_case, run_in_parts, run_written_out, seen
from tests.unit.test_attention_kernels import ANYTHING, FLASH_2, CpuBackend, elements

CPU = torch.device("cpu")
SIZES = [(8, 12), (12, 8), (1, 5), (5, 1), (1, 1), (2, 3), (17, 17)]
GAPS = [0, 1, 4, 20]
WINDOWS = [None, 1, 2, 5, 9, 12, 17, 18, 30, 31, 100]


@pytest.fixture(params=[(128, 8192), (5, 7)], ids=lambda sizes: f"blocks{sizes[0]}x{sizes[1]}")
def block_sizes(request, monkeypatch):
    """Small blocks too, so that short sequences cross many of them."""
    monkeypatch.setattr(cpu_kernel, "QUERY_BLOCK", request.param[0])
    monkeypatch.setattr(cpu_kernel, "KEY_BLOCK", request.param[1])


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def aligned_at_the_last(queries, keys, left, right):
    """[queries, keys]; -1: no bound."""
    place = torch.arange(queries)[:, None] + keys - queries
    key = torch.arange(keys)[None, :]
    inside = torch.ones(queries, keys, dtype=torch.bool)
    inside &= (key >= place - left) | (left < 0)
    return inside & ((key <= place + right) | (right < 0))


# Who sees what


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("queries", "keys"), SIZES)
def test_queries_are_cut_where_the_mask_turns_from_all_to_some_to_none(queries, keys, window):
    for gap in GAPS:
        mask = seen(queries, keys, gap=gap, window=window)
        in_slices = torch.zeros(queries, dtype=torch.int64)
        for which, sees_all in rectangles(queries, keys, gap=gap, window=window):
            assert which.start < which.stop
            in_slices[which] += 1
            assert mask[which].any(1).all()
            assert bool(mask[which].all()) == sees_all
        assert torch.equal(in_slices, mask.any(1).to(torch.int64))


@pytest.mark.parametrize(("queries", "keys"), SIZES)
def test_a_window_counts_to_the_left_of_keys_aligned_at_their_last(queries, keys):
    """As flash-attn places queries beside keys of another number: bottom right."""
    for gap, window in product(GAPS, WINDOWS):
        mask = seen(queries, keys, gap=gap, window=window)
        for which, sees_all in rectangles(queries, keys, gap=gap, window=window):
            segments = rectangle(which.stop - which.start, keys, gap=gap + which.start, device=CPU)
            left = segments.window_left(None if sees_all else window)
            assert torch.equal(aligned_at_the_last(segments.num_tokens, keys, left, -1), mask[which])


def test_a_window_over_the_queries_own_keys_leaves_out_the_query_itself():
    segments = segments_of(torch.tensor([0, 9], dtype=torch.int32), device=CPU)
    assert (segments.window_left(4), segments.window_left(None)) == (3, -1)


def test_a_window_that_leaves_a_query_without_a_key_is_refused_with_the_numbers():
    q, k, v, dout = (getattr(random_case(8, 12, device=CPU), name) for name in ("q", "k", "v", "dout"))
    segments = rectangle(8, 12, gap=3, device=CPU)
    assert segments.window_left(12) == 0
    with pytest.raises(ValueError, match="8 queries, 3 tokens behind 12 keys, in a window of 11"):
        CpuKernel().forward(q, k, v, None, segments, Scoring(0.3, window=11))
    with pytest.raises(ValueError, match="no more queries than keys"):
        CpuKernel().backward(
            dout, q, k[:7], v[:7], None, dout, dout[..., 0].t(), rectangle(8, 7, gap=0, device=CPU), Scoring(1, 10)
        )


@pytest.mark.parametrize("kernel", [CpuKernel(), VarlenKernel(CpuBackend())], ids=lambda kernel: kernel.name)
def test_sinks_are_refused_with_earlier_keys(kernel):
    case = random_case(3, 5, device=CPU, with_sinks=True)
    segments = rectangle(3, 5, gap=0, device=CPU)
    out, lse = kernel.forward(case.q, case.k, case.v, None, segments, Scoring(1.0))
    with pytest.raises(ValueError, match="they would count twice"):
        kernel.forward(case.q, case.k, case.v, case.sinks, segments, Scoring(1.0))
    with pytest.raises(ValueError, match="they would count twice"):
        kernel.backward(case.dout, case.q, case.k, case.v, case.sinks, out, lse, segments, Scoring(1.0))


@pytest.mark.parametrize(("queries", "keys", "gap"), [(0, 5, 0), (5, 0, 0), (5, 5, -1)])
def test_a_rectangle_without_queries_or_keys_or_with_keys_past_its_queries_is_refused(queries, keys, gap):
    with pytest.raises(ValueError, match=f"{queries} queries, {keys} keys, gap {gap}"):
        rectangle(queries, keys, gap=gap, device=CPU)


# What comes out


@pytest.mark.usefixtures("block_sizes")
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 14, 24, 27])
@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize(("queries", "keys"), [(9, 23), (1, 23), (1, 16), (10, 13)])
def test_a_block_of_earlier_keys_equals_attention_written_out(queries, keys, gap, window, softcap):
    scoring = Scoring(0.7, window=window, softcap=softcap)
    case = random_case(queries, keys, device=CPU)
    segments = rectangle(queries, keys, gap=gap, device=CPU)
    out, lse = CpuKernel().forward(case.q, case.k, case.v, None, segments, scoring)
    grads = CpuKernel().backward(case.dout, case.q, case.k, case.v, None, out, lse, segments, scoring)
    got = {"out": out, "lse": lse, "dq": grads.dq, "dk": grads.dk, "dv": grads.dv}
    assert_same(got, run_written_out(case, seen(queries, keys, gap=gap, window=window), scoring))


@pytest.mark.parametrize(("queries", "keys"), [(23, 9), (5, 1), (1, 1)])
def test_more_queries_than_keys_equal_attention_written_out(queries, keys):
    case, segments = random_case(queries, keys, device=CPU), rectangle(queries, keys, gap=2, device=CPU)
    out, lse = CpuKernel().forward(case.q, case.k, case.v, None, segments, Scoring(0.7))
    expected = run_written_out(case, torch.ones(queries, keys, dtype=torch.bool), Scoring(0.7))
    assert_same({"out": out, "lse": lse}, {name: expected[name] for name in ("out", "lse")})


@pytest.mark.usefixtures("block_sizes")
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("window", [None, 1, 8, 20, 33, 1000])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("cuts", [(0, 17, 34, 51), (0, 1, 30, 31, 39, 50), (0, 40, 41), (0, 3, 60), (0, 12)], ids=str)
def test_the_parts_of_a_document_make_up_its_attention_and_its_gradients(cuts, with_sinks, window, heads):
    queries, keys = cuts[-1] - cuts[-2], cuts[-1]
    scoring = Scoring(0.7, window=window, softcap=2.0 if window == 20 else None)
    case = random_case(queries, keys, heads=heads, device=CPU, with_sinks=with_sinks)
    got = run_in_parts(CpuKernel(), case, parts_of(cuts, scoring, CPU))
    assert_same(got, run_written_out(case, seen(queries, keys, gap=-queries, window=window), scoring))


@pytest.mark.parametrize("seed", range(20))
def test_parts_cut_anywhere_under_any_window_make_up_the_whole(seed):
    chance = random.Random(seed)
    stop = chance.randint(2, 90)
    cuts = (0, *sorted(chance.sample(range(1, stop), min(stop - 1, chance.randint(1, 6)))), stop)
    scoring = Scoring(0.5, window=chance.choice([None, chance.randint(1, 100)]), softcap=chance.choice([None, 3.0]))
    queries = stop - cuts[-2]
    case = random_case(queries, stop, device=CPU)
    got = run_in_parts(CpuKernel(), case, parts_of(cuts, scoring, CPU))
    assert_same(got, run_written_out(case, seen(queries, stop, gap=-queries, window=scoring.window), scoring))


# Around the CUDA kernels: splitting, head dims, and keys that no query sees


@pytest.mark.parametrize("window", [None, 8, 20, 41])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_dims": ((16, 16),)},
        {"max_elements": elements(tokens=30, documents=1, heads=4)},
        {"max_elements": elements(tokens=30, documents=1, heads=2)},
        {"max_elements": elements(tokens=30, documents=1, heads=1), "head_dims": ((8, 8),)},
    ],
    ids=["whole", "padded head dims", "KV heads", "query heads", "single heads"],
)
@pytest.mark.parametrize("cuts", [(0, 17, 34, 51), (0, 1, 30, 31, 39, 50), (0, 30, 33)], ids=str)
def test_the_parts_are_the_same_through_a_backend_and_in_smaller_calls(cuts, changes, window):
    scoring = Scoring(0.7, window=window)
    case = random_case(cuts[-1] - cuts[-2], cuts[-1], heads=(6, 2), device=CPU)
    backend = CpuBackend(replace(ANYTHING, **changes))
    parts = parts_of(cuts, scoring, CPU)
    got = run_in_parts(VarlenKernel(backend), case, parts)
    assert_same(got, run_in_parts(CpuKernel(), case, parts))
    assert (backend.calls > 2 * len(parts)) == ("max_elements" in changes)


def test_rows_behind_the_queries_and_the_keys_give_zero_and_get_no_gradient():
    case = random_case(7, 12, device=CPU)
    for x, rows in ((case.q, 5), (case.dout, 5), (case.k, 9), (case.v, 9)):
        x[rows:] = float("nan")
    kernel, segments = VarlenKernel(CpuBackend()), rectangle(5, 9, gap=0, device=CPU)
    out, lse = kernel.forward(case.q, case.k, case.v, None, segments, Scoring(0.3))
    grads = kernel.backward(case.dout, case.q, case.k, case.v, None, out, lse, segments, Scoring(0.3))
    for x, rows in ((out, 5), (grads.dq, 5), (grads.dk, 9), (grads.dv, 9)):
        assert torch.isfinite(x).all()
        assert torch.equal(x[rows:], torch.zeros_like(x[rows:]))


def test_keys_that_no_window_reaches_stay_out_of_the_call_and_have_no_gradient():
    """The first query is 2 tokens behind 20 keys: with 11 tokens of window it sees the last 8."""
    scoring, segments = Scoring(0.3, window=11), rectangle(5, 20, gap=2, device=CPU)
    (piece,) = pieces(ANYTHING, segments, heads=2, kv_heads=1, head_dim=8, window=11)
    assert piece.keys == slice(12, 20)
    assert piece.segments.key_cu_seqlens.tolist() == [0, 8]
    assert piece.segments.window_left(11) == segments.window_left(11) == 3
    case = random_case(5, 20, device=CPU)
    case.k[:12] = case.v[:12] = float("nan")
    kernel = VarlenKernel(CpuBackend())
    out, lse = kernel.forward(case.q, case.k, case.v, None, segments, scoring)
    grads = kernel.backward(case.dout, case.q, case.k, case.v, None, out, lse, segments, scoring)
    assert not grads.dk[:12].any()
    assert not grads.dv[:12].any()
    assert all(torch.isfinite(x).all() for x in (out, lse, grads.dq, grads.dk, grads.dv))


@pytest.mark.parametrize(("queries", "keys"), [(1_000, 4_000_000), (4_000_000, 1_000), (3_000_000, 3_000_000)])
def test_no_call_reaches_2_to_the_31_elements_of_queries_or_of_keys(queries, keys):
    segments = rectangle(queries, keys, gap=0, device=CPU)
    calls = pieces(FLASH_2, segments, heads=8, kv_heads=2, head_dim=128)
    assert len(calls) > 1
    assert sum(piece.heads.stop - piece.heads.start for piece in calls) == 8
    for piece in calls:
        assert max(queries, keys) * (piece.heads.stop - piece.heads.start) * 128 < 2**31


@pytest.mark.parametrize(("queries", "keys"), [(5, 16_800_000), (16_800_000, 5)])
def test_a_block_too_large_for_one_head_is_refused_with_what_to_set(queries, keys):
    segments = rectangle(queries, keys, gap=0, device=CPU)
    with pytest.raises(UserError, match=rf"{keys:,} earlier keys.*memory\.sequence_chunks\.chunk_tokens"):
        pieces(FLASH_2, segments, heads=2, kv_heads=1, head_dim=128)


# What the libraries are told, by the rules read in their sources


def flash_2_mask(queries, keys, told):
    """`csrc/flash_attn/flash_api.cpp`, also torch's copy: which sides become -1, and what becomes of -1."""
    left, right = told["window_size_left"], 0 if told["causal"] else told["window_size_right"]
    left, right = (-1 if side >= told["max_seqlen_k"] else side for side in (left, right))
    if left < 0 and right >= 0:
        left = told["max_seqlen_k"]
    if left >= 0 and right < 0:
        right = told["max_seqlen_k"]
    return aligned_at_the_last(queries, keys, left, right)


def flash_3_mask(queries, keys, told):
    """`hopper/flash_api.cpp`."""
    left, right = told["window_size_left"], told["window_size_right"]
    left = -1 if left >= told["max_seqlen_k"] - 1 else left
    right = -1 if right >= told["max_seqlen_q"] - 1 else right
    right = 0 if told["is_causal"] else right
    if left < 0 and right < 0:
        return aligned_at_the_last(queries, keys, -1, -1)
    left = told["max_seqlen_k"] - 1 if left < 0 else left
    right = told["max_seqlen_q"] - 1 if right < 0 else right
    return aligned_at_the_last(queries, keys, left, right)


def flash_4_mask(queries, keys, told):
    """`_resolve_causal_local_window` of `flash_attn/cute/interface.py`."""
    left, right = told["window_size_left"], 0 if told["causal"] else told["window_size_right"]
    return aligned_at_the_last(queries, keys, *(-1 if side is None else side for side in (left, right)))


def told_to_torch(segments, scoring):
    _, causal, window = torch_cuda._mask(segments, scoring)
    return {"causal": causal, **window, "max_seqlen_k": flash_attention_2.longest(segments)[1]}


LIBRARIES = {
    "torch": (told_to_torch, flash_2_mask),
    "flash_attention_2": (flash_attention_2._keywords, flash_2_mask),
    "flash_attention_3": (flash_attention_3._keywords, flash_3_mask),
    "flash_attention_4": (flash_attention_4._keywords, flash_4_mask),
}


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize(("queries", "keys"), SIZES)
def test_what_a_library_is_told_of_earlier_keys_is_their_mask(queries, keys, name):
    told_to, meaning = LIBRARIES[name]
    for gap, window in product(GAPS, WINDOWS):
        mask = seen(queries, keys, gap=gap, window=window)
        for which, sees_all in rectangles(queries, keys, gap=gap, window=window):
            segments = rectangle(which.stop - which.start, keys, gap=gap + which.start, device=CPU)
            part_window = None if sees_all else window
            (piece,) = pieces(ANYTHING, segments, heads=1, kv_heads=1, head_dim=8, window=part_window)
            told = told_to(piece.segments, Scoring(1.0, window=part_window))
            got = meaning(piece.segments.num_tokens, piece.segments.num_keys, told)
            assert torch.equal(got, mask[which, piece.keys])


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("window", [None, 1, 4, 9, 20])
def test_what_a_library_is_told_of_the_queries_own_keys_is_causal_in_a_window(window, name):
    told_to, meaning = LIBRARIES[name]
    segments = segments_of(torch.tensor([0, 9], dtype=torch.int32), device=CPU)
    got = meaning(9, 9, told_to(segments, Scoring(1.0, window=window)))
    assert torch.equal(got, seen(9, 9, gap=-9, window=window))


@pytest.mark.parametrize("module", [flash_attention_2, flash_attention_3, flash_attention_4])
def test_a_library_gets_the_lengths_of_queries_and_of_keys(module):
    told = module._keywords(rectangle(30, 50, gap=5, device=CPU), Scoring(1.0))
    assert (told["cu_seqlens_q"].tolist(), told["cu_seqlens_k"].tolist()) == ([0, 30], [0, 50])
    assert (told["max_seqlen_q"], told["max_seqlen_k"]) == (30, 50)
