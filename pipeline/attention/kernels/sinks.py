"""Sinks for a kernel that has none: exact, from its out and lse alone.

A sink z of a head is one more score in every row's sum, with no value. With e = exp(lse) the sum without it:

    out' = out * e / (e + exp(z)) = out * exp(lse - lse'),    lse' = logaddexp(lse, z)

Backward needs nothing new for q, k and v. With out' and lse', a kernel's P = exp(s - lse') is the softmax that
includes the sink, and its delta = sum_d dout * out' is sum_j P_j dP_j, in which the sink has no term because its value
is zero; so dS = P * (dP - delta) is exact. The sink's own score gets the same formula with dP = 0:

    dz = -sum_rows exp(z - lse') * delta

Letters: T rows, H heads, D head dim. Rows from `num_tokens` on are padding and have no sum.
"""

from collections.abc import Iterator

import torch

TILE_ELEMENTS = 1 << 25  # 128 MiB in float32: the temporaries of a tile, however long the sample


def add_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor, num_tokens: int) -> None:
    """Change out [T, H, D] and lse [H, T] of attention without sinks [H] into those with them, in place."""
    for rows in _tiles(out, num_tokens):
        before = lse[:, rows]
        after = torch.logaddexp(before, sinks.to(lse.dtype)[:, None])
        share_TH1 = (before - after).exp_().t()[..., None]
        out[rows] = (out[rows].to(share_TH1.dtype) * share_TH1).to(out.dtype)
        lse[:, rows] = after


def sink_grads(
    dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor, num_tokens: int
) -> torch.Tensor:
    """[H], from dout and out [T, H, D] and lse [H, T] of attention with sinks."""
    total = torch.zeros_like(sinks, dtype=lse.dtype)
    for rows in _tiles(out, num_tokens):
        delta_TH = (dout[rows].to(lse.dtype) * out[rows].to(lse.dtype)).sum(-1)
        weights_TH = (sinks.to(lse.dtype)[:, None] - lse[:, rows]).exp_().t()
        total -= (weights_TH * delta_TH).sum(0)
    return total.to(sinks.dtype)


def _tiles(x_THD: torch.Tensor, num_tokens: int) -> Iterator[slice]:
    """Rows [0, num_tokens) in steps."""
    step = max(1, TILE_ELEMENTS // (x_THD.shape[1] * x_THD.shape[2]))
    return (slice(start, min(num_tokens, start + step)) for start in range(0, num_tokens, step))
