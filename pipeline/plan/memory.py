"""Bytes of a rank's GPU, item by item: one function per item, under the feature's name.

Counted tensor by tensor from what the job runs (stock norms, gated MLPs, this project's tiles and kernels) and held to
measured peaks in tests/unit/test_plan_activations.py. A GPU's peak comes at one of the moments of a step below; an
item's terms say at which of them they are there. Letters: n tokens of a rank's shard, c those of it that a layer works
on at once, h hidden size, d bytes of the model's dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import TYPE_CHECKING

from pipeline.plan import fitted
from pipeline.plan.hardware import GIB, Hardware, Kernel, hardware_of, kernel_of
from pipeline.plan.model_shape import ModelShape
from pipeline.plan.terms import Factor, Item, Term, term
from pipeline.recipe.schema import Gpu, Recipe, ResolvedChunks

if TYPE_CHECKING:
    from pipeline.plan.job import JobPlan

LOSS, LOSS_BACKWARD, FINAL_NORM, MLP, NORM, ATTENTION = MOMENTS = (
    "the loss",
    "the backward of the loss",
    "the backward of the last norm",
    "the backward of a layer's MLP",
    "the backward of a layer's second norm",
    "the backward of a layer's attention",
)
"""Of a step, when a GPU may hold the most."""
IN_LAYER = (MLP, NORM, ATTENTION)
AFTER_LAYERS = (LOSS, LOSS_BACKWARD, FINAL_NORM)

WIDE = 4.0
"""Bytes of float32, in which norms, losses and sums are computed."""

FP8_SCALE_BYTES = 4
"""Of a row that is offloaded in fp8."""

# DeepSpeed 0.19's own defaults, in elements (deepspeed/runtime/zero/config.py); the engine does not change them.
LIVE_PARAMETERS = 10**9
REDUCE_BUCKET = 5 * 10**8
PREFETCH_BUCKET = 5 * 10**7
SUB_GROUP = 10**9

CONTEXT_BYTES = GIB // 2
"""CUDA's context with the kernels of torch and flash-attn, which are loaded as they are used."""
RESERVE_WITHOUT_SEGMENTS = 2
"""Times the allocator's reserve; ALST gives no figure for what goes without expandable segments (§3.4)."""


@dataclass(frozen=True)
class Sizes:
    """What the formulas speak of, from a plan."""

    plan: "JobPlan"

    @property
    def recipe(self) -> Recipe:
        return self.plan.recipe

    @property
    def shape(self) -> ModelShape:
        return self.plan.model

    @property
    def on_gpu(self) -> bool:
        return self.recipe.hardware.gpu is not Gpu.CPU

    @cached_property
    def hardware(self) -> Hardware:
        return hardware_of(self.recipe.hardware)

    @property
    def kernel(self) -> Kernel:
        return kernel_of(self.recipe.model, self.recipe.hardware.gpu)

    @property
    def d(self) -> float:
        """Bytes of an element of the model's dtype."""
        return 2.0 if self.recipe.model.dtype == "bfloat16" else 4.0

    @property
    def offloads_fp8(self) -> bool:
        feature = self.recipe.memory.activation_checkpoint
        return feature is not None and feature.offload_dtype == "fp8"

    @property
    def state(self) -> float:
        """Bytes of an element of the optimizer's states."""
        return 2.0 if self.recipe.optimizer.states_dtype == "bfloat16" else 4.0

    @property
    def n(self) -> Factor:
        return ("tokens", self.plan.local_seq_len)

    @cached_property
    def chunks(self) -> ResolvedChunks | None:
        feature = self.recipe.memory.sequence_chunks
        return None if feature is None else feature.resolved

    @property
    def c(self) -> Factor:
        """Tokens of the shard that a layer works on at once: a chunk's, or all."""
        return self.n if self.chunks is None else ("tokens of a chunk", self.plan.local_chunk_tokens)

    @property
    def earlier(self) -> Factor:
        """Tokens of all chunks but the last, which no later one looks back at."""
        return ("tokens of earlier chunks", (self.plan.num_chunks - 1) * self.plan.local_chunk_tokens)

    def behind_layers(self, tile_tokens: int) -> Factor:
        """Tokens whose hidden states are on the GPU behind the layers: a tile's, if they lie in host memory."""
        if not self.hidden_on_host:
            return self.n
        return ("tokens of a tile", min(tile_tokens, self.plan.local_chunk_tokens))

    @property
    def hidden_on_host(self) -> bool:
        """Whether hidden states lie in host memory between layers."""
        return self.chunks is not None and self.chunks.hidden_states == "cpu"

    @property
    def keys_on_host(self) -> bool:
        return self.chunks is not None and self.chunks.keys_values == "cpu"

    @property
    def keeps_keys(self) -> bool:
        """Whether keys and values of every layer wait for backward."""
        return self.chunks is not None and self.chunks.keep_keys_values

    @property
    def tiles_mlp(self) -> bool:
        """A chunk that is no larger than a tile is one already."""
        tiled = self.recipe.memory.tiled_mlp is not None
        return tiled and (self.chunks is None or self.plan.mlp_tile_tokens < self.plan.local_chunk_tokens)

    @property
    def h(self) -> Factor:
        return ("hidden", self.shape.hidden_size)

    @property
    def q(self) -> Factor:
        return ("heads x head_dim", self.shape.query_size)

    @property
    def kv(self) -> Factor:
        return ("KV heads x head_dim", self.shape.num_kv_heads * self.shape.head_dim)

    @property
    def kv_heads(self) -> int:
        """With their replicas, over all SP ranks."""
        return max(self.shape.num_kv_heads, self.plan.sp)

    @property
    def kv_held(self) -> Factor:
        return ("KV heads held x head_dim", self.kv_heads * self.shape.head_dim)

    @property
    def vocab(self) -> Factor:
        return ("vocabulary", self.shape.vocab_size)

    @property
    def layers(self) -> Factor:
        return ("layers", self.shape.num_layers)

    @property
    def parameters(self) -> Factor:
        return ("parameters", self.shape.total_parameters)

    @property
    def ranks(self) -> Factor:
        return ("ranks", self.plan.world_size)

    @property
    def ranks_of_node(self) -> Factor:
        return ("ranks of a node", self.recipe.hardware.gpus_per_node)

    @property
    def mlp_width(self) -> Factor:
        """Intermediate elements of a token: of the experts it is sent to, where there are experts."""
        shape = self.shape
        dense = shape.intermediate_size if shape.num_expert_layers < shape.num_layers else 0
        routed = shape.experts_per_token * shape.expert_size + shape.shared_expert_size
        return ("MLP width", max(dense, routed if shape.num_expert_layers else 0))

    @property
    def checkpointed(self) -> bool:
        return self.recipe.memory.activation_checkpoint is not None

    @property
    def layers_per_group(self) -> int:
        """That share a checkpoint."""
        feature = self.recipe.memory.activation_checkpoint
        return 1 if feature is None else min(feature.resolved.layers_per_group, self.shape.num_layers)

    @property
    def groups(self) -> int:
        return ceil(self.shape.num_layers / self.layers_per_group)

    @property
    def resident_groups(self) -> int:
        """The last ones, of an offload, that stay on the GPU."""
        feature = self.recipe.memory.activation_checkpoint
        return 0 if feature is None or feature.offload is None else min(feature.resolved.resident_groups, self.groups)

    @property
    def sent_groups(self) -> int:
        """The first ones, that leave the GPU."""
        feature = self.recipe.memory.activation_checkpoint
        return 0 if feature is None or feature.offload is None else self.groups - self.resident_groups

    @property
    def sent_layers(self) -> int:
        return min(self.sent_groups * self.layers_per_group, self.shape.num_layers)

    @cached_property
    def disk_groups(self) -> tuple[int, ...]:
        """Numbers of the groups that wait on disk: spread, so that it is busy throughout, and the first among them."""
        feature, sent = self.recipe.memory.activation_checkpoint, self.sent_groups
        nothing = self.hidden_on_host and not (self.keeps_attention or self.keeps_keys)  # but what waits there anyway
        on_disk = feature is not None and feature.offload == "disk" and not nothing
        count = min(feature.resolved.disk_groups, sent) if feature is not None and on_disk else 0
        return tuple(group for group in range(sent) if group * count % sent < count)

    @property
    def disk_layers(self) -> int:
        size = self.layers_per_group
        return sum(min(size, self.shape.num_layers - group * size) for group in self.disk_groups)

    @property
    def keeps_attention(self) -> bool:
        feature = self.recipe.memory.activation_checkpoint
        return feature is not None and feature.resolved.keep_attention

    @property
    def parameters_offloaded(self) -> bool:
        return self.recipe.zero.offload_parameters is not None

    @property
    def optimizer_offloaded(self) -> bool:
        return self.recipe.zero.offload_optimizer is not None

    def partition(self, *, from_stage: int) -> tuple[Factor, ...]:
        """What a count is divided by where ZeRO partitions it."""
        return (self.ranks,) if self.recipe.zero.stage >= from_stage else ()


# Held throughout a step


def parameters(at: Sizes) -> Item:
    """The rank's weights: its partition under ZeRO-3, all of them below; none where they wait in host memory."""
    if at.parameters_offloaded:
        return Item("parameters", ())
    whole = term("weights", ("bytes", at.d), at.parameters, over=at.partition(from_stage=3))
    return Item("parameters", (whole,))


def gradients(at: Sizes) -> Item:
    """Gradients that are kept until the update: those of the partition from ZeRO-2 on."""
    if at.recipe.zero.stage < 2:
        return Item("gradients", (term("gradients of all weights", ("bytes", at.d), at.parameters),))
    if at.optimizer_offloaded:
        return Item("gradients", ())
    sums = term("sums over micro-batches", ("bytes", at.state), at.parameters, over=(at.ranks,))
    return Item("gradients", (sums,))


def optimizer(at: Sizes) -> Item:
    """Master weights and moments, of the partition from ZeRO-1 on."""
    if at.optimizer_offloaded:
        return Item("optimizer", ())
    return Item("optimizer", states(at, over=at.partition(from_stage=1)))


def states(at: Sizes, *others: Factor, over: tuple[Factor, ...]) -> tuple[Term, ...]:
    """Master weights and the moments of Adam; a plain SGD has none."""
    one = (("bytes", at.state), at.parameters, *others)
    master = term("master weights", *one, over=over)
    return (master,) if at.recipe.optimizer.name == "sgd" else (master, term("two moments", 2, *one, over=over))


def zero_buffers(at: Sizes) -> Item:
    """What DeepSpeed holds to gather weights and to reduce gradients."""
    stage, total = at.recipe.zero.stage, at.shape.total_parameters
    if stage == 0:
        return Item("zero_buffers", ())
    element = ("bytes", at.d)
    terms = [term("bucket of gradients", element, ("elements", min(REDUCE_BUCKET, total)))]
    if stage == 3:
        largest = max(at.shape.layer_parameters, at.shape.head_parameters)
        gathered = min(max(LIVE_PARAMETERS, largest + PREFETCH_BUCKET), total)
        terms.append(term("gathered weights", element, ("parameters", gathered)))
        bucket = ("elements", min(REDUCE_BUCKET, total))
        terms.append(term("bucket of gradients, by ranks", element, bucket, when=IN_LAYER))
    if not at.optimizer_offloaded:
        part = min(SUB_GROUP, total / at.plan.world_size)
        terms.append(term("gradients of a group that is updated", ("bytes", at.state), ("parameters", part)))
    return Item("zero_buffers", tuple(terms))


def batch(at: Sizes) -> Item:
    """Token ids, labels, positions, and the rotary embedding of every position."""
    there = at.c if at.hidden_on_host else at.n
    rotary = term("cosines and sines", 2, ("bytes", at.d), there, ("head_dim", at.shape.head_dim))
    return Item("batch", (term("ids, labels, positions", 3, ("bytes", 8), at.n), rotary))


# Of the layers


def activation_checkpoint(at: Sizes) -> Item:
    """What waits for backward on the GPU, of the layers other than the one that is live.

    What is kept, and with offload only what stays all the same and what is on its way back; the inputs and attention
    outputs of the group of layers that is live; without the feature all that a layer saves.
    """
    feature = at.recipe.memory.activation_checkpoint
    if feature is None:
        saved = (*_saved_by_norms(at), *_saved_by_attention(at), *_saved_by_mlp(at))
        others = ("layers but one", at.shape.num_layers - 1)
        terms = tuple(
            term(part.what, *part.factors, count, when=moments)
            for part in saved
            for count, moments in ((others, IN_LAYER), (at.layers, AFTER_LAYERS))
        )
        return Item("activation_checkpoint", terms)
    waiting = _resident(at) if feature.offload is not None else _kept_on_gpu(at)
    return Item("activation_checkpoint", (*waiting, *_live_group(at)))


def kept_inputs(at: Sizes, count: Factor) -> Term:
    """Inputs of so many groups of layers."""
    return term(f"inputs of {count[0]}", ("bytes", at.d), at.n, at.h, count)


def kept_attention(at: Sizes, count: Factor, *, tokens: Factor | None = None) -> tuple[Term, ...]:
    """Attention's output and log-sum-exp, of so many layers; of all tokens of the shard, or of so many."""
    tokens = tokens or at.n
    return (
        term(f"attention's output of {count[0]}", ("bytes", at.d), tokens, at.q, count),
        term(f"log-sum-exp of {count[0]}", ("bytes", WIDE), tokens, ("heads", at.shape.num_query_heads), count),
    )


def kept_keys(at: Sizes, count: Factor, *, tokens: Factor | None = None) -> Term:
    """Keys and values, as the kernel gets them, of so many layers."""
    return term(f"keys and values of {count[0]}", 2, ("bytes", at.d), tokens or at.n, at.kv_held, count)


def kept(at: Sizes, what: str, *, groups: int, layers: int) -> tuple[Term, ...]:
    """What so many groups of so many layers keep from a rank's forward to its backward, wherever it waits; but for
    hidden states that lie in host memory anyway."""
    inputs = _stored(at, kept_inputs(at, (f"groups of layers{what}", groups)), rows=1)
    others = (*kept_of_attention(at, what, layers=layers), *kept_of_keys(at, what, layers=layers))
    return others if at.hidden_on_host else (inputs, *others)


def kept_of_attention(at: Sizes, what: str, *, layers: int) -> tuple[Term, ...]:
    """Nothing where it is not kept."""
    if not at.keeps_attention:
        return ()
    out, lse = kept_attention(at, (f"layers{what}", layers))
    return _stored(at, out, rows=at.shape.num_query_heads), lse


def kept_of_keys(at: Sizes, what: str, *, layers: int) -> tuple[Term, ...]:
    """Nothing where they are made again."""
    return (kept_keys(at, (f"layers{what}", layers)),) if at.keeps_keys else ()


def _stored(at: Sizes, part: Term, *, rows: int) -> Term:
    """With fp8 a byte an element, and a scale for each of a token's `rows`."""
    if not at.offloads_fp8:
        return part
    _, tokens, (what, width), count = part.factors
    with_scales = (f"{what} with scales", width + FP8_SCALE_BYTES * rows)
    return term(part.what, ("bytes", 1.0), tokens, with_scales, count)


def sent(at: Sizes) -> tuple[Term, ...]:
    """What of it leaves the GPU."""
    return kept(at, " that leave the GPU", groups=at.sent_groups, layers=at.sent_layers)


def in_host_memory(at: Sizes) -> tuple[Term, ...]:
    groups, layers = at.sent_groups - len(at.disk_groups), at.sent_layers - at.disk_layers
    return kept(at, "", groups=groups, layers=layers) if groups else ()


def on_disk(at: Sizes) -> tuple[Term, ...]:
    return kept(at, " on disk", groups=len(at.disk_groups), layers=at.disk_layers) if at.disk_groups else ()


def _kept_on_gpu(at: Sizes) -> tuple[Term, ...]:
    """In chunks attention's outputs of the live layer wait as well: its chunks take them in turn."""
    others = [kept_inputs(at, ("the other groups", at.groups - 1))]
    if at.keeps_attention:
        live = 0 if at.chunks is None else 1
        others += kept_attention(at, ("the other layers" if not live else "layers", at.shape.num_layers - 1 + live))
    if at.keeps_keys:
        others.append(kept_keys(at, ("the other layers", at.shape.num_layers - 1)))
    everything = kept(at, "", groups=at.groups, layers=at.shape.num_layers)
    return (*_at(IN_LAYER, others), *_at(AFTER_LAYERS, everything))


def _resident(at: Sizes) -> tuple[Term, ...]:
    """The last groups, that stay, but for the live one; or what the next one needs, on its way back."""
    resident, size = at.resident_groups, at.layers_per_group
    held = kept(at, " that stay", groups=resident, layers=at.shape.num_layers - at.sent_layers) if resident else ()
    if at.groups == 1:
        return _at(AFTER_LAYERS, held)
    others = max(1, resident - 1)
    if at.chunks is not None:
        return (*_at(IN_LAYER, _beside_live_chunk(at, groups=others)), *_at(AFTER_LAYERS, held))
    beside = " beside the live one" if others < resident else " on their way back"
    return (*_at(IN_LAYER, kept(at, beside, groups=others, layers=others * size)), *_at(AFTER_LAYERS, held))


def _beside_live_chunk(at: Sizes, *, groups: int) -> tuple[Term, ...]:
    """Attention's outputs come back with their chunk, and the next one's are on their way; the next input is only once
    nothing else is before it."""
    resident = at.shape.num_layers - at.sent_layers
    count, tokens = (("layers that stay", resident), at.n) if resident else (("the next chunk", 1), at.c)
    terms = []
    if not at.hidden_on_host and (at.resident_groups > 1 or not at.keeps_attention or at.plan.num_chunks == 1):
        terms.append(kept_inputs(at, ("groups beside the live one", groups)))
    if at.keeps_attention:
        terms += kept_attention(at, count, tokens=tokens)
    if at.keeps_keys:
        terms.append(kept_keys(at, count, tokens=tokens))
    return tuple(terms)


def _live_group(at: Sizes) -> tuple[Term, ...]:
    """The layers of the live group that wait for their turn: attention's outputs are on its tape, or in the store."""
    feature, others = at.recipe.memory.activation_checkpoint, at.layers_per_group - 1
    if not others or feature is None or at.hidden_on_host:
        return ()
    live = [kept_inputs(at, ("the live group's other layers", others))]
    if not at.keeps_attention or (feature.offload is not None and at.chunks is None):
        live += kept_attention(at, ("the live group's other layers", others))
    return _at(IN_LAYER, live)


def _at(moments: tuple[str, ...], terms: Sequence[Term]) -> tuple[Term, ...]:
    return tuple(term(part.what, *part.factors, when=moments) for part in terms)


def _saved_by_norms(at: Sizes) -> tuple[Term, ...]:
    """Of a layer, both norms: what they compute in, the normalized hidden states, and the output.

    With tiles their inputs and outputs.
    """
    if at.recipe.memory.tiled_norm is not None:
        return (term("inputs and outputs of two norms", 4, ("bytes", at.d), at.c, at.h),)
    return (
        term("float32 copies of two norms", 2, ("bytes", WIDE), at.c, at.h),
        term("normalized and scaled, two norms", 4, ("bytes", at.d), at.c, at.h),
    )


def _saved_by_attention(at: Sizes) -> tuple[Term, ...]:
    """Of a layer: q, k, v, output and log-sum-exp of the kernel, and what surrounds it."""
    element = ("bytes", at.d)
    terms = [
        term("queries and output", 2, element, at.c, at.q),
        term("keys and values", 2, element, at.c, at.kv_held),
        term("log-sum-exp", ("bytes", WIDE), at.c, ("heads", at.shape.num_query_heads)),
    ]
    if at.plan.sp > 1:
        terms.append(term("output after the exchange", element, at.c, at.q))
    if at.shape.query_key_norm:
        both = ("(heads + KV heads) x head_dim", at.q[1] + at.kv[1])
        terms.append(term("norms of queries and keys", ("bytes", WIDE + at.d), at.c, both))
    return tuple(terms)


def _saved_by_mlp(at: Sizes) -> tuple[Term, ...]:
    """Of a layer: gate, activated gate, up and their product; nothing with tiles."""
    if at.tiles_mlp:
        return ()
    return (term("gate, activated gate, up, product", _mlp_parts(at), ("bytes", at.d), at.c, at.mlp_width),)


def _mlp_parts(at: Sizes) -> int:
    """Intermediates that a gated MLP saves; without a gate they are the input of the activation and its output."""
    return 4 if at.shape.mlp_matrices == 3 else 2


def live_layer(at: Sizes) -> Item:
    """The hidden states of the layer that is run again and goes backward, but for what its norms make of them."""
    element = ("bytes", at.d)
    if at.chunks is not None:
        return Item("live_layer", _live_chunk(at))
    terms = [
        term("gradient of the layer's output", element, at.n, at.h, when=IN_LAYER),
        term("gradient of the residual", element, at.n, at.h, when=(ATTENTION,)),
    ]
    if at.checkpointed:
        terms.append(term("input and output", 2, element, at.n, at.h, when=IN_LAYER))
    return Item("live_layer", tuple(terms))


def _live_chunk(at: Sizes) -> tuple[Term, ...]:
    """The whole input with the gradient that is written over that of the output, or two chunks of both; and what one
    chunk makes of them. Behind a stock norm the last layer's gradient takes memory of its own."""
    element, wholes = ("bytes", at.d), 2 if at.recipe.memory.tiled_norm is not None else 3
    whole = term("input and gradient", wholes, element, at.n, at.h, when=IN_LAYER)
    two = ("this chunk and the next", min(2, at.plan.num_chunks))
    streamed = term("input and gradient", 2, element, at.c, at.h, two, when=IN_LAYER)
    return (
        streamed if at.hidden_on_host else whole,
        term("output of a chunk", element, at.c, at.h, when=IN_LAYER),
        term("gradient of the residual", element, at.c, at.h, when=(ATTENTION,)),
    )


def sequence_chunks(at: Sizes) -> Item:
    """Keys and values of one layer's earlier chunks, the sums of their gradients, and those of its weights'."""
    if at.chunks is None:
        return Item("sequence_chunks", ())
    tokens = at.earlier
    if at.keys_on_host:
        tokens = ("tokens of two chunks", min(2 * at.plan.local_chunk_tokens, at.earlier[1]))
    weights = ("parameters of a layer", at.shape.layer_parameters)
    of_mlp = ("parameters of an MLP", at.shape.mlp_parameters)
    return Item(
        "sequence_chunks",
        (
            term("keys and values", 2, ("bytes", at.d), tokens, at.kv_held, when=IN_LAYER),
            term("float32 sums of their gradients", 2, ("bytes", WIDE), tokens, at.kv_held, when=IN_LAYER),
            term("float32 sums of weight gradients", ("bytes", WIDE), weights, when=IN_LAYER),
            term("a chunk's own", ("bytes", at.d), weights, when=(ATTENTION,)),
            term("a chunk's own, of the MLP", ("bytes", at.d), of_mlp, when=(NORM,) if at.tiles_mlp else (MLP, NORM)),
        ),
    )


def tiled_norm(at: Sizes) -> Item:
    """What the norms of the live layer, and the last one, hold: with tiles their inputs and outputs.

    A stock RMSNorm computes in float32; its backward makes five such copies of the hidden states.
    """
    return Item("tiled_norm", _stock_norms(at) if at.recipe.memory.tiled_norm is None else _tiled_norms(at))


def _stock_norms(at: Sizes) -> tuple[Term, ...]:
    element, wide = ("bytes", at.d), ("bytes", WIDE)
    last = at.behind_layers(at.plan.norm_tile_tokens)
    copies = 2 if at.d < WIDE or not at.checkpointed else 1  # in float32 the first norm's is the layer's input
    terms = [
        term("float32 copies of the layer's", copies, wide, at.c, at.h, when=(MLP, NORM)),
        term("normalized and scaled, first norm", 2, element, at.c, at.h, when=IN_LAYER),
        term("normalized and scaled, second norm", 2, element, at.c, at.h, when=(MLP,)),
        term("float32 temporaries of a norm's backward", 5, wide, at.c, at.h, when=(NORM,)),
        term("float32 temporaries of the last norm's", 5, wide, last, at.h, when=(FINAL_NORM,)),
        term("float32 copy of the last norm", wide, last, at.h, when=AFTER_LAYERS),
    ]
    if copies == 2:
        terms.append(term("float32 copy of the first norm", wide, at.c, at.h, when=(ATTENTION,)))
    return tuple(terms)


def _tiled_norms(at: Sizes) -> tuple[Term, ...]:
    element, wide, asked = ("bytes", at.d), ("bytes", WIDE), at.plan.norm_tile_tokens
    last = at.behind_layers(asked)
    tiles = [("tokens of a tile", min(asked, tokens)) for _, tokens in (at.c, last)]
    return (
        term("output of the first norm", element, at.c, at.h, when=IN_LAYER),
        term("input of the second norm", element, at.c, at.h, when=(MLP, NORM)),
        term("output of the second norm", element, at.c, at.h, when=(MLP,)),
        term("gradients of a norm's output and input", 2, element, at.c, at.h, when=(NORM,)),
        term("gradients of the last norm's output and input", 2, element, last, at.h, when=(FINAL_NORM,)),
        term("float32 temporaries of a tile", 7, wide, tiles[0], at.h, when=(NORM,)),
        term("float32 temporaries of a tile of the last", 7, wide, tiles[1], at.h, when=(FINAL_NORM,)),
        term("input of the last norm", element, last, at.h, when=AFTER_LAYERS),
    )


def attention(at: Sizes) -> Item:
    """What the live layer's attention saves, and the gradients and workspace of the kernel's backward."""
    saved = [
        term(part.what, *part.factors, when=(MLP, NORM) if "exchange" in part.what else IN_LAYER)
        for part in _saved_by_attention(at)
    ]
    return Item("attention", (*saved, *_kernel_backward(at)))


def _kernel_backward(at: Sizes) -> tuple[Term, ...]:
    """Gradients and workspace. flash-attn sums dq in float32; with grouped KV heads version 2 makes dk and dv for every
    query head first, versions 3 and 4 sum them in float32. Ours for the CPU works in float32 throughout."""
    element, wide, then = ("bytes", at.d), ("bytes", WIDE), (ATTENTION,)
    terms = [term("gradients of output and queries", 2, element, at.c, at.q, when=then)]
    if at.plan.num_chunks > 1:
        terms.append(term("dq of a block, and float32 sums", ("bytes", at.d + WIDE), at.c, at.q, when=then))
        terms.append(term("dk, dv of a block", 2, element, at.c, at.kv_held, when=then))
    if at.kernel == "cpu":
        terms.append(term("float32 q, dout, dq", 3, wide, at.c, at.q, when=then))
        if at.d < WIDE:
            terms.append(term("float32 dq, once more", wide, at.c, at.q, when=then))
            terms.append(term("float32 k, v, dk, dv", 4, wide, at.c, at.kv_held, when=then))
        else:
            terms.append(term("dk, dv", 2, wide, at.c, at.kv_held, when=then))
        return tuple(terms)
    terms.append(term("gradients of keys and values", 2, element, at.c, at.kv_held, when=then))
    terms.append(term("float32 sums of dq", wide, at.c, at.q, when=then))
    grouped = at.kv_heads < at.shape.num_query_heads
    if grouped and at.kernel == "flash_attention_2":
        terms.append(term("dk, dv of every query head", 2, element, at.c, at.q, when=then))
    elif grouped:
        terms.append(term("float32 sums of dk, dv", 2, wide, at.c, at.kv_held, when=then))
    return tuple(terms)


def tiled_mlp(at: Sizes) -> Item:
    """The MLP's intermediates in its backward: six of its width, of one tile or of the whole shard.

    With tiles also the float32 sums of its weights' gradients, a tile's own, and the gradient of the hidden states.
    """
    tokens = ("tokens of a tile", at.plan.mlp_tile_tokens)
    width = at.mlp_width
    inside = term("intermediates", _mlp_parts(at) + 2, ("bytes", at.d), tokens, width, when=(MLP,))
    if not at.tiles_mlp:
        return Item("tiled_mlp", (inside,))
    weights = ("parameters of an MLP", at.shape.mlp_parameters)
    return Item(
        "tiled_mlp",
        (
            inside,
            term("sums of weight gradients, and a tile's", ("bytes", WIDE + at.d), weights, when=(MLP,)),
            term("gradient of the hidden states", ("bytes", at.d), at.c, at.h, when=(MLP,)),
        ),
    )


def tiled_loss(at: Sizes) -> Item:
    """Logits and their gradient, of one tile or of the whole shard, and the gradients of hidden states and head."""
    element, wide, head = ("bytes", at.d), ("bytes", WIDE), ("head's parameters", at.shape.head_parameters)
    narrow = at.d if at.d < WIDE else 0.0
    tokens = at.behind_layers(at.plan.loss_tile_tokens)
    logits = term(
        "logits", ("bytes", WIDE + narrow), ("tokens of a tile", at.plan.loss_tile_tokens), at.vocab, when=(LOSS,)
    )
    return Item(
        "tiled_loss",
        (
            logits,
            term("hidden states and their gradient", 3, element, tokens, at.h, when=(LOSS,)),
            term("gradient of the head, summed, and a tile's", ("bytes", WIDE + at.d), head, when=(LOSS,)),
            term("hidden states and their gradient", 3, element, tokens, at.h, when=(LOSS_BACKWARD,)),
            term("gradient of the head, scaled", ("bytes", WIDE), head, when=(LOSS_BACKWARD,)),
            term("gradient of the head, summed, and as it leaves", wide[1] + at.d, head, when=(LOSS_BACKWARD,)),
        ),
    )


# Beside the tensors


def communication(at: Sizes) -> Item:
    """NCCL's own buffers."""
    if not at.on_gpu or at.plan.world_size == 1:
        return Item("communication", ())
    return Item("communication", (term("NCCL's channels", ("bytes", fitted.constants.communication_bytes)),))


def context(at: Sizes) -> Item:
    """What CUDA takes before the first tensor."""
    return Item("context", (term("CUDA's context", ("bytes", CONTEXT_BYTES)),) if at.on_gpu else ())


def allocator(at: Sizes, allocated: float) -> Item:
    """The reserve: a share of what torch allocates, for fragmentation and for what is not counted."""
    if not at.on_gpu:
        return Item("allocator", ())
    times = 1 if at.recipe.memory.allocator.expandable_segments else RESERVE_WITHOUT_SEGMENTS
    share = times * fitted.constants.allocator_reserve
    return Item("allocator", (term("lost between blocks or not counted", ("share", share), ("allocated", allocated)),))


ACTIVATIONS = (
    batch,
    activation_checkpoint,
    live_layer,
    sequence_chunks,
    tiled_norm,
    attention,
    tiled_mlp,
    tiled_loss,
)
STATES = (parameters, gradients, optimizer, zero_buffers)
OUTSIDE = (communication, context)
"""In the order of the table. A memory feature that is new gets a function above and a name here."""


@dataclass(frozen=True)
class GpuBytes:
    """What a rank holds at its peak."""

    items: tuple[Item, ...]
    moment: str
    """When the peak comes."""

    @cached_property
    def by_name(self) -> dict[str, int]:
        """Bytes at the peak; they add up to the total."""
        return {item.name: round(item.at(self.moment)) for item in self.items}

    @property
    def total(self) -> int:
        return sum(self.by_name.values())

    @property
    def allocated(self) -> int:
        """What torch counts: without what is beside its tensors."""
        return self.total - sum(self.by_name[name] for name in ("communication", "context", "allocator"))


def gpu_bytes(plan: "JobPlan") -> GpuBytes:
    """The items of a rank's GPU and the moment at which their sum is largest."""
    at = Sizes(plan)
    tensors = [item(at) for item in (*STATES, *ACTIVATIONS)]
    allocated = {moment: sum(item.at(moment) for item in tensors) for moment in MOMENTS}
    peak = max(MOMENTS, key=lambda moment: allocated[moment])
    beside = [*(item(at) for item in OUTSIDE), allocator(at, allocated[peak])]
    return GpuBytes((*tensors, *beside), peak)


def activation_bytes(plan: "JobPlan") -> int:
    """What forward and backward hold beside weights, gradients and states, at most."""
    return round(max(_activations(plan).values()))


def activation_moment(plan: "JobPlan") -> str:
    """When they hold it."""
    activations = _activations(plan)
    return max(activations, key=lambda moment: activations[moment])


def _activations(plan: "JobPlan") -> dict[str, float]:
    at = Sizes(plan)
    items = [item(at) for item in ACTIVATIONS]
    return {moment: sum(item.at(moment) for item in items) for moment in MOMENTS}
