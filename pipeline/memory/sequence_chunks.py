"""A decoder layer a chunk of the sequence at a time, through the stock layer's own forward.

FPDT (arXiv 2408.16978) without an implementation per architecture. Forward runs chunk after chunk: keys and values are
put where later chunks find them, attention looks back at them, everything else treats tokens one by one. Backward goes
once from the last chunk to the first. Before it keys and values are there again: rebuilt, by the stock layer stopped
as soon as its attention has them, or kept. Each layer is one autograd function whose inputs are hidden states and the
layer's parameters, and whose gradients are summed over chunks in float32: autograd and ZeRO's hooks see each once.

What a group of layers needs to run again waits in the store, as without chunks (activation_checkpoint.py).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any

import torch
from torch import nn

from pipeline.attention.chunks import ChunkAttention, ChunkedSample, KeysAndValues, KeysAreThereError
from pipeline.attention.function import AttentionContext
from pipeline.attention.tape import AttentionTape
from pipeline.errors import RecipeError, RunError
from pipeline.memory.hidden_states import OnDevice, same_memory
from pipeline.memory.layer_call import CHANGED_BETWEEN_LAYERS, refuse_gradients_of_others, same_values
from pipeline.memory.offload import Store
from pipeline.memory.tiled_module import add_in_float32, as_gradients
from pipeline.model.anatomy import decoder_layers

QUERY_PROJECTIONS = ("q_proj", "q_a_proj", "q_b_proj")
"""What makes queries alone: left out where a layer runs for its keys and values."""


@dataclass(frozen=True)
class Waiting:
    """Where things wait, and what."""

    states: OnDevice
    """Whole hidden states between layers"""
    blocks: KeysAndValues
    """Keys and values of the layer that runs"""
    inputs: Store
    """What groups of layers start from"""
    outputs: Store
    """Attention's outputs, from forward to backward; keys and values, too"""
    live_outputs: Store
    """Attention's outputs of the group that runs again in backward"""
    keep_attention: bool = False
    keep_keys_values: bool = False


def attach(model: nn.Module, waiting: Waiting, *, layers_per_group: int = 1) -> None:
    """Run every decoder layer in the chunks that the call's layout says.

    Raises RecipeError for a model whose loss looks at router logits, which chunks would give no gradient.
    """
    if getattr(model.config, "output_router_logits", False):
        raise RecipeError(
            "model.config.output_router_logits = True: must be false, chunks give recorded router logits no gradient; "
            "set model.config.output_router_logits=false"
        )

    def begin(*_: Any) -> None:
        waiting.states.begin()
        waiting.blocks.begin()

    model.register_forward_pre_hook(begin)
    layers = decoder_layers(model)
    for first in range(0, len(layers), layers_per_group):
        group = _Group([_ChunkedLayer(layer, waiting) for layer in layers[first : first + layers_per_group]])
        for chunked in group.layers:
            chunked.group = group
            setattr(chunked.layer, "forward", MethodType(chunked.forward, chunked.layer))  # noqa: B010


@dataclass(frozen=True)
class _Call:
    """A layer's call in one micro-batch, all but its hidden states."""

    others: tuple[Any, ...]
    keywords: dict[str, Any]
    sample: ChunkedSample

    @property
    def context(self) -> AttentionContext:
        context: AttentionContext = self.keywords["attention_context"]
        return context

    @property
    def rows(self) -> tuple[slice, ...]:
        """Of each chunk, among the rank's tokens."""
        return self.sample.layout.local

    @property
    def device(self) -> torch.device:
        """That computes."""
        return self.context.segments.cu_seqlens.device

    def of_chunk(self, chunk: int, attention: ChunkAttention, tape: AttentionTape | None) -> tuple[Any, Any]:
        """(others, keywords) for one chunk: every tensor with a place for each token is cut."""
        context = replace(self.context, chunk=attention, tape=tape)
        cut = _Cut(self.rows[chunk], self.sample.layout.local_seq_len, self.device)
        return cut(self.others), cut(self.keywords) | {"attention_context": context}


@dataclass(frozen=True)
class _Cut:
    """The part of whatever has a dim as long as the rank's tokens, from its second dim on."""

    rows: slice
    tokens: int
    device: torch.device

    def __call__(self, value: Any) -> Any:
        match value:
            case torch.Tensor():
                dim = next((d for d in range(1, value.dim()) if value.shape[d] == self.tokens), None)
                if dim is None:
                    return value
                part = value.narrow(dim, self.rows.start, self.rows.stop - self.rows.start)
                return part.to(self.device, non_blocking=True)
            case tuple() | list():
                return type(value)(self(item) for item in value)
            case dict():
                return {name: self(item) for name, item in value.items()}
            case _:
                return value


class _Kept:
    """Attention's outputs of a layer, chunk by chunk, in a store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._handles: dict[int, tuple[Any, Any]] = {}

    def take(self, chunk: int) -> AttentionTape:
        """A tape with what was kept of the chunk, which leaves the store."""
        out, lse = self._handles.pop(chunk)
        return AttentionTape([(self._store.get(out), self._store.get(lse))])

    def look(self, chunk: int) -> AttentionTape:
        """A tape with what was kept of the chunk, which stays there; the next chunk's is on its way. Empty if nothing
        was."""
        if chunk not in self._handles:
            return AttentionTape()
        out, lse = (self._store.look(handle) for handle in self._handles[chunk])
        for handle in self._handles.get(chunk + 1, ()):
            self._store.start(handle)
        return AttentionTape([(out, lse)])

    def keep(self, chunk: int, tape: AttentionTape) -> None:
        """What the kernel gave, unless it is there already."""
        if chunk not in self._handles:
            ((out, lse),) = tape.outputs
            self._handles[chunk] = self._store.put(out), self._store.put(lse, exact=True)


@dataclass(eq=False)
class _Pass:
    """A group's layers in one micro-batch, from forward to backward."""

    calls: list[_Call] = field(default_factory=list)
    kept: list[_Kept | None] = field(default_factory=list)
    """By layer; of those that run again all, once they have."""
    input: torch.Tensor | None = None
    """Of the first layer, until it is in the store"""
    output: torch.Tensor | None = None
    """Of the layer that ran last; the next one writes over it."""
    handle: Any = None
    """Of the input, in the store"""
    inputs: list[torch.Tensor] = field(default_factory=list)
    """Of all layers, once the group has run again"""


class _Group:
    """Layers that share one checkpoint."""

    def __init__(self, layers: "list[_ChunkedLayer]") -> None:
        self.layers = layers
        self.under_way = _Pass()


class _ChunkedLayer:
    """A decoder layer and how it runs in chunks."""

    group: _Group

    def __init__(self, layer: Any, waiting: Waiting) -> None:
        self.layer, self.waiting = layer, waiting
        self._stock = type(layer).forward
        self.runs_again_on: _Kept | None = None
        """While its group runs again in backward: where attention's outputs are, or go."""

    def forward(self, layer: Any, hidden_states: torch.Tensor, *others: Any, **keywords: Any) -> torch.Tensor:
        """What a call of the layer runs, inside its hooks."""
        context = keywords.get("attention_context")
        if context is None:
            raise RunError(f"{type(layer).__name__} lost attention_context on its way; this model is not supported")
        call = _Call(others, keywords, context.in_chunks)
        if not torch.is_grad_enabled():
            out = self.empty_output(call, hidden_states)
            self.run(call, hidden_states, out, self.runs_again_on)
            return out
        refuse_gradients_of_others(keywords, others)
        if not hidden_states.requires_grad:
            raise RunError("a layer's input needs no gradient (frozen embeddings?): its parameters would get none")
        if self is self.group.layers[0]:
            self.group.under_way = _Pass()
        self.waiting.states.entered(hidden_states)
        chunked: torch.Tensor = _ChunkedLayerFunction.apply(
            self, self.group.under_way, call, hidden_states, *layer.parameters()
        )
        return chunked

    def empty_output(self, call: _Call, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.waiting.states.empty(hidden_states.shape, hidden_states.dtype, call.device)

    @torch.no_grad()
    def run(
        self,
        call: _Call,
        hidden_states: torch.Tensor,
        out: torch.Tensor,
        kept: _Kept | None,
        after_chunk: Callable[[int], None] = lambda chunk: None,
    ) -> None:
        """The layer's output, chunk by chunk, into `out`, which may be the input's own memory."""
        states, blocks = self.waiting.states, self.waiting.blocks
        for chunk, x in self._chunks(call, hidden_states):
            attention = ChunkAttention(call.sample, chunk, blocks)
            tape = None if kept is None else kept.look(chunk)
            states.write(out, call.rows[chunk], self._chunk(call, x, attention, tape))
            if kept is not None and tape is not None:
                kept.keep(chunk, tape)
            after_chunk(chunk)
            for seen in range(call.sample.first_seen(chunk + 1, attention.window)):
                blocks.drop(seen)
        states.settle()

    def _chunks(
        self, call: _Call, *wholes: torch.Tensor, order: Sequence[int] | None = None
    ) -> Iterator[tuple[Any, ...]]:
        """(chunk, its part of each, on the device), of all chunks or of those in `order`; the next is on its way."""
        states = self.waiting.states
        order = range(len(call.rows)) if order is None else order
        for number, chunk in enumerate(order):
            parts = [states.read(whole, call.rows[chunk], call.device) for whole in wholes]
            for following in order[number + 1 : number + 2]:
                for whole in wholes:
                    states.start(whole, call.rows[following], call.device)
            yield chunk, *parts

    def _chunk(
        self, call: _Call, x: torch.Tensor, attention: ChunkAttention, tape: AttentionTape | None
    ) -> torch.Tensor:
        """The stock layer's own forward on one chunk."""
        others, keywords = call.of_chunk(attention.chunk, attention, tape)
        out = self._stock(self.layer, x, *others, **keywords)
        if attention.calls != 1 or not isinstance(out, torch.Tensor) or out.shape != x.shape:
            raise RunError(
                f"{type(self.layer).__name__} cannot run in chunks: it asked for attention {attention.calls} times, "
                f"must be once, and returned {type(out).__name__}; set memory.sequence_chunks: null"
            )
        return out

    @torch.no_grad()
    def rebuild_keys(self, call: _Call, hidden_states: torch.Tensor) -> None:
        """Keys and values of all chunks but the last, whose own run makes them."""
        with _without_queries(self.layer):
            for chunk, x in self._chunks(call, hidden_states, order=range(len(call.rows) - 1)):
                with suppress(KeysAreThereError):
                    self._chunk(call, x, ChunkAttention(call.sample, chunk, self.waiting.blocks, only_keys=True), None)

    def backward(
        self,
        call: _Call,
        hidden_states: torch.Tensor,
        grad: torch.Tensor,
        dhidden: torch.Tensor,
        kept: _Kept | None,
    ) -> list[torch.Tensor | None]:
        """From the last chunk to the first: writes the gradient of hidden states, which may lie where `grad` does, and
        returns the sums of the trained parameters' gradients."""
        states, blocks = self.waiting.states, self.waiting.blocks
        trained = [parameter for parameter in self.layer.parameters() if parameter.requires_grad]
        sums: list[torch.Tensor | None] = [None] * len(trained)
        for chunk, x, dy in self._chunks(call, hidden_states, grad, order=range(len(call.rows))[::-1]):
            x = x.detach().requires_grad_()
            tape = None if kept is None else kept.take(chunk)
            if tape is not None:
                tape.rewind(for_last_run=True)
            with torch.enable_grad():
                y = self._chunk(call, x, ChunkAttention(call.sample, chunk, blocks, keeps_block=False), tape)
            dx, *of_parameters = torch.autograd.grad(y, (x, *trained), dy, allow_unused=True)
            del y
            blocks.drop(chunk)
            states.write(dhidden, call.rows[chunk], dx)
            sums = [add_in_float32(total, one) for total, one in zip(sums, of_parameters, strict=True)]
            del dx, of_parameters  # else they would be there while the next chunk's are made
        states.settle()
        return sums


class _ChunkedLayerFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        chunked: _ChunkedLayer,
        under_way: _Pass,
        call: _Call,
        hidden_states: torch.Tensor,
        *parameters: nn.Parameter,
    ) -> torch.Tensor:
        waiting = chunked.waiting
        ctx.chunked, ctx.under_way, ctx.call, ctx.parameters = chunked, under_way, call, parameters
        kept = _Kept(waiting.outputs) if waiting.keep_attention else None
        out = _output_in_group(chunked, under_way, call, hidden_states)
        under_way.calls.append(call)
        under_way.kept.append(kept)
        ctx.keys_values = []

        def keep_keys_values(chunk: int) -> None:
            if waiting.keep_keys_values:
                ctx.keys_values.append([waiting.outputs.put(x, exact=True) for x in waiting.blocks.get(chunk)])

        chunked.run(call, hidden_states, out, kept, keep_keys_values)
        under_way.output = out
        if chunked is chunked.group.layers[-1]:
            assert under_way.input is not None
            under_way.handle = waiting.inputs.put(under_way.input)
            under_way.input = under_way.output = None
        ctx.link = waiting.states.made(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        chunked: _ChunkedLayer = ctx.chunked
        waiting, link, grad = chunked.waiting, ctx.link, grads[0]
        layers, states = chunked.group.layers, waiting.states
        if chunked is layers[-1]:  # the first to come
            _run_again(layers, ctx.under_way)
        hidden_states, kept = ctx.under_way.inputs.pop(), ctx.under_way.kept.pop()
        dhidden = grad if link.is_direct else states.empty(hidden_states.shape, grad.dtype, grad.device)
        for chunk in reversed(range(len(ctx.keys_values))):
            k, v = (waiting.outputs.get(handle) for handle in ctx.keys_values[chunk])
            waiting.blocks.put(chunk, (k, v))
        if not ctx.keys_values:
            chunked.rebuild_keys(ctx.call, hidden_states)
        sums = chunked.backward(ctx.call, hidden_states, grad, dhidden, kept)
        return None, None, None, dhidden, *as_gradients(ctx.parameters, sums)


def _output_in_group(
    chunked: _ChunkedLayer, under_way: _Pass, call: _Call, hidden_states: torch.Tensor
) -> torch.Tensor:
    """Memory for a layer's output: behind the first of a group that of its input, which nobody needs any more."""
    if chunked is chunked.group.layers[0]:
        under_way.input = hidden_states
        return chunked.empty_output(call, hidden_states)
    if under_way.output is None or not same_values(hidden_states, under_way.output):
        raise RunError(CHANGED_BETWEEN_LAYERS)
    return same_memory(hidden_states)


def _run_again(layers: Sequence[_ChunkedLayer], under_way: _Pass) -> None:
    """The inputs of a group's layers, out of the first one's; attention's outputs are kept on the way.

    Through the layers' own calls: ZeRO-3's hooks gather their parameters.
    """
    waiting = layers[0].waiting
    under_way.inputs = [waiting.inputs.get(under_way.handle)]
    under_way.handle = None
    with torch.no_grad():
        for number, (chunked, call) in enumerate(zip(layers[:-1], under_way.calls, strict=False)):
            kept = under_way.kept[number] or _Kept(waiting.live_outputs)
            under_way.kept[number] = chunked.runs_again_on = kept
            try:
                under_way.inputs.append(chunked.layer(under_way.inputs[-1], *call.others, **call.keywords))
            finally:
                chunked.runs_again_on = None


@contextmanager
def _without_queries(layer: nn.Module) -> Iterator[None]:
    """The layer's queries are zeros: nobody will look at them, and their projection is a tenth of the layer."""
    projections = [
        module
        for name, module in layer.named_modules()
        if name.rpartition(".")[2] in QUERY_PROJECTIONS and isinstance(module, nn.Linear)
    ]

    def zeros(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)

    for module in projections:
        setattr(module, "forward", MethodType(zeros, module))  # noqa: B010
    try:
        yield
    finally:
        for module in projections:
            delattr(module, "forward")
