"""A module that looks at one token at a time, run over tiles of the sequence and again in backward.

What it computes on the way exists for one tile only; its input is all that is kept.
"""

from typing import Any

import torch
from torch import nn

from pipeline.errors import RunError


class TiledModule(nn.Module):
    """Runs a module over tiles of the sequence. It adopts the module's children and parameters under their own names.

    [1, S, hidden] -> [1, S, hidden]. Any module that treats tokens one by one fits; the last tile may be shorter. Of
    one that returns a tuple (gpt_oss: its router's scores as well) the rest is None.
    """

    feature: str
    """Of the recipe, for messages"""

    def __init__(self, stock: nn.Module, *, tile_tokens: int) -> None:
        super().__init__()
        self._modules, self._parameters, self._buffers = stock._modules, stock._parameters, stock._buffers
        self.tile_tokens = tile_tokens
        # In a tuple, or nn.Module would register it and every parameter would have a second name.
        self._stock = (stock,)

    @property
    def stock(self) -> nn.Module:
        """The module inside."""
        return self._stock[0]

    def forward(
        self, hidden_states: torch.Tensor, *others: Any, **named: Any
    ) -> torch.Tensor | tuple[torch.Tensor | None, ...]:
        if others or named:
            raise RunError(f"{type(self.stock).__name__} takes more than hidden states; set {self.feature}: null")
        run = _Tile(self.stock, self.feature)
        out: torch.Tensor = _Tiled.apply(run, self.tile_tokens, hidden_states, *self.parameters())
        return out if run.others is None else (out, *[None] * run.others)

    def train(self, mode: bool = True) -> "TiledModule":
        super().train(mode)
        self.stock.training = mode
        return self


class _Tile:
    """A module as a function of one tensor."""

    def __init__(self, module: nn.Module, feature: str) -> None:
        self.module, self.feature = module, feature
        self.others: int | None = None
        """How many values follow the output in the tuple that the module returns; None if it returns no tuple."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = self.module.forward(x)
        if isinstance(out, tuple):
            out, *others = out
            self.others = len(others)
        if not isinstance(out, torch.Tensor) or out.shape != x.shape:
            raise RunError(f"{type(self.module).__name__} does not return what it takes; set {self.feature}: null")
        return out


class _Tiled(torch.autograd.Function):
    """Parameters are inputs and their gradients are returned, summed over tiles: autograd and ZeRO's hooks see each
    parameter once per layer, with no flag for the last tile."""

    @staticmethod
    def forward(
        ctx: Any, run: _Tile, tile_tokens: int, hidden_states: torch.Tensor, *parameters: nn.Parameter
    ) -> torch.Tensor:
        ctx.run, ctx.tile_tokens, ctx.parameters = run, tile_tokens, parameters
        ctx.save_for_backward(hidden_states)
        first, *rest = hidden_states.split(tile_tokens, 1)
        y = run(first)
        out = torch.empty_like(hidden_states, dtype=y.dtype)
        out[:, :tile_tokens] = y
        del y
        for x, into in zip(rest, out.split(tile_tokens, 1)[1:], strict=True):
            into.copy_(run(x))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (hidden_states,) = ctx.saved_tensors
        dhidden = torch.empty_like(hidden_states)
        trained = [parameter for parameter in ctx.parameters if parameter.requires_grad]
        sums: list[torch.Tensor | None] = [None] * len(trained)
        tiles = (tensor.split(ctx.tile_tokens, 1) for tensor in (hidden_states, grads[0], dhidden))
        for x, dy, dx in zip(*tiles, strict=True):
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                y = ctx.run(x)
            tile_dx, *tile_grads = torch.autograd.grad(y, (x, *trained), dy, allow_unused=True)
            dx.copy_(tile_dx)
            sums = [_add(total, grad) for total, grad in zip(sums, tile_grads, strict=True)]
        of_trained = zip(trained, sums, strict=True)
        # Zero, not None, for an expert that no token of this rank chose: ZeRO waits for every parameter on every rank.
        found = {
            id(parameter): torch.zeros_like(parameter) if total is None else total.to(parameter.dtype)
            for parameter, total in of_trained
        }
        return None, None, dhidden, *(found.get(id(parameter)) for parameter in ctx.parameters)


def _add(total: torch.Tensor | None, grad: torch.Tensor | None) -> torch.Tensor | None:
    """A running sum in float32 or wider: bfloat16 would round away what the later tiles add."""
    if grad is None:
        return total
    if total is None:
        # A copy: autograd may hand one tensor to two parameters.
        return grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
    return total.add_(grad)
