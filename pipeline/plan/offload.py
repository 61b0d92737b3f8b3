"""What a rank's store has to know of the plan: how much waits where, in tensors and bytes."""

import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.plan.hardware import hardware_of
from pipeline.plan.host_memory import ARENA_ALIGNMENT, disk_staging
from pipeline.plan.memory import Sizes, in_host_memory, on_disk
from pipeline.plan.terms import Term

if TYPE_CHECKING:
    from pipeline.plan.job import JobPlan

PAGE_BYTES = 4096
"""To which a tensor on disk is rounded up."""


@dataclass(frozen=True)
class Offload:
    """Of one rank. Nothing is known of a model without a plan: all of it goes to host memory, which grows."""

    arena_bytes: int = 0
    """Of host memory for what waits there; each tensor begins at a border of ARENA_ALIGNMENT."""
    resident_tensors: int = 0
    """The last ones that are put stay on the device."""
    tensors_per_group: int = 1
    """An input, and with kept attention two of every layer."""
    disk_groups: frozenset[int] = frozenset()
    disk_bytes: int = 0
    staging_bytes: int = 0
    """Of host memory that passes on what goes to disk and comes back."""
    scratch: str = ""
    least_disk_rate: float = 0.0
    """Bytes per second: half of this rank's share of what the plan counts on."""
    ranks_of_node: int = 1
    hidden_states_bytes: int = 0
    """Of host memory for hidden states between layers in chunks."""
    keys_values_bytes: int = 0
    """Of host memory for a layer's keys and values, and their gradients."""

    def is_on_disk(self, position: int) -> bool:
        """Whether the tensor that is put after `position` others waits on disk."""
        return position // self.tensors_per_group in self.disk_groups


def offload_of(plan: "JobPlan") -> Offload:
    at, layers = Sizes(plan), plan.model.num_layers
    per_layer = 2 if at.keeps_attention else 0
    pieces = at.sent_groups - len(at.disk_groups) + per_layer * (at.sent_layers - at.disk_layers)
    ranks, staging = plan.recipe.hardware.gpus_per_node, disk_staging(at).total
    tensors_per_group = 1 + per_layer * at.layers_per_group
    return Offload(
        arena_bytes=_bytes(in_host_memory(at)) + ARENA_ALIGNMENT * pieces,
        resident_tensors=at.resident_groups + per_layer * (layers - at.sent_layers),
        tensors_per_group=tensors_per_group,
        disk_groups=frozenset(at.disk_groups),
        disk_bytes=_bytes(on_disk(at)) + PAGE_BYTES * tensors_per_group * len(at.disk_groups),
        staging_bytes=round(staging / ranks) + 2 * PAGE_BYTES * tensors_per_group if at.disk_groups else 0,
        scratch=plan.recipe.hardware.scratch or tempfile.gettempdir(),
        least_disk_rate=hardware_of(plan.recipe.hardware).scratch_rate / ranks / 2,
        ranks_of_node=ranks,
    )


def _bytes(terms: tuple[Term, ...]) -> int:
    return round(sum(part.value for part in terms))
