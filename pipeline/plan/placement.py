"""Where the checkpoint of each group of layers waits: the last ones on the GPU, as many as it has room for; of the
others, with `offload: disk`, as many in host memory as that has room for; what is left on disk. `offload: auto` is the
nearest of the three that has room.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.plan.hardware import hardware_of
from pipeline.plan.limits import load_of
from pipeline.plan.memory import Sizes, gpu_bytes, sent

if TYPE_CHECKING:
    from pipeline.plan.job import JobPlan

RESIDENT_SHARE = 0.9
"""Of a GPU's memory, up to which checkpoints stay: planned peaks came out up to a tenth too small (docs/planner.md),
and what stays saves host memory and copies, but seldom time."""


def placed(plan: "JobPlan") -> "JobPlan":
    """The plan with what is `auto` of the placement as numbers."""
    feature = plan.recipe.memory.activation_checkpoint
    if feature is None:
        return plan
    if feature.offload == "auto":
        return _nearest(plan)
    resident = 0 if feature.resident_groups == "auto" else feature.resident_groups
    disk = 0 if feature.disk_groups == "auto" else feature.disk_groups
    plan = _with(plan, resident_groups=resident, disk_groups=disk)
    if feature.offload is not None and feature.resident_groups == "auto" and not Sizes(plan).hidden_on_host:
        plan = _with(plan, resident_groups=_most_residents(plan))
    if feature.offload == "disk" and feature.disk_groups == "auto" and sent(Sizes(plan)):
        plan = _with(plan, disk_groups=_fewest_on_disk(plan))
    return plan


def _nearest(plan: "JobPlan") -> "JobPlan":
    """In the first place that has room, which costs least: what is nearer is never slower. Where nothing fits, in the
    last, which spares most of GPU and host memory."""
    tried = []
    for place in _places(plan):
        tried.append(placed(_with(plan, offload=place)))
        if _has_room(tried[-1]):
            return tried[-1]
    return next((one for one in tried if load_of(one).fits), tried[-1])


def _places(plan: "JobPlan") -> Iterator[str | None]:
    """The device, host memory, and a disk that somebody has named: TMPDIR may be small, or memory itself."""
    feature = plan.recipe.memory.activation_checkpoint
    assert feature is not None
    if feature.offload_dtype is None and not Sizes(plan).hidden_on_host:  # both are of what leaves the device
        yield None
    yield "cpu"
    if plan.recipe.hardware.scratch is not None:
        yield "disk"


def _has_room(plan: "JobPlan") -> bool:
    load, feature = load_of(plan), plan.recipe.memory.activation_checkpoint
    assert feature is not None
    there = load.hardware.memory_bytes
    crowded = there is not None and load.gpu.total > RESIDENT_SHARE * there
    return load.fits and not (feature.offload is None and crowded)


def _most_residents(plan: "JobPlan") -> int:
    there, groups = hardware_of(plan.recipe.hardware).memory_bytes, Sizes(plan).groups
    if there is None:
        return 0
    room = RESIDENT_SHARE * there

    def lacks_room(resident_groups: int) -> bool:
        return gpu_bytes(_with(plan, resident_groups=resident_groups)).total > room

    if lacks_room(1):  # of most long sequences, and planned often
        return 0
    return _first(lacks_room, 2, groups + 1) - 1


def _fewest_on_disk(plan: "JobPlan") -> int:
    """None, or from one on, which brings the memory that passes things on: so many that host memory is enough."""

    def fits(groups: int) -> bool:
        return load_of(_with(plan, disk_groups=groups)).host_free_bytes >= 0

    return 0 if fits(0) else _first(fits, 1, Sizes(plan).sent_groups)


def _first(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The smallest number from `low` on that holds, where all above one that holds do as well; else `high`."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _with(plan: "JobPlan", **values: int | str | None) -> "JobPlan":
    memory = plan.recipe.memory
    assert memory.activation_checkpoint is not None
    changed = memory.model_copy(
        update={"activation_checkpoint": memory.activation_checkpoint.model_copy(update=values)}
    )
    return replace(plan, recipe=plan.recipe.model_copy(update={"memory": changed}))
