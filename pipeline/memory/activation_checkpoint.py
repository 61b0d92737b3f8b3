"""Keep the input of every k-th layer only, in a store that may be host memory, and run the layers again in backward.

Through transformers' own seam for every decoder layer, inside the layer's hooks: ZeRO-3's on the layer see one forward,
those on its children see each (ALST §3.3; Chen et al., arXiv 1604.06174). What a group of k
layers needs to run again waits in the store from its forward to its backward:

    layers_per_group = 1   each layer's input; backward runs the layer forward once more
    layers_per_group = k   the first layer's input: 1/k of the bytes; backward first runs the group forward once more,
                           and keeps the inputs of its layers on the device for as long as the group is live
    keep_attention         also attention's out and lse: the kernel is not asked again, whatever runs again

In a group the kernel is asked no more than twice either: what it gives in the first of the two runs of backward is on
the tape in the second.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from pipeline.attention.tape import AttentionTape
from pipeline.errors import RunError
from pipeline.memory.layer_call import CHANGED_BETWEEN_LAYERS, refuse_gradients_of_others, same_values
from pipeline.memory.offload import Store
from pipeline.model.anatomy import decoder_layers


def attach(model: nn.Module, *, store: Store, keep_attention: bool = False, layers_per_group: int = 1) -> None:
    """Checkpoint every decoder layer, in groups; what they need to run again waits in `store`."""
    layers = decoder_layers(model)
    for first in range(0, len(layers), layers_per_group):
        members = layers[first : first + layers_per_group]
        group = _Group(len(members), store, keep_attention)
        for layer in members:
            layer._gradient_checkpointing_func = partial(_checkpoint, group, layer is members[0])
            layer.gradient_checkpointing = True


@dataclass
class _Call:
    """A layer's call in one micro-batch, all but its hidden states; it may run more than once."""

    layer: Callable[..., Any]
    others: tuple[Any, ...]

    def run(
        self, hidden_states: torch.Tensor, tape: AttentionTape | None = None, *, is_last: bool = False
    ) -> torch.Tensor:
        """The layer's output; its attention is played from the tape, or recorded on it for runs to come."""
        layer = self.layer
        context = getattr(layer, "keywords", {}).get("attention_context")
        if tape is not None and context is not None:
            tape.rewind(for_last_run=is_last)
            layer = partial(layer, attention_context=replace(context, tape=tape))
        return _tensor(layer(hidden_states, *self.others))


@dataclass
class _Group:
    """Layers that share one checkpoint. All but the last one only note their call and pass on their input."""

    size: int
    store: Store
    keep_attention: bool
    calls: list[_Call] = field(default_factory=list)
    input: torch.Tensor | None = None


def _checkpoint(
    group: _Group, is_first: bool, layer: Callable[..., Any], hidden_states: torch.Tensor, *others: Any
) -> torch.Tensor:
    """`layer(hidden_states, *others)`, which keeps no activation; inside a group, when its last layer is called."""
    call = _Call(layer, others)
    if not torch.is_grad_enabled():
        return call.run(hidden_states)
    refuse_gradients_of_others(getattr(layer, "keywords", {}), others)
    if not hidden_states.requires_grad:
        raise RunError("a layer's input needs no gradient (frozen embeddings?): its parameters would get none either")
    if is_first:
        group.calls, group.input = [], hidden_states
    elif group.input is None or not same_values(hidden_states, group.input):
        raise RunError(CHANGED_BETWEEN_LAYERS)
    group.calls.append(call)
    if len(group.calls) < group.size:
        return hidden_states
    calls, group.calls, group.input = group.calls, [], None
    out: torch.Tensor = _Checkpoint.apply(calls, group.store, group.keep_attention, hidden_states)
    return out


class _Checkpoint(torch.autograd.Function):
    """The layers run again inside a backward of their own, so that ZeRO-3's hooks gather their parameters for each
    forward and for the backward as they do without checkpointing."""

    @staticmethod
    def forward(
        ctx: Any, calls: list[_Call], store: Store, keep_attention: bool, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        ctx.calls, ctx.store = calls, store
        ctx.input = store.put(hidden_states)
        ctx.kept = []
        for call in calls:
            tape = AttentionTape() if keep_attention else None
            hidden_states = call.run(hidden_states, tape)
            ctx.kept.append([(store.put(out), store.put(lse, exact=True)) for out, lse in tape.outputs] if tape else [])
        return hidden_states

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None, None, torch.Tensor | None]:
        calls: list[_Call] = ctx.calls
        kept: list[list[tuple[Any, Any]]] = ctx.kept
        tapes = [AttentionTape([(ctx.store.get(out), ctx.store.get(lse)) for out, lse in pairs]) for pairs in kept]
        inputs = _inputs(calls, tapes, first=ctx.store.get(ctx.input))
        ctx.input = ctx.kept = None
        grad: torch.Tensor | None = grads[0]
        for call in reversed(calls):
            hidden_states = inputs.pop().requires_grad_()
            with torch.enable_grad():
                out = call.run(hidden_states, tapes.pop(), is_last=True)
            torch.autograd.backward(out, grad)
            grad = hidden_states.grad
        return None, None, None, grad


def _inputs(calls: list[_Call], tapes: list[AttentionTape], *, first: torch.Tensor) -> list[torch.Tensor]:
    """The input of every layer, out of the first one's; attention's outputs are on the tapes then."""
    inputs = [first]
    with torch.no_grad():
        for call, tape in zip(calls[:-1], tapes, strict=False):
            inputs.append(call.run(inputs[-1], tape))
    return inputs


def _tensor(out: Any) -> torch.Tensor:
    """A decoder layer's output. Raises RunError if it is not one tensor."""
    if not isinstance(out, torch.Tensor):
        raise RunError(f"a decoder layer returned {type(out).__name__}, not a tensor; this model is not supported")
    return out
