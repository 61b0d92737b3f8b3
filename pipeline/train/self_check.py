"""Before the first step: does the attached model on this mesh compute what the stock model computes on one rank?

The first tokens of the first sample go through engine, exchange, tiles and checkpoints, and one document at a time
through the stock model with stock attention. Loss and gradient norm must agree; a difference is fatal.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F

from pipeline.data.batch import IGNORE_INDEX, Batch
from pipeline.errors import RunError
from pipeline.metrics.meter import StepTimer
from pipeline.model.build import build_model
from pipeline.train.step import StepResult, Trainee, run_step


@dataclass(frozen=True)
class Check:
    """Loss and gradient norm, ours and stock."""

    loss: float
    stock_loss: float
    grad_norm: float
    stock_grad_norm: float

    @property
    def difference(self) -> float:
        """The larger relative difference of the two."""
        return max(
            abs(self.loss - self.stock_loss) / max(abs(self.stock_loss), 1e-30),
            abs(self.grad_norm - self.stock_grad_norm) / max(self.stock_grad_norm, 1e-30),
        )


def self_check(trainee: Trainee, *, shard: Batch, whole: Batch) -> Check:
    """Compare on one short sample: `shard` is this rank's part of it, `whole` all of it. Collective.

    Raises RunError if they differ by more than the recipe's tolerance. Weights and optimizer are left as they were.
    """
    recipe = trainee.plan.recipe.train.self_check
    assert recipe is not None, "called only when the recipe asks for it"
    stock_loss, stock_grad_norm = _stock(trainee, whole)
    ours = _ours(trainee, shard)
    assert ours.grad_norm is not None, "every ZeRO stage gives a norm"
    check = Check(ours.loss, stock_loss, ours.grad_norm, stock_grad_norm)
    if not check.difference <= recipe.tolerance:
        raise RunError(
            f"self-check on {whole.n_tokens:,} tokens: loss {check.loss:.6f} and gradient norm {check.grad_norm:.6f} "
            f"at sp={trainee.mesh.sp}, but {check.stock_loss:.6f} and {check.stock_grad_norm:.6f} with the stock model "
            f"at sp=1: off by {check.difference:.1e}, allowed is {recipe.tolerance:.0e}. Training would go wrong; "
            "report it with plan.json, or set train.self_check.tolerance if the model's dtype explains it"
        )
    return check


def _ours(trainee: Trainee, shard: Batch) -> StepResult:
    """A step at learning rate 0 through the real engine; the optimizer's moments are cleared again."""
    accumulation = trainee.plan.recipe.train.grad_accumulation
    copies = accumulation * trainee.mesh.dp  # the same sample in every micro-batch of every replica
    result = run_step(
        trainee, [shard] * accumulation, valid_tokens=shard.n_valid * copies, learning_rate=0.0, timer=StepTimer()
    )
    optimizer = trainee.engine.optimizer
    for state in getattr(optimizer, "optimizer", optimizer).state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                value.zero_()
            elif isinstance(value, int):  # CPU Adam counts its steps in a plain number
                state[name] = 0
    return result


def _stock(trainee: Trainee, whole: Batch) -> tuple[float, float]:
    """(loss, gradient norm) of the stock model at sp = 1; ranks share the documents among them."""
    model = build_model(trainee.plan.recipe.model, attention="sdpa", seed=trainee.plan.recipe.train.seed)
    model.to(trainee.device)
    bounds = whole.cu_seqlens.tolist()
    loss_sum = torch.zeros((), dtype=torch.float64)
    for start, stop in list(pairwise(bounds))[trainee.mesh.rank :: trainee.mesh.world_size]:
        document = slice(start, stop)
        logits = model(
            input_ids=whole.input_ids[:, document].to(trainee.device),
            position_ids=whole.position_ids[:, document].to(trainee.device),
            use_cache=False,
        ).logits
        labels = whole.labels[:, document].to(trainee.device)
        loss = F.cross_entropy(logits.float()[0], labels[0], ignore_index=IGNORE_INDEX, reduction="sum")
        (loss / max(whole.n_valid, 1)).backward()
        loss_sum += loss.detach().double().cpu()
    return _reduced(loss_sum.to(trainee.device), model, whole.n_valid)


def _reduced(loss_sum: torch.Tensor, model: torch.nn.Module, valid_tokens: int) -> tuple[float, float]:
    dist.all_reduce(loss_sum)
    squares = 0.0
    for parameter in model.parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(grad)
        squares += float(grad.double().square().sum())
    return float(loss_sum) / max(valid_tokens, 1), math.sqrt(squares)
