"""Floating-point operations of a training step, by the convention under which MFU is published here."""

from collections.abc import Iterable

from pipeline.plan.model_shape import ModelShape


def seen_keys(lengths: Iterable[int], window: int | None = None) -> int:
    """Twice the (query, key) pairs of causal attention over documents: the sum of len² without a window.

    With one a query sees min(position + 1, window) keys. Without, the half of the diagonal is left out, as usual.
    """
    if window is None:
        return sum(length**2 for length in lengths)
    return sum(2 * length * window - window**2 if length > window else length**2 for length in lengths)


def attention_flops(shape: ModelShape, *, sum_len_squared: int, sum_windowed: int) -> int:
    """Of forward, over all layers: two matmuls of 2 x (pairs) x heads x head_dim each."""
    full = (shape.num_layers - shape.num_window_layers) * sum_len_squared
    return 2 * (full + shape.num_window_layers * sum_windowed) * shape.query_size


def model_flops(
    shape: ModelShape,
    *,
    tokens: int,
    sum_len_squared: int,
    sum_windowed: int | None = None,
    matmul_parameters: int | None = None,
) -> int:
    """Model FLOPs of forward and backward: 6 per matmul parameter and token, and causal attention over documents.

    `matmul_parameters` are the real model's, where it is at hand; else what the shape says, of experts those that a
    token is sent to. `sum_len_squared` is `seen_keys` of the documents of the samples, `sum_windowed` that with the
    model's window, if it has one. Backward is twice forward. Nothing recomputed is counted.
    """
    matmuls = 6 * (matmul_parameters or shape.matmul_parameters) * tokens
    windowed = sum_len_squared if sum_windowed is None else sum_windowed
    return matmuls + 3 * attention_flops(shape, sum_len_squared=sum_len_squared, sum_windowed=windowed)
