"""Floating-point operations of a training step, by the convention under which MFU is published here."""

from pipeline.plan.model_shape import ModelShape
from pipeline.recipe.schema import Gpu

# Dense bf16 peaks of the data sheets, FLOP/s. A CPU has no agreed peak: no MFU is shown there.
PEAK_FLOPS: dict[Gpu, float] = {
    Gpu.A100_80GB: 312e12,
    Gpu.H100_80GB: 989e12,
    Gpu.H200_141GB: 989e12,
    Gpu.B200_192GB: 2250e12,
}


def model_flops(shape: ModelShape, *, tokens: int, sum_len_squared: int, matmul_parameters: int | None = None) -> int:
    """Model FLOPs of forward and backward: 6 per matmul parameter and token, and causal attention over documents.

    `matmul_parameters` are the real model's, where it is at hand; else what the shape says.
    `sum_len_squared` is the sum of len² over the documents of the samples. Attention forward is two matmuls of
    2·(len²/2)·heads·head_dim each per document and layer; backward is twice forward. Nothing recomputed is counted.
    """
    matmuls = 6 * (matmul_parameters or shape.matmul_parameters) * tokens
    attention_forward = 2 * shape.num_layers * sum_len_squared * shape.num_query_heads * shape.head_dim
    return matmuls + 3 * attention_forward
