"""The kernels of this machine, inputs, and references for what is too large to compute twice."""

import functools
import os
from dataclasses import dataclass, replace
from importlib import import_module

import pytest
import torch

from pipeline.attention.kernels import AttentionKernel, Needs, Scoring
from pipeline.attention.kernels.choice import BACKENDS, BROKEN
from pipeline.attention.kernels.interface import lacks
from pipeline.attention.kernels.presence import AbsentError
from pipeline.attention.kernels.varlen import VarlenKernel
from pipeline.attention.segments import Segments, segments_of

NAMES = tuple(BACKENDS)


def gpu_of_this_machine() -> str:
    """hardware.gpu of a recipe for here; skips the test if the recipe has no name for this GPU."""
    from pipeline.recipe.schema import Gpu  # needs pydantic, which the kernels' tests do without

    name = torch.cuda.get_device_name()
    for gpu in Gpu:
        if gpu is not Gpu.CPU and gpu.value.partition("-")[0] in name:
            return gpu.value
    return pytest.skip(f"hardware.gpu has no name for {name}; there are {', '.join(Gpu)}")


RELATIVE = {torch.bfloat16: 1.5e-2, torch.float16: 3e-3}
"""Largest error of a result, of norms, against float64 on the same rounded inputs."""


@dataclass(frozen=True)
class Inputs:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    sinks: torch.Tensor | None
    segments: Segments

    def double(self) -> "Inputs":
        wide = {name: getattr(self, name).double() for name in ("q", "k", "v", "dout")}
        return replace(self, **wide, sinks=None if self.sinks is None else self.sinks.double())


def kernel_or_skip(name: str, needs: Needs | None = None) -> VarlenKernel:
    """The kernel of that name, without its trial; skips the test if it is absent or lacks what is needed."""
    kernel = _load(name, needs is not None and needs.deterministic)
    if isinstance(kernel, str):
        pytest.skip(f"{name}: {kernel}")
    if needs is not None and (missing := lacks(kernel.capabilities, needs)) is not None:
        pytest.skip(f"{name} lacks {missing}")
    return kernel


@functools.cache
def _load(name: str, deterministic: bool) -> VarlenKernel | str:
    """Or the reason why it is absent."""
    try:
        backend, _ = import_module(BACKENDS[name]).load(torch.cuda.get_device_capability())
    except (AbsentError, *BROKEN) as error:
        return f"{type(error).__name__}: {error}"
    return VarlenKernel(backend, deterministic=deterministic)


def random_inputs(
    bounds: tuple[int, ...],
    *,
    heads: tuple[int, int] = (8, 2),
    dims: tuple[int, int] = (128, 128),
    dtype: torch.dtype = torch.bfloat16,
    padding: int = 0,
    with_sinks: bool = False,
    seed: int = 0,
) -> Inputs:
    """Normal random numbers on the GPU, for documents between `bounds` and rows of padding behind them."""
    generator = torch.Generator("cuda").manual_seed(seed)
    rows = bounds[-1] + padding

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=dtype)

    return Inputs(
        q=normal(rows, heads[0], dims[0]),
        k=normal(rows, heads[1], dims[0]),
        v=normal(rows, heads[1], dims[1]),
        dout=normal(rows, heads[0], dims[1]),
        sinks=normal(heads[0]) if with_sinks else None,
        segments=segments_of(torch.tensor(bounds, dtype=torch.int32), device=torch.device("cuda")),
    )


def run(kernel: AttentionKernel, inputs: Inputs, scoring: Scoring) -> dict[str, torch.Tensor]:
    """out, lse (of the documents' rows), dq, dk, dv and, with sinks, dsinks."""
    q, k, v, sinks, segments = inputs.q, inputs.k, inputs.v, inputs.sinks, inputs.segments
    out, lse = kernel.forward(q, k, v, sinks, segments, scoring)
    grads = kernel.backward(inputs.dout, q, k, v, sinks, out, lse, segments, scoring)
    results = {"out": out, "lse": lse[:, : segments.num_tokens], "dq": grads.dq, "dk": grads.dk, "dv": grads.dv}
    return results if grads.dsinks is None else {**results, "dsinks": grads.dsinks}


def relative_error(mine: torch.Tensor, reference: torch.Tensor, floor: float = 0.0) -> float:
    """Of norms; against `floor` where the reference is smaller than that."""
    wide = reference.double()
    return (mine.double() - wide).norm().item() / max(wide.norm().item(), floor)


def assert_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float) -> None:
    """A gradient that is next to nothing (a window of one token leaves dq none) is held against the largest."""
    floor = 1e-2 * max(reference.norm().item() for reference in expected.values())
    errors = {name: relative_error(got[name], expected[name], floor) for name in expected}
    assert all(error <= bound for error in errors.values()), f"more than {bound}: {errors}"


def sliced_reference(
    inputs: Inputs, out: torch.Tensor, lse: torch.Tensor, picked: torch.Tensor, scale: float
) -> dict[str, torch.Tensor]:
    """out, lse and dq of the picked rows, dk and dv of the picked keys, in float64, for one causal document.

    With one KV head. Rows come from the definition; keys use the kernel's own lse and delta of all rows, which the
    rows have vouched for. Nothing larger than [H, picked, T].
    """
    q, k, v, dout = (x.double() for x in (inputs.q, inputs.k[:, 0], inputs.v[:, 0], inputs.dout))
    positions = torch.arange(q.shape[0], device=q.device)
    scores = torch.einsum("phd,td->hpt", q[picked], k) * scale
    scores.masked_fill_(positions[None, None, :] > picked[None, :, None], -torch.inf)
    row_lse = scores.logsumexp(-1)
    weights = (scores - row_lse[..., None]).exp()
    row_out = torch.einsum("hpt,td->phd", weights, v)
    row_delta = (dout[picked] * row_out).sum(-1).t()
    dscores = weights * (torch.einsum("phd,td->hpt", dout[picked], v) - row_delta[..., None])
    rows_dq = torch.einsum("hpt,td->phd", dscores, k) * scale
    delta = (dout * out.double()).sum(-1).t()
    scores = torch.einsum("thd,pd->hpt", q, k[picked]) * scale
    weights = (scores - lse.double()[:, None, :]).exp()
    weights.masked_fill_(positions[None, None, :] < picked[None, :, None], 0)
    dscores = weights * (torch.einsum("thd,pd->hpt", dout, v[picked]) - delta[:, None, :])
    return {
        "out": row_out,
        "lse": row_lse,
        "dq": rows_dq,
        "dk": torch.einsum("hpt,thd->pd", dscores, q) * scale,
        "dv": torch.einsum("hpt,thd->pd", weights, dout),
    }


def job_variables(ranks: int, *overrides: str) -> tuple[str, dict[str, str]]:
    """(hardware.gpu of this machine, what a job sets in the environment of each of its `ranks`)."""
    for package in ("deepspeed", "pydantic"):
        pytest.importorskip(package)
    from pipeline.plan.environment import environment
    from pipeline.plan.job import plan_job
    from pipeline.recipe.load import load

    gpu = gpu_of_this_machine()
    asked = [f"hardware.gpu={gpu}", f"hardware.gpus_per_node={ranks}", *overrides]
    plan = plan_job(load("tiny", overrides=asked))
    table = environment(plan, cpus_per_rank=max(1, len(os.sched_getaffinity(0)) // ranks))
    return gpu, {variable.name: variable.value for variable in table}
