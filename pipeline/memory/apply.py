"""The one ordered list of what is attached to a model, and why in this order."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from pipeline.memory import activation_checkpoint, allocator, tiled_loss, tiled_mlp, tiled_norm
from pipeline.memory.offload import DeviceStore, HostStore
from pipeline.memory.tiled_module import TiledModule
from pipeline.model.anatomy import decoder_layers, lm_head
from pipeline.plan.host_memory import arena_bytes
from pipeline.plan.job import JobPlan
from pipeline.recipe.schema import MemoryRecipe


@dataclass(frozen=True)
class Attached:
    """What the rest of the job needs to know of the features."""

    store: HostStore | DeviceStore | None
    """Where layer inputs wait; None without checkpointing."""
    tells_token_losses: bool
    """The model fills in `token_losses`."""
    gathered_whole: tuple[type[nn.Module], ...]
    """Modules that run their children several times per call: ZeRO-3 must gather them once, with all they hold."""


def attach_features(model: PreTrainedModel, plan: JobPlan) -> Attached:
    """Attach everything the plan asks for, once the allocator is known to be what the plan set before CUDA started."""
    allocator.check_in_force(plan)
    return attach(
        model,
        plan.recipe.memory,
        norm_tile_tokens=plan.norm_tile_tokens,
        mlp_tile_tokens=plan.mlp_tile_tokens,
        loss_tile_tokens=plan.loss_tile_tokens,
        arena_bytes=arena_bytes(plan),
    )


def attach(
    model: PreTrainedModel,
    memory: MemoryRecipe,
    *,
    norm_tile_tokens: int,
    mlp_tile_tokens: int,
    loss_tile_tokens: int,
    arena_bytes: int = 0,
) -> Attached:
    """Attach what the recipe asks for, from the inside of a layer outwards. `arena_bytes` of host memory are taken at
    once for what is offloaded, and more where that is not enough.

    1. Norms and the MLP: inside the layer, so that a checkpointed layer runs the tiled ones again.
    2. The layer: its checkpoint wraps all that is inside.
    3. The loss: the model's own forward around backbone and head. Always attached, because the loss must be computed
       inside the engine's call; without the feature it has one tile.
    """
    store: HostStore | DeviceStore | None = None
    if memory.tiled_norm is not None:
        tiled_norm.attach(model, tile_tokens=norm_tile_tokens)
    if memory.tiled_mlp is not None:
        tiled_mlp.attach(model, tile_tokens=mlp_tile_tokens)
    if memory.activation_checkpoint is not None:
        keep_attention, layers_per_group = memory.activation_checkpoint.resolved
        # While a group runs again, what the one before it needs is on its way: its input, its layers' outs and lses.
        ahead = 1 + 2 * layers_per_group * keep_attention
        offloads = memory.activation_checkpoint.offload == "cpu"
        store = HostStore(capacity_bytes=arena_bytes, ahead=ahead) if offloads else DeviceStore()
        activation_checkpoint.attach(
            model, store=store, keep_attention=keep_attention, layers_per_group=layers_per_group
        )
    kernel = "own" if memory.tiled_loss is None else memory.tiled_loss.kernel
    tiled_loss.attach(model, tile_tokens=loss_tile_tokens, kernel=kernel)
    return Attached(
        store,
        tells_token_losses=kernel == "own",
        gathered_whole=(tiled_mlp.TiledMLP,) if memory.tiled_mlp is not None else (),
    )


@contextmanager
def features_off(model: PreTrainedModel, *, forward: Callable[..., Any], attention: str) -> Iterator[None]:
    """The stock model, for as long as the block lasts: same weights, every feature off, stock attention.

    `forward(model, …)` is what a call of the model runs; the head is the stock head again.
    """
    ours = model.config._attn_implementation
    with ExitStack() as stack:
        stack.enter_context(
            _instead(lm_head(model), "forward", MethodType(type(lm_head(model)).forward, lm_head(model)))
        )
        stack.enter_context(_instead(model, "forward", MethodType(forward, model)))
        for layer in decoder_layers(model):
            stack.enter_context(_instead(layer, "gradient_checkpointing", False))
        for module in model.modules():
            if isinstance(module, TiledModule):
                stack.enter_context(_instead(module, "forward", module.stock.forward))
        model.set_attn_implementation(attention)
        stack.callback(model.set_attn_implementation, ours)
        yield


@contextmanager
def _instead(owner: nn.Module, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` inside the block; then what the instance itself had, if it had one."""
    had, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
