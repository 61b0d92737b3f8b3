"""Where the checkpoint of each group of layers waits: the last ones on the GPU, as many as there is room for."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline.plan.limits import load_of
from pipeline.plan.memory import Sizes
from pipeline.recipe.schema import ActivationCheckpoint

if TYPE_CHECKING:
    from pipeline.plan.job import JobPlan

RESIDENT_SHARE = 0.9
"""Of a GPU's memory, up to which checkpoints stay: planned peaks came out up to a tenth too small (docs/planner.md),
and what stays saves host memory and copies, but seldom time."""


def placed(plan: "JobPlan") -> "JobPlan":
    """The plan with what is `auto` of the placement as numbers."""
    feature = plan.recipe.memory.activation_checkpoint
    if feature is None or feature.resident_groups != "auto":
        return plan
    plan = _with(plan, feature, resident_groups=0)
    if feature.offload is None:
        return plan

    def has_room(resident_groups: int) -> bool:
        load = load_of(_with(plan, feature, resident_groups=resident_groups))
        there = load.hardware.memory_bytes
        return there is not None and load.gpu.total <= RESIDENT_SHARE * there

    return _with(plan, feature, resident_groups=_most(Sizes(plan).groups, has_room))


def _most(limit: int, holds: Callable[[int], bool]) -> int:
    """The largest number up to `limit` that holds, where those below one that holds do as well; else 0."""
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _with(plan: "JobPlan", feature: ActivationCheckpoint, **values: Any) -> "JobPlan":
    memory = plan.recipe.memory.model_copy(update={"activation_checkpoint": feature.model_copy(update=values)})
    return replace(plan, recipe=plan.recipe.model_copy(update={"memory": memory}))
