"""Attention of a document's last chunk in parts, by any kernel, and the same written out with a mask.

Letters: T queries of the chunk, K keys of a part or of the document, H query heads, J KV heads, D head dim.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from pipeline.attention.kernels import AttentionKernel, Scoring
from pipeline.attention.segments import Segments, rectangle, rectangles, segments_of


@dataclass(frozen=True)
class Part:
    """One call: which queries of the chunk, which keys of the document, and what the kernel is told of them."""

    queries: slice
    keys: slice
    segments: Segments
    scoring: Scoring


@dataclass(frozen=True)
class Case:
    q: torch.Tensor
    """[T, H, D]; the last T of K positions."""
    k: torch.Tensor
    """[K, J, D]"""
    v: torch.Tensor
    dout: torch.Tensor
    sinks: torch.Tensor | None = None

    def double(self) -> "Case":
        wide = {name: getattr(self, name).double() for name in ("q", "k", "v", "dout")}
        return Case(**wide, sinks=None if self.sinks is None else self.sinks.double())


def random_case(
    queries: int,
    keys: int,
    *,
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (8, 6),
    dtype: torch.dtype = torch.float64,
    device: torch.device,
    with_sinks: bool = False,
) -> Case:
    """Normal random numbers, the same on every device."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    return Case(
        q=normal(queries, heads[0], dims[0]),
        k=normal(keys, heads[1], dims[0]),
        v=normal(keys, heads[1], dims[1]),
        dout=normal(queries, heads[0], dims[1]),
        sinks=normal(heads[0]) if with_sinks else None,
    )


def parts_of(cuts: tuple[int, ...], scoring: Scoring, device: torch.device) -> list[Part]:
    """The calls of the chunk `[cuts[-2], cuts[-1])`: its own keys first, then the blocks between the earlier cuts."""
    first, stop = cuts[-2:]
    own = segments_of(torch.tensor([0, stop - first], dtype=torch.int32), device=device)
    parts = [Part(slice(0, stop - first), slice(first, stop), own, scoring)]
    for start, end in pairwise(cuts[:-1]):
        for queries, sees_all in rectangles(stop - first, end - start, gap=first - end, window=scoring.window):
            length, gap = queries.stop - queries.start, first - end + queries.start
            segments = rectangle(length, end - start, gap=gap, device=device)
            part_scoring = replace(scoring, window=None) if sees_all else scoring
            parts.append(Part(queries, slice(start, end), segments, part_scoring))
    return parts


def run_in_parts(kernel: AttentionKernel, case: Case, parts: list[Part]) -> dict[str, torch.Tensor]:
    """out, lse, dq, dk, dv and, with sinks, dsinks: merged by log-sum-exp, and summed, in float32 or wider."""
    wide = torch.promote_types(case.q.dtype, torch.float32)
    out = torch.zeros_like(case.dout, dtype=wide)
    lse = out.new_full((case.q.shape[1], case.q.shape[0]), -math.inf)
    for part in parts:
        sinks = case.sinks if part.segments.keys is None else None
        q, k, v = case.q[part.queries], case.k[part.keys], case.v[part.keys]
        part_out, part_lse = kernel.forward(q, k, v, sinks, part.segments, part.scoring)
        before, after = lse[:, part.queries], torch.logaddexp(lse[:, part.queries], part_lse)
        shares = [(x - after).exp().t()[..., None] for x in (before, part_lse)]
        out[part.queries] = out[part.queries] * shares[0] + part_out * shares[1]
        lse[:, part.queries] = after
    grads = {f"d{name}": torch.zeros_like(getattr(case, name), dtype=wide) for name in ("q", "k", "v")}
    rounded = out.to(case.q.dtype)
    for part in parts:
        some = part.queries
        sinks = case.sinks if part.segments.keys is None else None
        inputs = (case.dout[some], case.q[some], case.k[part.keys], case.v[part.keys], sinks)
        share = kernel.backward(*inputs, rounded[some], lse[:, some], part.segments, part.scoring)
        grads["dq"][some] += share.dq
        grads["dk"][part.keys] += share.dk
        grads["dv"][part.keys] += share.dv
        if share.dsinks is not None:
            grads["dsinks"] = share.dsinks
    return {"out": out, "lse": lse, **grads}


def run_written_out(case: Case, mask: torch.Tensor, scoring: Scoring) -> dict[str, torch.Tensor]:
    """The same under a mask [T, K] of what is seen, by the definition and autograd."""
    groups = case.q.shape[1] // case.k.shape[1]
    names = ["q", "k", "v", *([] if case.sinks is None else ["sinks"])]
    leaves = {name: getattr(case, name).detach().clone().requires_grad_() for name in names}
    k, v = (leaves[name].repeat_interleave(groups, dim=1) for name in ("k", "v"))
    scores = torch.einsum("qhd,khd->hqk", leaves["q"], k) * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    lse = scores.masked_fill(~mask, -math.inf).logsumexp(-1)
    if case.sinks is not None:
        lse = torch.logaddexp(lse, leaves["sinks"][:, None])
    weights = (scores - lse[..., None]).exp().masked_fill(~mask, 0)
    out = torch.einsum("hqk,khd->qhd", weights, v)
    grads = torch.autograd.grad(out, list(leaves.values()), case.dout)
    named = {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}
    return {"out": out.detach(), "lse": lse.detach(), **named}


def seen(queries: int, keys: int, *, gap: int, window: int | None) -> torch.Tensor:
    """[queries, keys], pair by pair: whether a query sees a key, `gap` tokens lying between the two blocks.

    A gap of -queries: the keys end with the queries' own, which are causal.
    """
    distance = keys + gap + torch.arange(queries)[:, None] - torch.arange(keys)[None, :]
    return (distance >= 0) & (distance < (window or math.inf))
