"""CUDA's caching allocator: whether the setting that `plan.environment` made is really in force.

Expandable segments keep the allocator from fragmenting when tensors of many gigabytes come and go (ALST,
arXiv 2506.13996, §3.4). A setting of the user's own, or a variable of another name, is ignored silently.
"""

import torch

from pipeline.errors import RunError
from pipeline.plan.job import JobPlan
from pipeline.recipe.schema import Gpu


def check_in_force(plan: JobPlan) -> None:
    """Raises RunError if expandable segments were asked for and CUDA's allocator does not use them."""
    if plan.recipe.hardware.gpu is Gpu.CPU or not plan.recipe.memory.allocator.expandable_segments:
        return
    probe = torch.empty(1, device="cuda")
    segments = torch.cuda.memory_snapshot()
    del probe
    if not any(segment.get("is_expandable") for segment in segments):
        raise RunError(
            f"memory.allocator.expandable_segments is on, but torch {torch.__version__} allocates without it; unset "
            "PYTORCH_ALLOC_CONF and PYTORCH_CUDA_ALLOC_CONF in your environment, or set it to false"
        )
