"""The planner's fitted constants, one value each for every model, length and feature. What is not here is a vendor's
figure, a paper's, or a count. `benchmarks/calibration.py` fits them to the runs that ALST reports, and says how the
planner errs on each run when it is left out of the fit (docs/calibration.md).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fitted:
    """Physical quantities that no data sheet states."""

    attention_backward: float
    """Of the bf16 peak, in flash-attn 2's backward on H100: its kernels are Ampere's."""
    host_update_rate: float
    """Bytes per second of a node's CPU Adam with all that surrounds it (norm of gradients, copies); host memory alone
    would allow ten times as much."""
    allocator_reserve: float
    """Of what torch allocates, with expandable segments: blocks that do not fit together, and what is not counted."""
    communication_bytes: float
    """Of NCCL's channels and buffers, on each of several GPUs."""
    host_bytes_per_parameter: float
    """Of a node's memory beside optimizer states that are kept there: copies, and what malloc does not give back."""


constants = Fitted(
    attention_backward=0.3,
    host_update_rate=26.4e9,
    allocator_reserve=0.0547,
    communication_bytes=2.51e9,
    host_bytes_per_parameter=4.62,
)
