"""The one ordered list of what is attached to a model, and why in this order."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from pipeline.memory import activation_checkpoint, tiled_loss, tiled_mlp
from pipeline.memory.offload import DeviceStore, HostStore
from pipeline.plan.job import JobPlan


@dataclass(frozen=True)
class Attached:
    """What the rest of the job needs to know of the features."""

    store: HostStore | DeviceStore | None
    """Where layer inputs wait; None without checkpointing."""
    gathered_whole: tuple[type[nn.Module], ...]
    """Modules that run their children several times per call: ZeRO-3 must gather them once, with all they hold."""


def attach_features(model: PreTrainedModel, plan: JobPlan) -> Attached:
    """Attach everything the plan asks for, from the inside of a layer outwards.

    1. The MLP: inside the layer, so that a checkpointed layer runs the tiled one again.
    2. The layer: its checkpoint wraps all that is inside.
    3. The loss: the model's own forward around backbone and head. Always attached, because the loss must be computed
       inside the engine's call; without the feature it has one tile.
    """
    memory = plan.recipe.memory
    store: HostStore | DeviceStore | None = None
    if memory.tiled_mlp is not None:
        tiled_mlp.attach(model, tile_tokens=plan.mlp_tile_tokens)
    if memory.activation_checkpoint is not None:
        store = HostStore() if memory.activation_checkpoint.offload == "cpu" else DeviceStore()
        activation_checkpoint.attach(model, store=store)
    tiled_loss.attach(model, tile_tokens=plan.loss_tile_tokens)
    return Attached(store, gathered_whole=(tiled_mlp.TiledMLP,) if memory.tiled_mlp is not None else ())
