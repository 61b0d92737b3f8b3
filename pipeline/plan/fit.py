"""The longest sequence that fits: what `data.seq_len: auto` is resolved to, and what `alst fit` tells."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from pipeline.errors import RecipeError
from pipeline.plan.hardware import GIB
from pipeline.plan.limits import load_of

if TYPE_CHECKING:
    from pipeline.plan.job import JobPlan

STEP_TOKENS = 256
"""Of a rank's shard: lengths are multiples of this times sp."""
MOST_STEPS = 2**22
"""A shard of 2^30 tokens, beyond which nobody has asked; it ends the search where no memory is limited."""


def longest(plan_of: Callable[[int], "JobPlan"], *, sp: int) -> "JobPlan":
    """The plan of the longest sequence that fits; `plan_of` makes the plan of a length.

    A multiple of 256 x sp tokens. Raises RecipeError if not even the shortest fits. Bytes never fall with the length,
    so bisection finds it.
    """
    step = STEP_TOKENS * sp
    fitting, low = plan_of(step), 1
    load = load_of(fitting)
    if not load.fits:
        short = max(load.missing_bytes) / GIB
        raise RecipeError(
            f"data.seq_len = auto: no length fits, {short:,.1f} GiB of {load.binding} memory are missing for "
            f"{step:,} tokens; `alst plan` with data.seq_len={step} tells what frees how much"
        )
    high = 2
    while high <= MOST_STEPS and load_of(plan := plan_of(high * step)).fits:
        fitting, low, high = plan, high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        plan = plan_of(middle * step)
        if load_of(plan).fits:
            fitting, low = plan, middle
        else:
            high = middle
    return fitting
