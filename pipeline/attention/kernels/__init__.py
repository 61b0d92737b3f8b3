"""The kernels: a pair of calls each, `forward -> (out, lse)` and `backward` from out and lse.

Because out and lse are ours, a recompute can skip attention, and chunks of a sequence can be merged.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from pipeline.attention.segments import Segments
from pipeline.errors import UserError


@dataclass(frozen=True)
class Scoring:
    """How a score becomes a probability."""

    scale: float
    window: int | None = None
    """A query sees itself and the window - 1 tokens before it; None is the whole document so far."""
    softcap: float | None = None
    """Scores s become softcap * tanh(s / softcap) (gemma 2)."""


@dataclass(frozen=True)
class AttentionGrads:
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    dsinks: torch.Tensor | None


class AttentionKernel(Protocol):
    """Shapes: q, out [T, H, D]; k, v [T, J, D] with J KV heads, H a multiple of J; lse [H, T] in float32 or wider;
    sinks [H] (gpt_oss: a logit per head that takes probability and gives no value)."""

    name: str

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        segments: Segments,
        scoring: Scoring,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse)."""
        ...

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        out: torch.Tensor,
        lse: torch.Tensor,
        segments: Segments,
        scoring: Scoring,
    ) -> AttentionGrads: ...


def choose_kernel(asked: str, *, device: torch.device) -> AttentionKernel:
    """The kernel for `model.attention`; `auto` is the fastest present. Raises UserError if the asked one is absent."""
    from pipeline.attention.kernels.cpu import CpuKernel

    kernel = CpuKernel()
    if device.type != "cpu":
        raise UserError(
            f"model.attention = {asked!r}: no kernel for {device.type} in this version; set hardware.gpu: cpu"
        )
    return kernel
