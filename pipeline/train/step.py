"""One optimizer step: the micro-batches forward and backward through the engine, then the update."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pipeline.attention.function import AttentionContext
from pipeline.attention.kernels import AttentionKernel
from pipeline.attention.segments import segments_of
from pipeline.data.batch import Batch
from pipeline.metrics.meter import StepTimer, peak_device_bytes, peak_host_rss_bytes
from pipeline.parallel.mesh import Mesh
from pipeline.plan.job import JobPlan
from pipeline.plan.queue import Request
from pipeline.train.engine import loss_scale


@dataclass(frozen=True)
class Trainee:
    """What a step works on: the engine, and what its attention needs."""

    engine: Any
    plan: JobPlan
    mesh: Mesh
    kernel: AttentionKernel
    device: torch.device


@dataclass(frozen=True)
class StepResult:
    """Reduced over ranks."""

    loss: float
    """Mean over the step's valid tokens, in nats."""
    grad_norm: float | None
    """nan if a gradient is not finite."""
    update_applied: bool
    """False if a gradient is not finite; the weights are then as they were."""
    first_not_finite: tuple[int | None, ...]
    """By rank, the first micro-batch whose loss is not finite."""
    peak_host_rss_bytes: tuple[int, ...]
    """By rank."""
    peak_device_bytes: int | None
    """The largest over ranks."""
    request: Request
    """What some rank was asked for, by the end of this step; of several the largest."""


def run_step(
    trainee: Trainee,
    micro_batches: Iterable[dict[str, Any]],
    *,
    valid_tokens: int,
    learning_rate: float,
    timer: StepTimer,
    asked: Callable[[], Request] = lambda: Request.NOTHING,
) -> StepResult:
    """Forward and backward of every micro-batch, one update.

    A micro-batch is what the model is called with (`model_inputs`), and the call returns a sum over labels;
    `valid_tokens` are those labels of the whole step, over all ranks.
    """
    engine = trainee.engine
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    scale = loss_scale(trainee.plan, valid_tokens)
    loss_sums: list[float] = []
    update = Update(None, applied=False)
    for inputs in micro_batches:
        with timer.phase("forward"):
            loss = engine(**inputs)
            loss_sums.append(float(loss.detach()))
        with timer.phase("backward"):
            engine.backward(loss * scale)
        with timer.phase("optimizer"):
            update = _update(engine, stage=trainee.plan.recipe.zero.stage)
    return _reduce(loss_sums, update, valid_tokens, trainee, asked())


def model_inputs(batch: Batch, trainee: Trainee) -> dict[str, Any]:
    """This rank's shard of a sample as the model takes it."""
    device = trainee.device
    segments = segments_of(batch.cu_seqlens, device=device)
    return {
        "input_ids": batch.input_ids.to(device),
        "labels": batch.labels.to(device),
        "position_ids": batch.position_ids.to(device),
        "attention_context": AttentionContext(segments=segments, mesh=trainee.mesh, kernel=trainee.kernel),
    }


@dataclass(frozen=True)
class Update:
    """What became of the gradients of a step."""

    grad_norm: float | None
    applied: bool


def _update(engine: Any, *, stage: int) -> Update:
    """The engine's step, which between accumulation boundaries only counts.

    With a gradient that is not finite ZeRO 1 to 3 leave the weights alone and give no norm, or that of another step.
    Stage 0 would take the step.
    """
    norm: float | None = None
    if stage == 0 and engine.is_gradient_accumulation_boundary():
        norm = _plain_grad_norm(engine)
        if not math.isfinite(norm):
            return Update(math.nan, applied=False)
    engine.step()
    if not engine.was_step_applied():
        return Update(math.nan, applied=False)
    norm = engine.get_global_grad_norm() if norm is None else norm
    return Update(None if norm is None else float(norm), applied=True)


def _plain_grad_norm(engine: Any) -> float:
    """Of ZeRO-0, whose optimizer keeps no norm: gradients are whole and already averaged on every rank."""
    squares = [p.grad.double().square().sum() for p in engine.module.parameters() if p.grad is not None]
    return math.sqrt(float(sum(squares)))


def _reduce(
    loss_sums: list[float], update: Update, valid_tokens: int, trainee: Trainee, request: Request
) -> StepResult:
    """The step's only collective of ours: each rank's loss sum, where it stopped being finite, peaks, and what it was
    asked for, to all."""
    device_peak = peak_device_bytes()
    first = next((number for number, loss in enumerate(loss_sums) if not math.isfinite(loss)), -1)
    mine = torch.tensor(
        [sum(loss_sums), first, peak_host_rss_bytes(), device_peak or 0, request],
        dtype=torch.float64,
        device=trainee.device,
    )
    all_ranks = [torch.empty_like(mine) for _ in range(trainee.mesh.world_size)]
    dist.all_gather(all_ranks, mine)
    table = torch.stack(all_ranks).cpu()
    return StepResult(
        loss=float(table[:, 0].sum()) / max(valid_tokens, 1),
        grad_norm=update.grad_norm,
        update_applied=update.applied,
        first_not_finite=tuple(None if number < 0 else int(number) for number in table[:, 1]),
        peak_host_rss_bytes=tuple(int(rss) for rss in table[:, 2]),
        peak_device_bytes=None if device_peak is None else int(table[:, 3].max()),
        request=Request(int(table[:, 4].max())),
    )
