"""A kernel's first call on this GPU: a small one, whose result is known from the CPU kernel.

It finds, before weights load, a package built for another GPU, a compiler that is missing, and a library whose
arguments have changed their meaning. Own random numbers: the run's are not touched.
"""

from dataclasses import replace
from itertools import product

import torch

from pipeline.attention.kernels.cpu import CpuKernel
from pipeline.attention.kernels.interface import AttentionKernel, Needs, Scoring
from pipeline.attention.segments import Segments, rectangle, segments_of
from pipeline.errors import RunError

BOUNDS = (0, 300, 301, 512)  # more than two blocks of any kernel, a document of one token, and padding behind
TOKENS = 520
KV_HEADS = 2
WINDOW = 100
SOFTCAP = 30.0
CPU = torch.device("cpu")
LARGEST_ERROR = {torch.bfloat16: 2e-2, torch.float16: 5e-3}  # relative, of norms: about 5 roundings of the dtype


def try_kernel(kernel: AttentionKernel, needs: Needs, device: torch.device) -> None:
    """Forward and backward as the model needs them. Raises RunError for a wrong result, or what the kernel raises."""
    plain = Scoring(scale=needs.head_dim**-0.5, softcap=SOFTCAP if needs.softcap else None)
    scorings = [plain, replace(plain, window=WINDOW)] if needs.window else [plain]
    makers = [_own_keys, _earlier_keys] if needs.earlier_keys else [_own_keys]
    for segments_on, scoring in product(makers, scorings):
        inputs = _inputs(needs, segments_on(CPU))
        expected = _run(CpuKernel(), [x.float() for x in inputs], segments_on(CPU), scoring)
        got = _run(kernel, [x.to(device) for x in inputs], segments_on(device), scoring)
        for name, mine, reference in zip(("out", "lse", "dq", "dk", "dv"), got, expected, strict=True):
            error = ((mine.float().cpu() - reference).norm() / reference.norm()).item()
            bound = LARGEST_ERROR.get(needs.dtype, 1e-4)
            if not error <= bound:
                where = "" if segments_on is _own_keys else " and earlier keys"
                raise RunError(
                    f"attention kernel {kernel.name}: {name} is off by {error:.1e} of its norm from the CPU kernel's, "
                    f"more than {bound:.0e}, with {scoring}{where}"
                )


def _own_keys(device: torch.device) -> Segments:
    return segments_of(torch.tensor(BOUNDS, dtype=torch.int32), device=device)


def _earlier_keys(device: torch.device) -> Segments:
    """More than two blocks; in the window the first query sees 94 of them and the last one 5."""
    return rectangle(90, 300, gap=5, device=device)


def _inputs(needs: Needs, segments: Segments) -> list[torch.Tensor]:
    """q, k, v, dout on the CPU, in the dtype of the run."""
    generator = torch.Generator().manual_seed(0)
    heads = KV_HEADS * needs.queries_per_kv_head
    queries, keys = (TOKENS, TOKENS) if segments.keys is None else (segments.num_tokens, segments.num_keys)
    shapes = (
        (queries, heads, needs.head_dim),
        (keys, KV_HEADS, needs.head_dim),
        (keys, KV_HEADS, needs.value_head_dim),
        (queries, heads, needs.value_head_dim),
    )
    return [torch.randn(shape, generator=generator).to(needs.dtype) for shape in shapes]


def _run(
    kernel: AttentionKernel, inputs: list[torch.Tensor], segments: Segments, scoring: Scoring
) -> list[torch.Tensor]:
    """out, lse of the documents' rows, dq, dk, dv."""
    q, k, v, dout = inputs
    with torch.no_grad():
        out, lse = kernel.forward(q, k, v, None, segments, scoring)
        grads = kernel.backward(dout, q, k, v, None, out, lse, segments, scoring)
    return [out, lse[:, : segments.num_tokens], grads.dq, grads.dk, grads.dv]
