"""The MLP a tile of tokens at a time, run again in backward: its intermediates exist for one tile only.

ALST (arXiv 2506.13996, §3.1.1), after Mini-Sequence Transformer (2407.15892).
"""

from typing import Any

import torch
from torch import nn

from pipeline.model.anatomy import decoder_layers


def attach(model: nn.Module, *, tile_tokens: int) -> None:
    """Put a TiledMLP around every decoder layer's MLP; parameter names stay as they were."""
    for layer in decoder_layers(model):
        layer.mlp = TiledMLP(layer.mlp, tile_tokens=tile_tokens)


class TiledMLP(nn.Module):
    """Runs `mlp` over tiles of the sequence. It adopts the MLP's children and parameters under their own names.

    [1, S, hidden] -> [1, S, hidden]. Any MLP that treats tokens one by one fits; the last tile may be shorter.
    """

    def __init__(self, mlp: nn.Module, *, tile_tokens: int) -> None:
        super().__init__()
        self._modules, self._parameters, self._buffers = mlp._modules, mlp._parameters, mlp._buffers
        self.tile_tokens = tile_tokens
        # In a tuple, or nn.Module would register it and every parameter would have a second name.
        self._mlp = (mlp,)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        (mlp,) = self._mlp
        out: torch.Tensor = _Tiled.apply(mlp.forward, self.tile_tokens, hidden_states, *self.parameters())
        return out


class _Tiled(torch.autograd.Function):
    """Parameters are inputs and their gradients are returned, summed over tiles: autograd and ZeRO's hooks see each
    parameter once per layer, with no flag for the last tile."""

    @staticmethod
    def forward(
        ctx: Any, mlp: Any, tile_tokens: int, hidden_states: torch.Tensor, *parameters: nn.Parameter
    ) -> torch.Tensor:
        ctx.mlp, ctx.tile_tokens, ctx.parameters = mlp, tile_tokens, parameters
        ctx.save_for_backward(hidden_states)
        out = torch.empty_like(hidden_states)
        for x, y in zip(hidden_states.split(tile_tokens, 1), out.split(tile_tokens, 1), strict=True):
            y.copy_(mlp(x))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (hidden_states,) = ctx.saved_tensors
        dhidden = torch.empty_like(hidden_states)
        sums: list[torch.Tensor | None] = [None] * len(ctx.parameters)
        tiles = (tensor.split(ctx.tile_tokens, 1) for tensor in (hidden_states, grads[0], dhidden))
        for x, dy, dx in zip(*tiles, strict=True):
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                y = ctx.mlp(x)
            tile_dx, *tile_grads = torch.autograd.grad(y, (x, *ctx.parameters), dy, allow_unused=True)
            dx.copy_(tile_dx)
            sums = [_add(total, grad) for total, grad in zip(sums, tile_grads, strict=True)]
        dparameters = [
            None if total is None else total.to(parameter.dtype)
            for total, parameter in zip(sums, ctx.parameters, strict=True)
        ]
        return None, None, dhidden, *dparameters


def _add(total: torch.Tensor | None, grad: torch.Tensor | None) -> torch.Tensor | None:
    """A running sum in float32 or wider: bfloat16 would round away what the later tiles add."""
    if grad is None:
        return total
    if total is None:
        # A copy: autograd may hand one tensor to two parameters.
        return grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
    return total.add_(grad)
