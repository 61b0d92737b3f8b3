"""Bytes of a node's host memory and disk, item by item: one function per item, under the feature's name."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from pipeline.plan import fitted
from pipeline.plan.hardware import GIB, MIB
from pipeline.plan.memory import (
    WIDE,
    Sizes,
    gpu_bytes,
    in_host_memory,
    kept,
    kept_inputs,
    kept_of_attention,
    kept_of_keys,
    on_disk,
    states,
)
from pipeline.plan.memory import kept_attention as attention_outputs
from pipeline.plan.terms import Factor, Item, Term, term

if TYPE_CHECKING:
    from pipeline.plan.job import JobPlan

PROCESS_BYTES = 4 * GIB
"""Of a rank's process beside what is counted: CUDA, torch, transformers, DeepSpeed."""
SYSTEM_SHARE = 0.005
"""Of host memory: the system's own; the page cache gives way."""
CPU_PROCESS_BYTES = 700 * MIB
"""The same without CUDA: what 2.9 GiB of `make demo-million` leave when its tensors are taken away."""
ARENA_ALIGNMENT = 512
"""Bytes; as CUDA's own allocators."""
TOKEN_BYTES = 4
"""Of a packed data set."""


def optimizer(at: Sizes) -> Item:
    """Master weights, moments, both buffers that DeepSpeed keeps of gradients, and what surrounds them."""
    if not at.optimizer_offloaded:
        return Item("optimizer", ())
    here = (at.ranks_of_node,)
    held = states(at, *here, over=(at.ranks,))
    grads = term("gradients, summed and for the update", 2, ("bytes", at.state), at.parameters, *here, over=(at.ranks,))
    beside = ("bytes", fitted.constants.host_bytes_per_parameter)
    return Item(
        "optimizer", (*held, grads, term("what surrounds them", beside, at.parameters, *here, over=(at.ranks,)))
    )


def offloaded_parameters(at: Sizes) -> Item:
    """The partitions of a node's ranks."""
    if not at.parameters_offloaded:
        return Item("offloaded_parameters", ())
    weights = term("weights", ("bytes", at.d), at.parameters, at.ranks_of_node, over=(at.ranks,))
    return Item("offloaded_parameters", (weights,))


def activation_checkpoint(at: Sizes) -> Item:
    """Layer inputs that a node's ranks keep from forward to backward; pinned in one block, nothing is rounded up."""
    if at.hidden_on_host:
        return Item("activation_checkpoint", _of_node(at, (kept_inputs(at, ("groups of layers", at.groups)),)))
    return Item("activation_checkpoint", _of_node(at, in_host_memory(at)[:1]))


def kept_attention(at: Sizes) -> Item:
    """Attention's outputs, in the same block."""
    layers = at.sent_layers - at.disk_layers
    return Item("kept_attention", _of_node(at, kept_of_attention(at, "", layers=layers) if layers else ()))


def sequence_chunks(at: Sizes) -> Item:
    """Of layers in chunks: keys and values that are kept, those of one layer with the sums of their gradients, and
    hidden states that wait for no backward."""
    layers = at.sent_layers - at.disk_layers
    kept = kept_of_keys(at, "", layers=layers) if layers else ()
    terms = (*kept, *live_outputs(at), *keys_values(at), *hidden_states(at))
    rotary = term("cosines and sines", 2, ("bytes", at.d), at.n, ("head_dim", at.shape.head_dim))
    return Item("sequence_chunks", _of_node(at, (*terms, rotary) if at.hidden_on_host else terms))


def live_outputs(at: Sizes) -> tuple[Term, ...]:
    """Attention's outputs of a group that runs again, of a rank, where no whole ones may be on the GPU."""
    others = at.layers_per_group - 1
    if not (at.hidden_on_host and others) or at.keeps_attention:
        return ()
    return attention_outputs(at, ("the live group's other layers", others))


def keys_values(at: Sizes) -> tuple[Term, ...]:
    """Of the layer that is live, of a rank."""
    if not at.keys_on_host:
        return ()
    sums = (term("float32 sums of their gradients", 2, ("bytes", WIDE), at.earlier, at.kv_held),)
    return (term("keys and values of a layer", 2, ("bytes", at.d), at.n, at.kv_held), *sums)


def hidden_states(at: Sizes) -> tuple[Term, ...]:
    """Of a rank, beside the inputs of groups of layers: behind the last layer its output, and the last norm's with its
    gradient or two gradients; before, a gradient and the inputs of the live group's other layers."""
    if not at.hidden_on_host:
        return ()
    beside = ("outputs, gradients, or the live group's inputs", max(3, at.layers_per_group))
    return (term("hidden states that wait for no backward", ("bytes", at.d), at.n, at.h, beside),)


def _of_node(at: Sizes, terms: tuple[Term, ...]) -> tuple[Term, ...]:
    return tuple(term(part.what, *part.factors, at.ranks_of_node) for part in terms)


def disk_staging(at: Sizes) -> Item:
    """What passes through on its way to and from disk: two groups at a time."""
    if not at.disk_groups:
        return Item("disk_staging", ())
    groups = kept(at, " on their way", groups=2, layers=2 * at.layers_per_group)
    return Item("disk_staging", _of_node(at, groups))


def loader(at: Sizes) -> Item:
    """Shards of a sample that a node's ranks hold, and those read ahead: ids, labels and positions."""
    held = ("shards held", 1 + at.recipe.data.prefetch)
    return Item("loader", (term("ids, labels, positions", 3, ("bytes", 8), at.n, held, at.ranks_of_node),))


def processes(at: Sizes) -> Item:
    """What a rank's process takes; on a CPU with all that would lie on a GPU."""
    if at.on_gpu:
        return Item("processes", (term("a process", ("bytes", PROCESS_BYTES), at.ranks_of_node),))
    tensors = ("bytes of tensors", gpu_bytes(at.plan).total)
    process = term("a process", ("bytes", CPU_PROCESS_BYTES), at.ranks_of_node)
    return Item("processes", (process, term("what would lie on a GPU", tensors, at.ranks_of_node)))


def system(at: Sizes) -> Item:
    """What is left to the system."""
    share = ("share", SYSTEM_SHARE)
    return Item("system", (term("of host memory", share, ("host memory", at.hardware.host_memory_bytes)),))


HOST_ITEMS = (
    optimizer,
    offloaded_parameters,
    activation_checkpoint,
    kept_attention,
    sequence_chunks,
    disk_staging,
    loader,
    processes,
    system,
)


def checkpoints(at: Sizes) -> Item:
    """Saved states: weights, master weights and moments; the newest ones, and the one that is being written."""
    saved = at.recipe.checkpoint
    if saved is None:
        return Item("checkpoints", ())
    size = checkpoint_bytes(at)
    share = term("a node's part of each", *size.factors, ("checkpoints", saved.keep_last + 1), over=_nodes(at))
    return Item("checkpoints", (share,))


def checkpoint_bytes(at: Sizes) -> Term:
    """Of one whole checkpoint."""
    moments = 0 if at.recipe.optimizer.name == "sgd" else 2
    return term("weights, master weights, moments", ("bytes", at.d + at.state * (1 + moments)), at.parameters)


def packed_data(at: Sizes) -> Item:
    """The tokens of all steps, if none is seen twice."""
    tokens = ("tokens", at.plan.tokens_per_step)
    steps = ("steps", at.recipe.train.steps)
    packed = term("a node's part", ("bytes", TOKEN_BYTES), tokens, steps, over=_nodes(at))
    return Item("packed_data", (packed,))


def _nodes(at: Sizes) -> tuple[Factor, ...]:
    return (("nodes", at.plan.nodes),)


DISK_ITEMS = (checkpoints, packed_data)


def scratch_checkpoint(at: Sizes) -> Item:
    """What of the checkpoints of layers waits on a node's own disk."""
    return Item("activation_checkpoint", _of_node(at, on_disk(at)))


@dataclass(frozen=True)
class NodeBytes:
    """What a node holds."""

    items: tuple[Item, ...]

    @cached_property
    def by_name(self) -> dict[str, int]:
        return {item.name: round(item.total) for item in self.items}

    @property
    def total(self) -> int:
        return sum(self.by_name.values())


def host_bytes(plan: "JobPlan") -> NodeBytes:
    at = Sizes(plan)
    return NodeBytes(tuple(item(at) for item in HOST_ITEMS))


def disk_bytes(plan: "JobPlan") -> NodeBytes:
    """Of shared storage, per node."""
    at = Sizes(plan)
    return NodeBytes(tuple(item(at) for item in DISK_ITEMS))


def scratch_bytes(plan: "JobPlan") -> NodeBytes:
    """Of a node's own disk."""
    return NodeBytes((scratch_checkpoint(Sizes(plan)),))
