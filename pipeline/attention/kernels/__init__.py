"""The kernels: a pair of calls each, `forward -> (out, lse)` and `backward` from out and lse.

Because out and lse are ours, a recompute can skip attention, and chunks of a sequence can be merged.
"""

from pipeline.attention.kernels.choice import Choice, available_kernels, choose
from pipeline.attention.kernels.interface import (
    AttentionGrads,
    AttentionKernel,
    Capabilities,
    Needs,
    Scoring,
    check_supported,
    needs_of,
)
from pipeline.attention.kernels.presence import Presence

__all__ = [
    "AttentionGrads",
    "AttentionKernel",
    "Capabilities",
    "Choice",
    "Needs",
    "Presence",
    "Scoring",
    "available_kernels",
    "check_supported",
    "choose",
    "needs_of",
]
