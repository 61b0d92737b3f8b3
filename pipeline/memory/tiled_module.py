"""A module that looks at one token at a time, run over tiles of the sequence and again in backward.

What it computes on the way exists for one tile only; its input is all that is kept.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from pipeline.errors import RunError
from pipeline.memory.hidden_states import OnDevice


class TiledModule(nn.Module):
    """Runs a module over tiles of the sequence. It adopts the module's children and parameters under their own names.

    [1, S, hidden] -> [1, S, hidden], and of an embedding [1, S] -> [1, S, hidden]. Any module that treats tokens one by
    one fits; the last tile may be shorter. Of one that returns a tuple (gpt_oss: its router's scores as well) the rest
    is None.
    """

    feature: str
    """Of the recipe, for messages"""

    def __init__(
        self,
        stock: nn.Module,
        *,
        tile_tokens: int,
        states: OnDevice | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self._modules, self._parameters, self._buffers = stock._modules, stock._parameters, stock._buffers
        self.tile_tokens = tile_tokens
        self.states = states or OnDevice(between_layers=False)
        """Where its input and output lie."""
        self.device = device
        """That computes; None is that of its parameters, or of its input."""
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
        device = self.device or next((parameter.device for parameter in self.parameters()), hidden_states.device)
        run = _Tile(self.stock, self.feature, self.tile_tokens, self.states, device)
        self.states.entered(hidden_states)
        out: torch.Tensor = _Tiled.apply(run, hidden_states, *self.parameters())
        return out if run.others is None else (out, *[None] * run.others)

    def train(self, mode: bool = True) -> "TiledModule":
        super().train(mode)
        self.stock.training = mode
        return self


class _Tile:
    """A module as a function of one tensor, some rows at a time."""

    def __init__(
        self,
        module: nn.Module,
        feature: str,
        tile_tokens: int,
        states: OnDevice,
        device: torch.device,
    ) -> None:
        self.module, self.feature = module, feature
        self.tile_tokens, self.states, self.device = tile_tokens, states, device
        self.others: int | None = None
        """How many values follow the output in the tuple that the module returns; None if it returns no tuple."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = self.module.forward(x)
        if isinstance(out, tuple):
            out, *others = out
            self.others = len(others)
        if not isinstance(out, torch.Tensor) or out.shape[: x.dim()] != x.shape:
            raise RunError(f"{type(self.module).__name__} does not return what it takes; set {self.feature}: null")
        return out

    def tiles(self, whole: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Rows, and the tensor's part there, on the device; the next part is on its way."""
        yield from tiles(whole, self.tile_tokens, self.states, self.device)


def tiles(
    whole: torch.Tensor, tile_tokens: int, states: OnDevice, device: torch.device
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of [1, S, …] in order, each with the tensor's part there, on the device; the next is on its way."""
    starts = range(0, whole.shape[1], tile_tokens)
    rows = [slice(start, min(start + tile_tokens, whole.shape[1])) for start in starts]
    for now, following in zip(rows, [*rows[1:], None], strict=True):
        part = states.read(whole, now, device)
        if following is not None:
            states.start(whole, following, device)
        yield now, part


class _Tiled(torch.autograd.Function):
    """Parameters are inputs and their gradients are returned, summed over tiles: autograd and ZeRO's hooks see each
    parameter once per layer, with no flag for the last tile."""

    @staticmethod
    def forward(ctx: Any, run: _Tile, hidden_states: torch.Tensor, *parameters: nn.Parameter) -> torch.Tensor:
        ctx.run, ctx.parameters = run, parameters
        ctx.save_for_backward(hidden_states)
        out: torch.Tensor | None = None
        for rows, x in run.tiles(hidden_states):
            y = run(x)
            if out is None:
                shape = (*hidden_states.shape[:2], *y.shape[2:])
                out = run.states.empty(torch.Size(shape), y.dtype, y.device)
            run.states.write(out, rows, y)
            del y
        assert out is not None, "a sequence has tokens"
        run.states.settle()
        run.states.made(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (whole,) = ctx.saved_tensors
        run, grad = ctx.run, grads[0]
        has_gradient = whole.is_floating_point()  # token ids have none
        dwhole = run.states.empty(whole.shape, whole.dtype, whole.device) if has_gradient else None
        trained = [parameter for parameter in ctx.parameters if parameter.requires_grad]
        sums: list[torch.Tensor | None] = [None] * len(trained)
        for (rows, x), (_, dy) in zip(run.tiles(whole), run.tiles(grad), strict=True):
            x = x.detach().requires_grad_(has_gradient)
            with torch.enable_grad():
                y = run(x)
            wanted = (x, *trained) if has_gradient else trained
            found = list(torch.autograd.grad(y, wanted, dy, allow_unused=True))
            if dwhole is not None:
                run.states.write(dwhole, rows, found.pop(0))
            sums = [add_in_float32(total, one) for total, one in zip(sums, found, strict=True)]
        run.states.settle()
        return None, dwhole, *as_gradients(ctx.parameters, sums)


def as_gradients(
    parameters: Sequence[nn.Parameter], sums: Sequence[torch.Tensor | None]
) -> Iterator[torch.Tensor | None]:
    """One for each parameter, out of the sums of those that are trained.

    Zero, not None, for an expert that no token of this rank chose: ZeRO waits for every parameter on every rank.
    """
    trained = iter(sums)
    for parameter in parameters:
        if not parameter.requires_grad:
            yield None
            continue
        total = next(trained)
        yield torch.zeros_like(parameter) if total is None else total.to(parameter.dtype)


def add_in_float32(total: torch.Tensor | None, grad: torch.Tensor | None) -> torch.Tensor | None:
    """A running sum in float32 or wider: bfloat16 would round away what the later tiles add."""
    if grad is None:
        return total
    if total is None:
        # A copy: autograd may hand one tensor to two parameters.
        return grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
    return total.add_(grad)
