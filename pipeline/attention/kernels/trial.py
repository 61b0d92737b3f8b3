"""A kernel's first call on this GPU: a small one, whose result is known from the CPU kernel.

It finds, before weights load, a package built for another GPU, a compiler that is missing, and a library whose
arguments have changed their meaning. Own random numbers: the run's are not touched.
"""

from dataclasses import replace

import torch

from pipeline.attention.kernels.cpu import CpuKernel
from pipeline.attention.kernels.interface import AttentionKernel, Needs, Scoring
from pipeline.attention.segments import segments_of
from pipeline.errors import RunError

BOUNDS = (0, 300, 301, 512)  # more than two blocks of any kernel, a document of one token, and padding behind
TOKENS = 520
KV_HEADS = 2
WINDOW = 100
SOFTCAP = 30.0
LARGEST_ERROR = {torch.bfloat16: 2e-2, torch.float16: 5e-3}  # relative, of norms: about 5 roundings of the dtype


def try_kernel(kernel: AttentionKernel, needs: Needs, device: torch.device) -> None:
    """Forward and backward as the model needs them. Raises RunError for a wrong result, or what the kernel raises."""
    plain = Scoring(scale=needs.head_dim**-0.5, softcap=SOFTCAP if needs.softcap else None)
    for scoring in [plain, replace(plain, window=WINDOW)] if needs.window else [plain]:
        inputs = _inputs(needs)
        expected = _run(CpuKernel(), [x.float() for x in inputs], scoring, torch.device("cpu"))
        got = _run(kernel, [x.to(device) for x in inputs], scoring, device)
        for name, mine, reference in zip(("out", "lse", "dq", "dk", "dv"), got, expected, strict=True):
            error = ((mine.float().cpu() - reference).norm() / reference.norm()).item()
            bound = LARGEST_ERROR.get(needs.dtype, 1e-4)
            if not error <= bound:
                raise RunError(
                    f"attention kernel {kernel.name}: {name} is off by {error:.1e} of its norm from the CPU kernel's, "
                    f"more than {bound:.0e}, with {scoring}"
                )


def _inputs(needs: Needs) -> list[torch.Tensor]:
    """q, k, v, dout on the CPU, in the dtype of the run."""
    generator = torch.Generator().manual_seed(0)
    heads = KV_HEADS * needs.queries_per_kv_head
    shapes = ((heads, needs.head_dim), (KV_HEADS, needs.head_dim), (KV_HEADS, needs.value_head_dim))
    dout_shape = (heads, needs.value_head_dim)
    return [torch.randn(TOKENS, *shape, generator=generator).to(needs.dtype) for shape in (*shapes, dout_shape)]


def _run(
    kernel: AttentionKernel, inputs: list[torch.Tensor], scoring: Scoring, device: torch.device
) -> list[torch.Tensor]:
    """out, lse of the documents' rows, dq, dk, dv."""
    q, k, v, dout = inputs
    segments = segments_of(torch.tensor(BOUNDS, dtype=torch.int32), device=device)
    with torch.no_grad():
        out, lse = kernel.forward(q, k, v, None, segments, scoring)
        grads = kernel.backward(dout, q, k, v, None, out, lse, segments, scoring)
    return [out, lse[:, : segments.num_tokens], grads.dq, grads.dk, grads.dv]
