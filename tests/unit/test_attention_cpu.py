"""The CPU kernel against attention written out with a mask, forward and backward, in float64."""

import math
from itertools import pairwise

import pytest
import torch

from pipeline.attention.kernels import Scoring
from pipeline.attention.kernels import cpu as cpu_kernel
from pipeline.attention.kernels.cpu import CpuKernel
from pipeline.attention.segments import Segments, segments_of

CPU = torch.device("cpu")


def dense(q, k, v, sinks, segments: Segments, scoring: Scoring):
    """The definition: every pair of tokens, hidden ones at -inf. q [T, H, D], k and v [T, J, D]."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    visible = torch.zeros(q.shape[0], q.shape[0], dtype=torch.bool)
    for start, stop in pairwise(segments.bounds):
        for query in range(start, stop):
            first = start if scoring.window is None else max(start, query - scoring.window + 1)
            visible[query, first : query + 1] = True
    rows = visible.any(1)
    scores = scores.masked_fill(~visible, -math.inf)[:, rows]
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, scores.shape[1], 1)], dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[0]]
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=q.dtype)
    out[rows] = torch.einsum("hqk,khd->qhd", weights, v)
    return out


@pytest.fixture(params=[(128, 8192), (5, 7), (16, 3)], ids=lambda sizes: f"blocks{sizes[0]}x{sizes[1]}")
def block_sizes(request, monkeypatch):
    """Small blocks too, so that short sequences cross many of them."""
    monkeypatch.setattr(cpu_kernel, "QUERY_BLOCK", request.param[0])
    monkeypatch.setattr(cpu_kernel, "KEY_BLOCK", request.param[1])


@pytest.mark.usefixtures("block_sizes")
@pytest.mark.parametrize("bounds", [(0, 37), (0, 1, 14, 15, 37), (0, 20, 31)], ids=["one", "packed", "padded"])
@pytest.mark.parametrize("window", [None, 1, 6, 100])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_output_and_every_gradient_equal_attention_written_out(bounds, window, softcap, with_sinks):
    torch.manual_seed(0)
    tokens, heads, kv_heads, dim, value_dim = 37, 4, 2, 8, 6
    segments = segments_of(torch.tensor(bounds, dtype=torch.int32), device=CPU)
    scoring = Scoring(scale=0.7, window=window, softcap=softcap)
    q = torch.randn(tokens, heads, dim, dtype=torch.float64, requires_grad=True)
    k = torch.randn(tokens, kv_heads, dim, dtype=torch.float64, requires_grad=True)
    v = torch.randn(tokens, kv_heads, value_dim, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(heads, dtype=torch.float64, requires_grad=True) if with_sinks else None
    expected = dense(q, k, v, sinks, segments, scoring)
    dout = torch.randn_like(expected)
    inputs = [x for x in (q, k, v, sinks) if x is not None]
    expected_grads = torch.autograd.grad(expected, inputs, dout)

    kernel = CpuKernel()
    with torch.no_grad():
        out, lse = kernel.forward(q, k, v, sinks, segments, scoring)
        grads = kernel.backward(dout, q, k, v, sinks, out, lse, segments, scoring)

    torch.testing.assert_close(out, expected.detach(), rtol=1e-12, atol=1e-12)
    got = [grads.dq, grads.dk, grads.dv, *([] if sinks is None else [grads.dsinks])]
    for mine, reference in zip(got, expected_grads, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-11, atol=1e-12)


def test_lse_is_the_logarithm_of_the_sum_that_the_weights_are_divided_by():
    torch.manual_seed(0)
    q, k = torch.randn(9, 2, 4, dtype=torch.float64), torch.randn(9, 1, 4, dtype=torch.float64)
    segments = segments_of(torch.tensor([0, 9], dtype=torch.int32), device=CPU)
    _, lse = CpuKernel().forward(q, k, k, None, segments, Scoring(scale=0.5))
    scores = torch.einsum("qhd,kd->hqk", q, k[:, 0]) * 0.5
    causal = scores.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -math.inf)
    torch.testing.assert_close(lse, causal.logsumexp(-1))


def test_a_later_document_cannot_change_an_earlier_one_and_the_other_way_round():
    torch.manual_seed(0)
    q, k, v = (torch.randn(30, 2, 4) for _ in range(3))
    segments = segments_of(torch.tensor([0, 11, 30], dtype=torch.int32), device=CPU)
    before, _ = CpuKernel().forward(q, k, v, None, segments, Scoring(scale=1.0))
    k[11:] += 5
    v[11:] += 5
    after, _ = CpuKernel().forward(q, k, v, None, segments, Scoring(scale=1.0))
    assert torch.equal(before[:11], after[:11])
    assert not torch.allclose(before[11:], after[11:])


def test_bfloat16_inputs_are_scored_in_float32():
    torch.manual_seed(0)
    q, k, v = (torch.randn(64, 2, 16).bfloat16() for _ in range(3))
    segments = segments_of(torch.tensor([0, 64], dtype=torch.int32), device=CPU)
    out, lse = CpuKernel().forward(q, k, v, None, segments, Scoring(scale=0.25))
    wide, _ = CpuKernel().forward(q.float(), k.float(), v.float(), None, segments, Scoring(scale=0.25))
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert torch.equal(out, wide.bfloat16())
