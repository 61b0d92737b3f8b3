"""One optimizer step: the micro-batches forward and backward through the engine, then the update."""

import math
from collections.abc import Iterable
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
    peak_host_rss_bytes: tuple[int, ...]
    """By rank."""
    peak_device_bytes: int | None
    """The largest over ranks."""


def run_step(
    trainee: Trainee,
    micro_batches: Iterable[dict[str, Any]],
    *,
    valid_tokens: int,
    learning_rate: float,
    timer: StepTimer,
) -> StepResult:
    """Forward and backward of every micro-batch, one update.

    A micro-batch is what the model is called with (`model_inputs`), and the call returns a sum over labels;
    `valid_tokens` are those labels of the whole step, over all ranks.
    """
    engine = trainee.engine
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    scale = loss_scale(trainee.plan, valid_tokens)
    loss_sum = torch.zeros((), dtype=torch.float64)
    grad_norm: float | None = None
    for inputs in micro_batches:
        with timer.phase("forward"):
            loss = engine(**inputs)
            loss_sum += loss.detach().double().cpu()
        with timer.phase("backward"):
            engine.backward(loss * scale)
        with timer.phase("optimizer"):
            if engine.is_gradient_accumulation_boundary() and trainee.plan.recipe.zero.stage == 0:
                grad_norm = _plain_grad_norm(engine)
            engine.step()
    if grad_norm is None:
        norm = engine.get_global_grad_norm()
        grad_norm = None if norm is None else float(norm)
    return _reduce(loss_sum, grad_norm, valid_tokens, trainee)


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


def _plain_grad_norm(engine: Any) -> float:
    """Of ZeRO-0, whose optimizer keeps no norm: gradients are whole and already averaged on every rank."""
    squares = [p.grad.double().square().sum() for p in engine.module.parameters() if p.grad is not None]
    return math.sqrt(float(sum(squares)))


def _reduce(loss_sum: torch.Tensor, grad_norm: float | None, valid_tokens: int, trainee: Trainee) -> StepResult:
    """The step's only collective of ours: each rank's loss sum and peaks, to all."""
    device_peak = peak_device_bytes()
    mine = torch.tensor(
        [float(loss_sum), peak_host_rss_bytes(), device_peak or 0], dtype=torch.float64, device=trainee.device
    )
    all_ranks = [torch.empty_like(mine) for _ in range(trainee.mesh.world_size)]
    dist.all_gather(all_ranks, mine)
    table = torch.stack(all_ranks).cpu()
    return StepResult(
        loss=float(table[:, 0].sum()) / max(valid_tokens, 1),
        grad_norm=grad_norm,
        peak_host_rss_bytes=tuple(int(rss) for rss in table[:, 1]),
        peak_device_bytes=None if device_peak is None else int(table[:, 2].max()),
    )
