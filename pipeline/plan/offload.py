"""What a rank's store has to know of the plan: how much waits where, in tensors and bytes."""

import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.plan.hardware import hardware_of
from pipeline.plan.host_memory import ARENA_ALIGNMENT, disk_staging, hidden_states, keys_values, live_outputs
from pipeline.plan.memory import Sizes, in_host_memory, kept_inputs, on_disk
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
    """An input, if it does not lie in host memory anyway; of every layer's chunk two with kept attention, and two with
    kept keys and values."""
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

    @property
    def host_bytes(self) -> int:
        """Of host memory in all."""
        return self.arena_bytes + self.staging_bytes + self.hidden_states_bytes + self.keys_values_bytes

    def is_on_disk(self, position: int) -> bool:
        """Whether the tensor that is put after `position` others waits on disk."""
        return position // self.tensors_per_group in self.disk_groups


def offload_of(plan: "JobPlan") -> Offload:
    at, layers = Sizes(plan), plan.model.num_layers
    inputs = 0 if at.hidden_on_host else 1
    per_layer = 2 * plan.num_chunks * (at.keeps_attention + at.keeps_keys)
    pieces = inputs * (at.sent_groups - len(at.disk_groups)) + per_layer * (at.sent_layers - at.disk_layers)
    live = live_outputs(at)
    live_pieces = 2 * plan.num_chunks * (at.layers_per_group - 1) if live else 0
    ranks, staging = plan.recipe.hardware.gpus_per_node, disk_staging(at).total
    tensors_per_group = max(1, inputs + per_layer * at.layers_per_group)
    return Offload(
        arena_bytes=_bytes((*in_host_memory(at), *live)) + ARENA_ALIGNMENT * (pieces + live_pieces),
        resident_tensors=at.resident_groups + per_layer * (layers - at.sent_layers),
        tensors_per_group=tensors_per_group,
        disk_groups=frozenset(at.disk_groups),
        disk_bytes=_bytes(on_disk(at)) + PAGE_BYTES * tensors_per_group * len(at.disk_groups),
        staging_bytes=round(staging / ranks) + 2 * PAGE_BYTES * tensors_per_group if at.disk_groups else 0,
        scratch=plan.recipe.hardware.scratch or tempfile.gettempdir(),
        least_disk_rate=hardware_of(plan.recipe.hardware).scratch_rate / ranks / 2,
        ranks_of_node=ranks,
        hidden_states_bytes=_hidden_states_bytes(at),
        keys_values_bytes=_bytes(keys_values(at)) + ARENA_ALIGNMENT * 4 * plan.num_chunks if at.keys_on_host else 0,
    )


def _hidden_states_bytes(at: Sizes) -> int:
    """With the inputs of groups of layers, which wait among them."""
    if not at.hidden_on_host:
        return 0
    whole = (kept_inputs(at, ("groups of layers", at.groups)), *hidden_states(at))
    return _bytes(whole) + ARENA_ALIGNMENT * (at.groups + max(3, at.layers_per_group))


def _bytes(terms: tuple[Term, ...]) -> int:
    return round(sum(part.value for part in terms))
