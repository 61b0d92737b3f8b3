"""The loss a tile of tokens at a time: logits of the whole sequence never exist (ALST, arXiv 2506.13996, §3.1).

Gradients of hidden states and of the head are computed with each tile in forward, and *returned* through autograd:
any factor on the loss then scales them, and ZeRO's hooks see the head's parameters once.
"""

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from pipeline.model.anatomy import backbone, lm_head

IGNORE_INDEX = -100


@dataclass(frozen=True)
class LogitsTransform:
    """What the model does to the head's output: logits = softcap * tanh(scale * z / softcap)."""

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


def logits_transform(config: Any) -> LogitsTransform:
    """Of a transformers config: granite divides, cohere multiplies, gemma 2 and later cap."""
    scale = 1.0
    if getattr(config, "logits_scaling", None):
        scale = 1.0 / config.logits_scaling
    if getattr(config, "logit_scale", None):
        scale = config.logit_scale
    return LogitsTransform(scale=scale, softcap=getattr(config, "final_logit_softcapping", None))


def attach(model: PreTrainedModel, *, tile_tokens: int) -> None:
    """The model's forward takes `labels` and returns the sum of the loss over this rank's valid labels.

    Labels are already shifted. Backbone, then head with labels, both inside one call of the model: around it, ZeRO-3
    under gradient accumulation would keep only the last micro-batch's gradient.
    """
    transform = logits_transform(model.config)

    def head_loss(self: torch.nn.Linear, hidden_states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return tiled_loss(hidden_states, self.weight, self.bias, labels, tile_tokens=tile_tokens, transform=transform)

    def loss_sum(self: PreTrainedModel, labels: torch.Tensor, **inputs: Any) -> torch.Tensor:
        hidden_states = backbone(self)(use_cache=False, **inputs).last_hidden_state
        loss: torch.Tensor = lm_head(self)(hidden_states, labels)
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
) -> torch.Tensor:
    """The sum of cross-entropy over labels that are not IGNORE_INDEX, a scalar in float32 (float64 for float64).

    hidden_states [1, S, hidden]; weight [vocab, hidden]; bias [vocab] or None; labels int64 [1, S].
    """
    loss: torch.Tensor = _TiledLoss.apply(
        hidden_states.flatten(0, 1), weight, bias, labels.flatten(), tile_tokens, transform
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
    ) -> torch.Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=wide)
        if not any(ctx.needs_input_grad):
            for tile in _tiles(hidden, labels, tile_tokens):
                total += _tile_loss(*tile, weight, bias, transform)[0]
            return total
        dhidden = torch.zeros_like(hidden)
        # Summed over tiles in float32: bfloat16 would round away what the later tiles add.
        dweight = torch.zeros_like(weight, dtype=wide)
        dbias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        for (x, y), dx in zip(_tiles(hidden, labels, tile_tokens), dhidden.split(tile_tokens), strict=True):
            loss, dz = _tile_loss(x, y, weight, bias, transform)
            total += loss
            narrow = dz.to(hidden.dtype)
            torch.mm(narrow, weight, out=dx)
            dweight += narrow.t() @ x
            if dbias is not None:
                dbias += dz.sum(0)
        ctx.save_for_backward(dhidden, dweight.to(weight.dtype), None if dbias is None else dbias.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = tuple(None if g is None else g * grads[0].to(g.dtype) for g in ctx.saved_tensors)
        return *scaled, None, None, None


def _tiles(hidden: torch.Tensor, labels: torch.Tensor, tile_tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(hidden.split(tile_tokens), labels.split(tile_tokens), strict=True))


def _tile_loss(
    x: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transform: LogitsTransform
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one tile: the loss sum, and d loss / d z [tokens, vocab] in float32 or wider, in the logits' own memory."""
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = transform.forward(F.linear(x, weight, bias).to(wide))
    slope = transform.slope(logits)
    valid = (labels != IGNORE_INDEX).to(wide)[:, None]
    target = labels.clamp(min=0)[:, None]
    target_logits = logits.gather(1, target)
    peak = logits.amax(-1, keepdim=True)
    weights = logits.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    loss = ((peak + total.log() - target_logits) * valid).sum()
    dz = weights.mul_(valid / total).scatter_add_(1, target, -valid)
    if slope is not None:
        dz.mul_(slope)
    return loss, dz.mul_(transform.scale) if transform.scale != 1.0 else dz
