"""The one ordered list of what is attached to a model, and why in this order."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from pipeline.memory import activation_checkpoint, allocator, tiled_loss, tiled_mlp, tiled_norm
from pipeline.memory.disk import Disk, check_is_disk
from pipeline.memory.fp8 import Fp8Store
from pipeline.memory.host_arena import check_node
from pipeline.memory.offload import DeviceStore, HostStore
from pipeline.memory.tiled_module import TiledModule
from pipeline.model.anatomy import decoder_layers, lm_head
from pipeline.plan.job import JobPlan
from pipeline.plan.offload import Offload, offload_of
from pipeline.recipe.schema import ActivationCheckpoint, Gpu, MemoryRecipe


@dataclass(frozen=True)
class Attached:
    """What the rest of the job needs to know of the features."""

    store: HostStore | DeviceStore | None
    """Where layer inputs wait; None without checkpointing."""
    tells_token_losses: bool
    """The model fills in `token_losses`."""
    gathered_whole: tuple[type[nn.Module], ...]
    """Modules that run their children several times per call: ZeRO-3 must gather them once, with all they hold."""

    @property
    def offloaded_bytes(self) -> int:
        """The most that waited at once, in host memory and on disk."""
        if not isinstance(self.store, HostStore):
            return 0
        return self.store.peak_bytes + self.store.spilled_bytes


def attach_features(model: PreTrainedModel, plan: JobPlan) -> Attached:
    """Attach everything the plan asks for, once the allocator is known to be what the plan set before CUDA started."""
    allocator.check_in_force(plan)
    return attach(
        model,
        plan.recipe.memory,
        norm_tile_tokens=plan.norm_tile_tokens,
        mlp_tile_tokens=plan.mlp_tile_tokens,
        loss_tile_tokens=plan.loss_tile_tokens,
        offload=offload_of(plan),
        pinned=plan.recipe.hardware.gpu is not Gpu.CPU,
    )


def attach(
    model: PreTrainedModel,
    memory: MemoryRecipe,
    *,
    norm_tile_tokens: int,
    mlp_tile_tokens: int,
    loss_tile_tokens: int,
    offload: Offload | None = None,
    pinned: bool = False,
) -> Attached:
    """Attach what the recipe asks for, from the inside of a layer outwards. `offload` says what waits where; its
    memory, pinned or not, and its room on disk are taken at once.

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
        keep_attention, layers_per_group = memory.activation_checkpoint.resolved[:2]
        store = _store(memory.activation_checkpoint, offload, pinned=pinned)
        activation_checkpoint.attach(
            model,
            store=Fp8Store(store) if memory.activation_checkpoint.offload_dtype == "fp8" else store,
            keep_attention=keep_attention,
            layers_per_group=layers_per_group,
        )
    kernel = "own" if memory.tiled_loss is None else memory.tiled_loss.kernel
    tiled_loss.attach(model, tile_tokens=loss_tile_tokens, kernel=kernel)
    return Attached(
        store,
        tells_token_losses=kernel == "own",
        gathered_whole=(tiled_mlp.TiledMLP,) if memory.tiled_mlp is not None else (),
    )


def _store(feature: ActivationCheckpoint, offload: Offload | None, *, pinned: bool) -> HostStore | DeviceStore:
    """Where layer inputs wait. Raises RunError if this machine has not the memory or the disk that are planned."""
    if feature.offload is None:
        return DeviceStore()
    found = feature.resolved
    # While a group runs again, what the one before it needs is on its way: its input, its layers' outs and lses.
    ahead = 1 + 2 * found.layers_per_group * found.keep_attention
    if offload is None:
        return HostStore(ahead=ahead)
    check_node(offload.ranks_of_node * (offload.arena_bytes + offload.staging_bytes))
    store = HostStore(
        capacity_bytes=offload.arena_bytes,
        resident_tensors=offload.resident_tensors,
        ahead=ahead,
        disk=_disk(offload, pinned=pinned, checksums=feature.checksums) if offload.disk_groups else None,
        is_on_disk=offload.is_on_disk,
    )
    store.reserve(pinned=pinned)
    return store


def _disk(offload: Offload, *, pinned: bool, checksums: bool) -> Disk:
    if pinned:  # where there is no GPU it is all for trying: on memory, or on a machine that is busy
        check_is_disk(Path(offload.scratch))
    disk = Disk(
        Path(offload.scratch),
        capacity_bytes=offload.disk_bytes,
        staging_bytes=offload.staging_bytes,
        pinned=pinned,
        checksums=checksums,
    )
    if pinned:
        disk.check_rate(offload.least_disk_rate)
    return disk


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
