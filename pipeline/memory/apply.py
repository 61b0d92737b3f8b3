"""The one ordered list of what is attached to a model, and why in this order."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from pipeline.memory import (
    activation_checkpoint,
    allocator,
    host_edges,
    sequence_chunks,
    tiled_loss,
    tiled_mlp,
    tiled_norm,
)
from pipeline.memory.disk import Disk, check_is_disk
from pipeline.memory.fp8 import Fp8Store
from pipeline.memory.hidden_states import InHostMemory, OnDevice
from pipeline.memory.host_arena import HostArena, check_node
from pipeline.memory.keys_values import DeviceBlocks, HostBlocks
from pipeline.memory.offload import DeviceStore, HostStore, Store
from pipeline.memory.tiled_module import TiledModule
from pipeline.model.anatomy import decoder_layers, lm_head
from pipeline.plan.job import JobPlan
from pipeline.plan.offload import Offload, offload_of
from pipeline.recipe.schema import ActivationCheckpoint, Gpu, MemoryRecipe, SequenceChunks


@dataclass(frozen=True)
class Attached:
    """What the rest of the job needs to know of the features."""

    store: HostStore | DeviceStore | None
    """Where layer inputs, or attention's outputs, wait; None without checkpointing."""
    arenas: tuple[HostArena, ...]
    """Of host memory beside it: hidden states, keys and values of layers in chunks."""
    tells_token_losses: bool
    """The model fills in `token_losses`."""
    gathered_whole: tuple[type[nn.Module], ...]
    """Modules that run their children several times per call: ZeRO-3 must gather them once, with all they hold."""

    @property
    def offloaded_bytes(self) -> int:
        """The most that waited at once, in host memory and on disk, summed over the places."""
        beside = sum(arena.peak_bytes for arena in self.arenas)
        return beside + (0 if self.store is None else self.store.peak_bytes + self.store.spilled_bytes)

    @property
    def pinned_bytes(self) -> int:
        beside = sum(arena.pinned_bytes for arena in self.arenas)
        return beside + (0 if self.store is None else self.store.pinned_bytes)

    @property
    def spilled_bytes(self) -> int:
        """The most that waited on disk at once."""
        return 0 if self.store is None else self.store.spilled_bytes


def attach_features(model: PreTrainedModel, plan: JobPlan) -> Attached:
    """Attach everything the plan asks for, once the allocator is known to be what the plan set before CUDA started."""
    allocator.check_in_force(plan)
    return attach(
        model,
        plan.recipe.memory,
        norm_tile_tokens=plan.norm_tile_tokens,
        mlp_tile_tokens=plan.mlp_tile_tokens,
        loss_tile_tokens=plan.loss_tile_tokens,
        local_chunk_tokens=plan.local_chunk_tokens,
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
    local_chunk_tokens: int | None = None,
    offload: Offload | None = None,
    pinned: bool = False,
) -> Attached:
    """Attach what the recipe asks for, from the inside of a layer outwards. `offload` says what waits where; its
    memory, pinned or not, and its room on disk are taken at once.

    1. Norms and the MLP: inside the layer, so that a checkpointed layer runs the tiled ones again. An MLP whose tile
       is no smaller than a chunk is run again with the chunk, and not a third time.
    2. The layer: its checkpoint, or its chunks, wrap all that is inside.
    3. Embeddings and the last norm, where hidden states lie in host memory between layers.
    4. The loss: the model's own forward around backbone and head. Always attached, because the loss must be computed
       inside the engine's call; without the feature it has one tile.
    """
    pinned = pinned or next(model.parameters()).is_cuda
    if offload is not None:
        check_node(offload.ranks_of_node * offload.host_bytes)
    states = _states(memory, offload or Offload(), pinned=pinned)
    gathered_whole: tuple[type[nn.Module], ...] = ()
    if memory.tiled_norm is not None:
        tiled_norm.attach(model, tile_tokens=norm_tile_tokens, states=states)
    if memory.tiled_mlp is not None and not _is_chunk(memory, mlp_tile_tokens, local_chunk_tokens):
        tiled_mlp.attach(model, tile_tokens=mlp_tile_tokens)
        gathered_whole = (tiled_mlp.TiledMLP,)
    store: HostStore | DeviceStore | None = None
    blocks: DeviceBlocks | HostBlocks = DeviceBlocks()
    if memory.activation_checkpoint is not None:
        store = _store(memory, offload, pinned=pinned)
        if memory.sequence_chunks is None:
            _attach_checkpoint(model, memory.activation_checkpoint, store)
        else:
            blocks = _blocks(memory.sequence_chunks, offload or Offload(), pinned=pinned)
            _attach_chunks(model, memory, _Places(states, blocks, store))
            gathered_whole = tuple({type(layer) for layer in decoder_layers(model)})
    if isinstance(states, InHostMemory):
        host_edges.attach(model, states, tile_tokens=min(norm_tile_tokens, local_chunk_tokens or norm_tile_tokens))
    kernel = "own" if memory.tiled_loss is None else memory.tiled_loss.kernel
    tiled_loss.attach(model, tile_tokens=loss_tile_tokens, kernel=kernel, states=states)
    arenas = tuple(place.arena for place in (states, blocks) if isinstance(place, InHostMemory | HostBlocks))
    return Attached(store, arenas, tells_token_losses=kernel == "own", gathered_whole=gathered_whole)


@dataclass(frozen=True)
class _Places:
    """Where layers in chunks keep what they keep."""

    states: OnDevice
    blocks: DeviceBlocks | HostBlocks
    store: HostStore | DeviceStore


def _states(memory: MemoryRecipe, offload: Offload, *, pinned: bool) -> OnDevice:
    """Where hidden states lie between layers."""
    chunks = memory.sequence_chunks
    if chunks is None or chunks.resolved.hidden_states == "gpu":
        return OnDevice()
    return InHostMemory(capacity_bytes=offload.hidden_states_bytes, pinned=pinned)


def _blocks(chunks: SequenceChunks, offload: Offload, *, pinned: bool) -> DeviceBlocks | HostBlocks:
    """Where keys and values of a layer lie."""
    if chunks.resolved.keys_values == "gpu":
        return DeviceBlocks()
    return HostBlocks(capacity_bytes=offload.keys_values_bytes, pinned=pinned)


def _is_chunk(memory: MemoryRecipe, tile_tokens: int, local_chunk_tokens: int | None) -> bool:
    """Whether a tile is all that a layer in chunks sees at once."""
    return memory.sequence_chunks is not None and tile_tokens >= (local_chunk_tokens or tile_tokens)


def _attach_checkpoint(model: PreTrainedModel, feature: ActivationCheckpoint, store: HostStore | DeviceStore) -> None:
    activation_checkpoint.attach(
        model,
        store=_rounding(feature, store),
        keep_attention=feature.resolved.keep_attention,
        layers_per_group=feature.resolved.layers_per_group,
    )


def _attach_chunks(model: PreTrainedModel, memory: MemoryRecipe, places: _Places) -> None:
    """Hidden states in host memory wait for backward where they are; what is kept of attention goes to the store."""
    feature, chunks = memory.activation_checkpoint, memory.sequence_chunks
    assert feature is not None
    assert chunks is not None
    outputs, on_host = _rounding(feature, places.store), isinstance(places.states, InHostMemory)
    waiting = sequence_chunks.Waiting(
        states=places.states,
        blocks=places.blocks,
        inputs=DeviceStore() if on_host else outputs,
        outputs=outputs,
        live_outputs=outputs if on_host else DeviceStore(),
        keep_attention=feature.resolved.keep_attention,
        keep_keys_values=chunks.resolved.keep_keys_values,
    )
    sequence_chunks.attach(model, waiting, layers_per_group=feature.resolved.layers_per_group)


def _rounding(feature: ActivationCheckpoint, store: HostStore | DeviceStore) -> Store:
    return Fp8Store(store) if feature.offload_dtype == "fp8" else store


def _store(memory: MemoryRecipe, offload: Offload | None, *, pinned: bool) -> HostStore | DeviceStore:
    """Where layer inputs wait. Raises RunError if this machine has not the memory or the disk that are planned."""
    feature, chunks = memory.activation_checkpoint, memory.sequence_chunks
    if feature is None or feature.offload is None:
        return DeviceStore()
    found = feature.resolved
    # While a group runs again, what the one before it needs is on its way: its input, its layers' outs and lses; of
    # layers in chunks those of one chunk.
    ahead = 1 + 2 * (found.layers_per_group if chunks is None else 1) * found.keep_attention
    if offload is None:
        return HostStore(ahead=ahead)
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
            stack.enter_context(_instead(layer, "forward", MethodType(type(layer).forward, layer)))
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
