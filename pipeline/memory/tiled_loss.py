"""The loss a tile of tokens at a time: logits of the whole sequence never exist (ALST, arXiv 2506.13996, §3.1).

Gradients of hidden states and of the head are computed with each tile in forward, and *returned* through autograd:
any factor on the loss then scales them, and ZeRO's hooks see the head's parameters once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from types import MethodType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from pipeline.errors import RecipeError, RunError
from pipeline.memory.hidden_states import OnDevice
from pipeline.memory.tiled_module import tiles
from pipeline.model.anatomy import backbone, lm_head

IGNORE_INDEX = -100

Kernel = Literal["own", "liger"]


@dataclass(frozen=True)
class LogitsTransform:
    """What the model does around the head: logits = softcap * tanh(scale * z / softcap), z = W x + b."""

    scale: float = 1.0
    softcap: float | None = None

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """In place where it can be. [tokens, vocab]."""
        if self.scale != 1.0:
            z = z.mul_(self.scale)
        if self.softcap is not None:
            z = z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z

    def slope(self, logits: torch.Tensor) -> torch.Tensor | None:
        """d logits / d z where it varies, from the logits; None where it is `scale` everywhere. [tokens, vocab]."""
        if self.softcap is None:
            return None
        return 1 - (logits / self.softcap).square_()


def logits_transform(model: PreTrainedModel) -> LogitsTransform:
    """What this model does around its head: granite divides, cohere multiplies, gemma 2 and later cap.

    The config tells the numbers, the stock forward which of them it uses and how. Raises RunError if none of the ways
    known here gives its logits.
    """
    config, bias = model.config, lm_head(model).bias
    generator = torch.Generator().manual_seed(0)
    z = 10 * torch.randn(1, 5, config.get_text_config().vocab_size, generator=generator, dtype=torch.float64)
    before, logits = _stock_head(model, z)
    divisor = getattr(config, "logits_scaling", None) or 1.0
    scales = (1.0, 1.0 / divisor, divisor, getattr(config, "logit_scale", None) or 1.0)
    softcaps = (None, getattr(config, "final_logit_softcapping", None))
    for scale, softcap in product(scales, softcaps):
        found = LogitsTransform(scale=scale, softcap=softcap).forward(z.clone())
        # Some models compute here in float32.
        if torch.allclose(logits.double(), found, rtol=1e-5, atol=1e-5) and (before == 1.0 or bias is None):
            return LogitsTransform(scale=before * scale, softcap=softcap)
    raise RunError(f"{type(model).__name__} changes logits in a way that is not known here; it is not supported")


def _stock_head(model: PreTrainedModel, z: torch.Tensor) -> tuple[float, torch.Tensor]:
    """(factor on hidden states before the head, logits) of the stock forward, where z is what the head returns.

    z [1, tokens, vocab]; neither backbone nor weights are used. Raises RunError if it is not a factor.
    """
    hidden_states = torch.randn(1, z.shape[1], 3, generator=torch.Generator().manual_seed(1), dtype=z.dtype)
    factors = []

    def head(x: torch.Tensor) -> torch.Tensor:
        factors.append(float(x[0, 0, 0] / hidden_states[0, 0, 0]))
        if x.shape != hidden_states.shape or not torch.allclose(x, factors[-1] * hidden_states, rtol=1e-12):
            raise RunError(f"{type(model).__name__} changes hidden states before its head; it is not supported")
        return z.clone()

    answers: dict[Any, Callable[..., Any]] = {
        backbone(model): lambda *args, **kwargs: _BackboneOutput(hidden_states),
        lm_head(model): head,
    }
    out = type(model).forward(_StandIn(model, answers), input_ids=torch.zeros(z.shape[:2], dtype=torch.long))
    return factors[0], out.logits


class _StandIn:
    """A module for a call of its class's forward, with answers instead of some of its children; it is not touched."""

    def __init__(self, module: nn.Module, answers: dict[Any, Callable[..., Any]]) -> None:
        self._module, self._answers = module, answers

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        return _StandIn(found, self._answers) if isinstance(found, nn.Module) else found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._answers.get(self._module, self._module)(*args, **kwargs)


class _BackboneOutput:
    """Hidden states, and None for whatever else a backbone may return."""

    def __init__(self, hidden_states: torch.Tensor) -> None:
        self.last_hidden_state = hidden_states

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> torch.Tensor | None:
        return self.last_hidden_state if index == 0 else None


def attach(model: PreTrainedModel, *, tile_tokens: int, kernel: Kernel = "own", states: OnDevice | None = None) -> None:
    """The model's forward takes `labels` and returns the sum of the loss over this rank's valid labels.

    `token_losses`, float32 [S/sp], is filled with each token's own if it is given; kernel liger knows sums only, and
    leaves it as it is. Labels are already shifted. `states` says where hidden states lie. Backbone, then head with
    labels, both inside one call of the model: around it, ZeRO-3 under gradient accumulation would keep only the last
    micro-batch's gradient. Raises RunError for a model whose head does what is not known here, RecipeError if the
    kernel cannot do it or is not installed.
    """
    transform = logits_transform(model)
    if kernel == "liger":
        require_liger(transform)

    def head_loss(
        self: nn.Linear, hidden_states: torch.Tensor, labels: torch.Tensor, token_losses: torch.Tensor | None = None
    ) -> torch.Tensor:
        if kernel == "liger":
            return liger_loss(hidden_states, self.weight, self.bias, labels, softcap=transform.softcap)
        return tiled_loss(
            hidden_states,
            self.weight,
            self.bias,
            labels,
            tile_tokens=tile_tokens,
            transform=transform,
            token_losses=token_losses,
            states=states,
        )

    def loss_sum(
        self: PreTrainedModel, labels: torch.Tensor, token_losses: torch.Tensor | None = None, **inputs: Any
    ) -> torch.Tensor:
        hidden_states = backbone(self)(use_cache=False, **inputs).last_hidden_state
        loss: torch.Tensor = lm_head(self)(hidden_states, labels, token_losses)
        return loss

    head = lm_head(model)
    # On these two instances, not on their classes.
    setattr(head, "forward", MethodType(head_loss, head))  # noqa: B010
    setattr(model, "forward", MethodType(loss_sum, model))  # noqa: B010


def tiled_loss(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    tile_tokens: int,
    transform: LogitsTransform,
    token_losses: torch.Tensor | None = None,
    states: OnDevice | None = None,
) -> torch.Tensor:
    """The sum of cross-entropy over labels that are not IGNORE_INDEX, a scalar in float32 (float64 for float64).

    hidden_states [1, S, hidden]; weight [vocab, hidden]; bias [vocab] or None; labels int64 [1, S]; token_losses
    [S], filled with the loss of each token, 0 where its label does not count.
    """
    states = states or OnDevice(between_layers=False)
    states.entered(hidden_states)
    loss: torch.Tensor = _TiledLoss.apply(
        hidden_states, weight, bias, labels, tile_tokens, transform, token_losses, states
    )
    return loss


class _TiledLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        tile_tokens: int,
        transform: LogitsTransform,
        token_losses: torch.Tensor | None,
        states: OnDevice,
    ) -> torch.Tensor:
        # No output of this function: nothing flows back through it. One that nobody reads where nobody asked for it.
        each = weight.new_empty(hidden.shape[1], dtype=torch.float32) if token_losses is None else token_losses
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = weight.new_zeros((), dtype=wide)
        needs_gradients = any(ctx.needs_input_grad)
        if needs_gradients:
            dhidden = states.empty(hidden.shape, hidden.dtype, hidden.device)
            # Summed over tiles in float32: bfloat16 would round away what the later tiles add.
            dweight = torch.zeros_like(weight, dtype=wide)
            dbias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        for rows, x in tiles(hidden, tile_tokens, states, weight.device):
            y = labels[0, rows].to(weight.device, non_blocking=True)
            losses, dz = _tile_loss(x[0], y, weight, bias, transform)
            each[rows].copy_(losses)
            total += losses.sum()
            if not needs_gradients:
                continue
            narrow = dz.to(hidden.dtype)
            states.write(dhidden, rows, torch.mm(narrow, weight)[None])
            dweight += narrow.t() @ x[0]
            if dbias is not None:
                dbias += dz.sum(0)
        states.settle()
        if needs_gradients:
            ctx.save_for_backward(dhidden, dweight, dbias)
            ctx.tile_tokens, ctx.weight_dtype, ctx.states, ctx.device = tile_tokens, weight.dtype, states, weight.device
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dhidden, dweight, dbias = ctx.saved_tensors
        states: OnDevice = ctx.states
        # The factor stays wide: rounded to bfloat16 it would bias every gradient by up to 0.4 %.
        factor = grads[0]
        scaled = states.empty(dhidden.shape, dhidden.dtype, dhidden.device)
        for rows, tile in tiles(dhidden, ctx.tile_tokens, states, ctx.device):
            states.write(scaled, rows, (tile.to(factor.dtype) * factor).to(dhidden.dtype))
        states.settle()
        dbias = None if dbias is None else (dbias * factor).to(ctx.weight_dtype)
        return scaled, (dweight * factor).to(ctx.weight_dtype), dbias, None, None, None, None, None


def _tile_loss(
    x: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transform: LogitsTransform
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one tile: each token's loss [tokens], and d loss / d z [tokens, vocab] in float32 or wider, in the logits' own
    memory."""
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = transform.forward(F.linear(x, weight, bias).to(wide))
    slope = transform.slope(logits)
    valid = (labels != IGNORE_INDEX).to(wide)[:, None]
    target = labels.clamp(min=0)[:, None]
    target_logits = logits.gather(1, target)
    peak = logits.amax(-1, keepdim=True)
    weights = logits.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    losses = ((peak + total.log() - target_logits) * valid)[:, 0]
    dz = weights.mul_(valid / total).scatter_add_(1, target, -valid)
    if slope is not None:
        dz.mul_(slope)
    return losses, dz.mul_(transform.scale) if transform.scale != 1.0 else dz


def require_liger(transform: LogitsTransform) -> None:
    """Raises RecipeError if Liger's loss is not installed, or cannot do what the model does around its head."""
    if transform.scale != 1.0:
        raise RecipeError(
            f"memory.tiled_loss.kernel = liger: must be own for a model that scales its logits, here by "
            f"{transform.scale:g}; set memory.tiled_loss.kernel: own"
        )
    try:
        import liger_kernel.transformers.functional  # noqa: F401
    except ImportError as error:
        raise RecipeError(
            f"memory.tiled_loss.kernel = liger: must be installed, and does not load ({error}); install liger-kernel, "
            "or set memory.tiled_loss.kernel: own"
        ) from None


def liger_loss(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    softcap: float | None,
) -> torch.Tensor:
    """As `tiled_loss`, by Liger's fused kernel; gradients of weight and bias are summed in float32 there, too."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss: torch.Tensor = liger_fused_linear_cross_entropy(
        hidden_states.flatten(0, 1),
        weight,
        labels.flatten(),
        bias=bias,
        ignore_index=IGNORE_INDEX,
        reduction="sum",
        softcap=softcap,
        accum_dtype=torch.float32,
    )
    return loss
