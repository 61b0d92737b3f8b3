"""`auto` of what waits for backward: of the combinations that fit, the one with the shortest step."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING

from pipeline.plan.documents import documents_of
from pipeline.plan.limits import load_of
from pipeline.plan.time import step_seconds
from pipeline.recipe.load import check
from pipeline.recipe.schema import Recipe

if TYPE_CHECKING:
    from pipeline.plan.job import JobPlan

GROUP_SIZES = (1, 2, 4, 8, 16)
"""Beyond that the inputs of a live group are more than what fewer checkpoints save, with 256 layers or fewer."""


def combinations(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe with each value that its `auto`s may take; itself where it has none. What costs least comes first."""
    feature = recipe.memory.activation_checkpoint
    if feature is None or "auto" not in (feature.keep_attention, feature.layers_per_group):
        yield recipe
        return
    groups = GROUP_SIZES if feature.layers_per_group == "auto" else (feature.layers_per_group,)
    kept = (False, True) if feature.keep_attention == "auto" else (feature.keep_attention,)
    for layers_per_group, keep_attention in product(groups, kept):
        raw = recipe.model_dump(mode="json")
        raw["memory"]["activation_checkpoint"] |= {
            "layers_per_group": layers_per_group,
            "keep_attention": keep_attention,
        }
        yield check(raw)


def fastest(plans: Sequence["JobPlan"]) -> "JobPlan":
    """Of those that fit; where no seconds are known, on a CPU, the first. Where none fits, the one that lacks least."""
    fitting = [plan for plan in plans if load_of(plan).fits]
    return min(fitting, key=_seconds) if fitting else min(plans, key=_missing_bytes)


def _seconds(plan: "JobPlan") -> float:
    seconds = step_seconds(plan, documents_of(plan))
    return 0.0 if seconds is None else seconds.total


def _missing_bytes(plan: "JobPlan") -> int:
    return sum(load_of(plan).missing_bytes)
