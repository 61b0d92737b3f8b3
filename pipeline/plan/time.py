"""Seconds of a step, item by item, and what the hardware really computes in it.

Counted like the bytes: what runs, times what it costs, over the part of the vendor's rate that it gets. Items add up:
what runs beside something else is counted with the part that is not hidden, under its own name.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.plan import fitted
from pipeline.plan.documents import DocumentMix
from pipeline.plan.flops import attention_flops
from pipeline.plan.hardware import Efficiency, efficiency_of
from pipeline.plan.host_memory import checkpoint_bytes
from pipeline.plan.memory import WIDE, Sizes, on_disk, sent
from pipeline.plan.terms import Factor, Item, Term, term

if TYPE_CHECKING:
    from pipeline.plan.job import JobPlan

ELEMENTWISE_FORWARD = 150.0
ELEMENTWISE_BACKWARD = 300.0
"""Bytes moved per hidden element of a token and layer by norms, rotary embedding, activation and residuals, in
bfloat16: counted over the operations of a stock Llama layer."""

AROUND_LAYERS = 11
"""Copies of hidden states in host memory that are no layer's: the embedding writes them, and reads their gradient; the
last norm reads and writes, in backward reads two and writes; the loss reads, and writes and scales a gradient."""

PROCESS_START_SECONDS = 120.0
"""Of a job before it reads weights: containers, imports, groups of ranks, the self-check. An assumption."""


@dataclass(frozen=True)
class Work:
    """A plan, the documents it is planned for, and the part of the hardware's rates that it gets."""

    at: Sizes
    documents: DocumentMix
    efficiency: Efficiency

    @property
    def plan(self) -> "JobPlan":
        return self.at.plan

    @property
    def runs(self) -> float:
        """How often a layer runs forward, on average: in groups all but the last one of each once more."""
        if not self.at.checkpointed:
            return 1
        return 3 - self.at.groups / self.at.shape.num_layers

    @property
    def attention_runs(self) -> int:
        """How often attention's kernel runs forward: never a third time, and once if its output is kept."""
        return 2 if self.at.checkpointed and not self.at.keeps_attention else 1

    @property
    def rebuilt_keys(self) -> float:
        """How often keys and values are made once more for backward: those of the last chunk come with its own run."""
        at = self.at
        if at.chunks is None or at.keeps_keys:
            return 0.0
        return (self.plan.num_chunks - 1) / self.plan.num_chunks

    @property
    def micro_batches(self) -> Factor:
        return ("micro-batches", self.plan.recipe.train.grad_accumulation)

    def flops_rate(self, share: float) -> tuple[Factor, ...]:
        return (("FLOP/s", self.at.hardware.peak_flops or 0.0), ("share reached", share))

    def link(self, rate: float) -> tuple[Factor, ...]:
        return (("bytes/s", rate), ("share reached", self.efficiency.links))


def attention(work: Work) -> Item:
    """Forward as often as a layer runs, and a backward of 2.5 times the FLOPs."""
    documents, shape = work.documents, work.at.shape
    flops = attention_flops(shape, sum_len_squared=documents.sum_len_squared, sum_windowed=documents.sum_windowed)
    one = (("FLOPs of a rank's forward", flops / work.plan.sp), work.micro_batches)
    forward, backward = work.efficiency.attention_forward, work.efficiency.attention_backward
    return Item(
        "attention",
        (
            term("forward", ("runs", work.attention_runs), *one, over=work.flops_rate(forward)),
            term("backward", 2.5, *one, over=work.flops_rate(backward)),
        ),
    )


def matmuls(work: Work) -> Item:
    """Projections, MLP and head: 2 FLOPs a parameter and token forward, 4 backward; what is recomputed counts."""
    shape = work.at.shape
    projections = shape.num_layers * shape.attention_parameters
    mlps = shape.matmul_parameters - shape.head_parameters - projections
    keys = shape.num_layers * 2 * shape.hidden_size * shape.num_kv_heads * shape.head_dim
    parts = (
        ("attention's projections", 2 * work.runs + 4, projections),
        ("MLPs", 2 * (work.runs + work.at.tiles_mlp) + 4, mlps),
        ("head", 2 * 1 + 4, shape.head_parameters),
        ("keys and values made again", 2 * work.rebuilt_keys, keys),
    )
    rate = work.flops_rate(work.efficiency.matmul)
    return Item(
        "matmuls",
        tuple(
            term(what, ("FLOPs each", flops), ("parameters", count), work.at.n, work.micro_batches, over=rate)
            for what, flops, count in parts
            if flops
        ),
    )


def elementwise(work: Work) -> Item:
    """Norms and all that moves bytes rather than computes."""
    at = work.at
    moved = ("bytes", work.runs * ELEMENTWISE_FORWARD + ELEMENTWISE_BACKWARD)
    rate = (("bytes/s", at.hardware.memory_rate), ("share reached", work.efficiency.memory))
    layers = term("of all layers", moved, at.n, at.h, at.layers, work.micro_batches, over=rate)
    return Item("elementwise", (layers,))


def exchange(work: Work) -> Item:
    """The all-to-alls around attention; over the fabric what leaves the node, where the group is larger than one."""
    at, sp = work.at, work.plan.sp
    if sp == 1:
        return Item("exchange", ())
    per_node = at.recipe.hardware.gpus_per_node
    rate, there = (at.hardware.gpu_link_rate, 1) if sp <= per_node else (at.hardware.fabric_rate, per_node)
    parts = (
        ("queries, keys, values, output", work.runs + 1, 2 * at.shape.num_query_heads + 2 * at.kv_heads),
        ("keys and values made again", work.rebuilt_keys, 2 * at.kv_heads),
    )
    return Item(
        "exchange",
        tuple(
            term(
                what + (" between nodes" if there > 1 else ""),
                ("passes", passes),
                ("bytes", at.d),
                at.n,
                ("head_dim", at.shape.head_dim),
                ("heads", heads),
                at.layers,
                ("share that leaves", (sp - there) / sp),
                work.micro_batches,
                over=work.link(rate),
            )
            for what, passes, heads in parts
            if passes
        ),
    )


def zero_traffic(work: Work, compute_seconds: float) -> Item:
    """Weights gathered and gradients reduced; hidden behind the computation as far as that lasts."""
    at, zero, world = work.at, work.at.recipe.zero, work.plan.world_size
    if world == 1:
        return Item("zero_traffic", ())
    passes = 3 * work.micro_batches[1] if zero.stage == 3 else 2
    within, per_node = at.hardware.gpu_link_rate, at.recipe.hardware.gpus_per_node
    rate = within if work.plan.nodes == 1 else min(within, per_node * at.hardware.fabric_rate)
    moved = term("weights and gradients", ("passes", passes), ("bytes", at.d), at.parameters, over=work.link(rate))
    hidden = term("hidden behind the computation", -1, ("seconds", min(moved.value, compute_seconds)))
    return Item("zero_traffic", (moved, hidden))


def offload(work: Work, compute_seconds: float) -> Item:
    """Copies to and from host memory. Those of layers run beside the computation, ZeRO's in order with it."""
    at = work.at
    rate = work.link(at.hardware.host_link_rate)
    part: tuple[Factor, ...] = (("bytes", at.d), at.parameters, work.micro_batches)
    terms: list[Term] = []
    copied = (*_there_and_back(sent(at) if at.sent_groups else ()), *hidden_states(work), *keys_values(work))
    terms += _beside(work, copied, rate, compute_seconds)
    if at.disk_groups:
        disk = (("bytes/s of a node's disk", at.hardware.scratch_rate),)
        terms += _beside(work, _there_and_back(on_disk(at), at.ranks_of_node), disk, compute_seconds)
    if at.parameters_offloaded:
        terms.append(term("weights, for both passes", 2, *part, over=(at.ranks, *rate)))
    if at.optimizer_offloaded:
        terms.append(term("gradients, and the new weights", 2, *part, over=(at.ranks, *rate)))
    return Item("offload", tuple(terms))


def hidden_states(work: Work) -> tuple[Term, ...]:
    """Those in host memory: read in each run of a layer, written but in the last, read for keys and values; their
    gradients are read and written."""
    at = work.at
    if not at.hidden_on_host:
        return ()
    whole = (("bytes", at.d), at.n, at.h)
    runs = work.runs + work.rebuilt_keys
    rotary = (("bytes", at.d), at.n, ("head_dim", at.shape.head_dim), at.layers)
    return (
        term("hidden states of layers", ("copies", runs + work.runs - 1 + 2), *whole, at.layers),
        term("hidden states around the layers", ("copies", AROUND_LAYERS), *whole),
        term("cosines and sines", 2, ("copies", runs), *rotary),
    )


def keys_values(work: Work) -> tuple[Term, ...]:
    """Those in host memory: written once they are made, and fetched by each later chunk of the document whenever the
    kernel is asked; the sums of their gradients are fetched and sent back by each."""
    at, plan = work.at, work.plan
    if not at.keys_on_host:
        return ()
    windowed = at.shape.num_window_layers
    full = at.shape.num_layers - windowed
    pairs = full * work.documents.sum_len_squared + windowed * work.documents.sum_windowed
    earlier = (plan.num_chunks - 1) / plan.num_chunks
    fetched = (
        ("keys that chunks fetch, in all layers", earlier * pairs / (2 * plan.chunk_tokens)),
        ("KV heads held x head_dim", at.kv_held[1] / plan.sp),
    )
    own = (at.n, at.kv_held, at.layers)
    return (
        term("keys and values, for later chunks", 2, ("times", work.attention_runs + 1), ("bytes", at.d), *fetched),
        term("sums of their gradients, there and back", 2, 2, ("bytes", WIDE), *fetched),
        term("keys and values, written", 2, ("times", 1 + earlier), ("bytes", at.d), *own),
        term("sums of their gradients, for the last time", 2, ("bytes", WIDE), *own),
    )


def _there_and_back(parts: tuple[Term, ...], *factors: Factor) -> tuple[Term, ...]:
    return tuple(term(f"{part.what}, there and back", 2, *part.factors, *factors) for part in parts)


def _beside(work: Work, copied: tuple[Term, ...], over: tuple[Factor, ...], compute_seconds: float) -> list[Term]:
    """Copies, of a micro-batch, less what hides behind the computation."""
    all_copies = [term(part.what, *part.factors, work.micro_batches, over=(*part.over, *over)) for part in copied]
    if not all_copies:
        return []
    hidden = min(sum(part.value for part in all_copies), compute_seconds)
    return [*all_copies, term("hidden behind the computation", -1, ("seconds", hidden))]


def update(work: Work) -> Item:
    """The optimizer's pass over its states: read and written once, with gradients and weights."""
    at = work.at
    moments = 0 if at.recipe.optimizer.name == "sgd" else 2
    touched = ("bytes", at.state * (2 * (1 + moments) + 1) + at.d)
    over = at.partition(from_stage=1)
    if at.optimizer_offloaded:
        here = (touched, at.parameters, at.ranks_of_node)
        rate = ("bytes/s", fitted.constants.host_update_rate)
        return Item("update", (term("on the host", *here, over=(*over, rate)),))
    reached = (("bytes/s", at.hardware.memory_rate), ("share reached", work.efficiency.memory))
    return Item("update", (term("on the GPU", touched, at.parameters, over=(*over, *reached)),))


@dataclass(frozen=True)
class StepSeconds:
    """A step, and what it computes."""

    items: tuple[Item, ...]
    hardware_flops: float
    """Of the whole job, with what is recomputed."""

    @property
    def by_name(self) -> dict[str, float]:
        return {item.name: item.total for item in self.items}

    @property
    def total(self) -> float:
        return sum(self.by_name.values())


def step_seconds(plan: "JobPlan", documents: DocumentMix) -> StepSeconds | None:
    """None where no peak is known: on a CPU."""
    at = Sizes(plan)
    if at.hardware.peak_flops is None:
        return None
    work = Work(at, documents, efficiency_of(plan.recipe.model, plan.recipe.hardware.gpu))
    computed = [attention(work), matmuls(work), elementwise(work)]
    compute_seconds = sum(item.total for item in computed)
    traffic, copies = zero_traffic(work, compute_seconds), offload(work, compute_seconds)
    items = (*computed, exchange(work), traffic, copies, update(work))
    return StepSeconds(items, plan.world_size * sum(_flops(item) for item in computed[:2]))


def _flops(item: Item) -> float:
    """Of a rank: a term's numerator, where the denominator is a rate of FLOPs."""
    return sum(term(part.what, *part.factors).value for part in item.terms)


def start_seconds(plan: "JobPlan") -> float:
    """Before the first step; the weights are read once, and handed on."""
    at = Sizes(plan)
    return PROCESS_START_SECONDS + at.d * at.shape.total_parameters / at.hardware.disk_rate


def checkpoint_seconds(plan: "JobPlan") -> float:
    """Of writing one checkpoint, by all nodes together."""
    at = Sizes(plan)
    return checkpoint_bytes(at).value / (plan.nodes * at.hardware.disk_rate)
