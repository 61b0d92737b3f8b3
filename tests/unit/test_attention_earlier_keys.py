"""Attention to blocks of earlier keys: a call against its mask, and a document's parts against the whole."""

import random

import pytest
import torch

from pipeline.attention.kernels import Scoring
from pipeline.attention.kernels import cpu as cpu_kernel
from pipeline.attention.kernels.cpu import CpuKernel
from pipeline.attention.segments import rectangle, rectangles, segments_of
from tests.attention_parts import parts_of, random_case, run_in_parts, run_written_out, seen

CPU = torch.device("cpu")
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


# Who sees what


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("gap", [0, 1, 4, 20])
@pytest.mark.parametrize(("queries", "keys"), [(8, 12), (12, 8), (1, 5), (5, 1), (1, 1), (17, 17)])
def test_queries_are_cut_where_the_mask_turns_from_all_to_some_to_none(queries, keys, gap, window):
    mask = seen(queries, keys, gap=gap, window=window)
    in_slices = torch.zeros(queries, dtype=torch.int64)
    for which, sees_all in rectangles(queries, keys, gap=gap, window=window):
        assert which.start < which.stop
        in_slices[which] += 1
        assert mask[which].any(1).all()
        assert bool(mask[which].all()) == sees_all
    assert torch.equal(in_slices, mask.any(1).to(torch.int64))


@pytest.mark.parametrize("window", WINDOWS[1:])
@pytest.mark.parametrize("gap", [0, 1, 4, 20])
@pytest.mark.parametrize(("queries", "keys"), [(8, 12), (12, 8), (1, 5), (17, 17)])
def test_a_window_counts_to_the_left_of_keys_aligned_at_their_last(queries, keys, gap, window):
    """As flash-attn places queries beside keys of another number: bottom right."""
    for which, sees_all in rectangles(queries, keys, gap=gap, window=window):
        length, gap_of_slice = which.stop - which.start, gap + which.start
        left = rectangle(length, keys, gap=gap_of_slice, device=CPU).window_left(None if sees_all else window)
        assert (left == -1) == sees_all
        place = torch.arange(length)[:, None] + keys - length
        aligned = torch.arange(keys)[None, :] >= (torch.zeros_like(place) if sees_all else place - left)
        assert torch.equal(aligned, seen(queries, keys, gap=gap, window=window)[which])


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


def test_sinks_are_refused_with_earlier_keys():
    case = random_case(3, 5, device=CPU, with_sinks=True)
    segments = rectangle(3, 5, gap=0, device=CPU)
    with pytest.raises(ValueError, match="they would count twice"):
        CpuKernel().forward(case.q, case.k, case.v, case.sinks, segments, Scoring(1.0))


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
