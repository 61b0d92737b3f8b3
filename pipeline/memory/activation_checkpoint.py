"""Keep each layer's input only, in a store that may be host memory, and run the layer again in backward.

Through transformers' own seam for every decoder layer (ALST §3.3; Chen et al., arXiv 1604.06174).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from pipeline.errors import RunError
from pipeline.memory.offload import DeviceStore, Handle, HostStore
from pipeline.model.anatomy import decoder_layers

Store = HostStore | DeviceStore


def attach(model: nn.Module, *, store: Store) -> None:
    """Checkpoint every decoder layer; its input waits in `store`."""
    for layer in decoder_layers(model):
        layer._gradient_checkpointing_func = partial(_checkpoint, store)
        layer.gradient_checkpointing = True


def _checkpoint(store: Store, layer: Callable[..., Any], hidden_states: torch.Tensor, *others: Any) -> torch.Tensor:
    """`layer(hidden_states, *others)`, which keeps nothing but `hidden_states`, in the store."""
    keywords = getattr(layer, "keywords", {})
    for name, value in (*enumerate(others), *keywords.items()):
        if isinstance(value, torch.Tensor) and value.requires_grad:
            raise RunError(f"the layer's argument {name} needs a gradient of its own; this model is not supported")
    if not torch.is_grad_enabled():
        return _tensor(layer(hidden_states, *others))
    if not hidden_states.requires_grad:
        raise RunError("a layer's input needs no gradient (frozen embeddings?): its parameters would get none either")
    out: torch.Tensor = _Checkpoint.apply(lambda hidden: layer(hidden, *others), store, hidden_states)
    return out


class _Checkpoint(torch.autograd.Function):
    """The layer runs again inside a backward of its own, so that ZeRO-3's hooks gather its parameters for the second
    forward and for its backward as they do without checkpointing."""

    @staticmethod
    def forward(
        ctx: Any, layer: Callable[[torch.Tensor], Any], store: Store, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        ctx.layer, ctx.store = layer, store
        ctx.handle = store.put(hidden_states)
        return _tensor(layer(hidden_states))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None, torch.Tensor | None]:
        handle: Handle = ctx.handle
        hidden_states = ctx.store.get(handle).requires_grad_()
        ctx.handle = None
        with torch.enable_grad():
            out = _tensor(ctx.layer(hidden_states))
        torch.autograd.backward(out, grads[0])
        return None, None, hidden_states.grad


def _tensor(out: Any) -> torch.Tensor:
    """A decoder layer's output. Raises RunError if it is not one tensor."""
    if not isinstance(out, torch.Tensor):
        raise RunError(f"a decoder layer returned {type(out).__name__}, not a tensor; this model is not supported")
    return out
