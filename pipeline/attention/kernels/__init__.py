"""The kernels: a pair of calls each, `forward -> (out, lse)` and `backward` from out and lse.

Because out and lse are ours, a recompute can skip attention, and chunks of a sequence can be merged.
"""

from pipeline.attention.kernels.choice import Choice, choose
from pipeline.attention.kernels.interface import (
    AttentionGrads,
    AttentionKernel,
    Capabilities,
    Needs,
    Scoring,
    check_supported,
    needs_of,
)

__all__ = [
    "AttentionGrads",
    "AttentionKernel",
    "Capabilities",
    "Choice",
    "Needs",
    "Scoring",
    "check_supported",
    "choose",
    "needs_of",
]
