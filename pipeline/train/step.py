"""One optimizer step: the micro-batches forward and backward through the engine, then the update."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pipeline.attention.function import AttentionContext
from pipeline.attention.kernels import AttentionKernel
from pipeline.attention.segments import segments_of
from pipeline.data.batch import Batch
from pipeline.metrics.meter import StepTimer, peak_host_rss_bytes
from pipeline.metrics.reduction import Gathered, RankMetric, Reduction
from pipeline.parallel.mesh import Mesh
from pipeline.parallel.shard import Layout
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

    @property
    def layout(self) -> Layout:
        """Of the samples of training."""
        return Layout(self.plan.seq_len, self.mesh.sp, self.plan.chunk_tokens)


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
    request: Request
    """What some rank was asked for, by the end of this step; of several the largest."""
    measured: Mapping[str, float | None]
    """What the caller measured, each by its own reduction."""


def run_step(
    trainee: Trainee,
    micro_batches: Iterable[dict[str, Any]],
    *,
    valid_tokens: int,
    learning_rate: float,
    timer: StepTimer,
    asked: Callable[[], Request] = lambda: Request.NOTHING,
    measure: Callable[[], Sequence[RankMetric]] = tuple,
) -> StepResult:
    """Forward and backward of every micro-batch, one update.

    A micro-batch is what the model is called with (`model_inputs`), and the call returns a sum over labels;
    `valid_tokens` are those labels of the whole step, over all ranks. What `measure` tells of this rank when all is
    done travels with the step's reduction.
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
    mine = [*_own(loss_sums, asked()), *measure()]
    return _result(_gather(mine, trainee), update, valid_tokens)


def model_inputs(batch: Batch, trainee: Trainee, *, chunk_tokens: int | None = None) -> dict[str, Any]:
    """This rank's part of a sample as the model takes it; `chunk_tokens` is the plan's, unless it is told."""
    device, chunks = trainee.device, trainee.plan.recipe.memory.sequence_chunks
    tokens_on = torch.device("cpu") if chunks is not None and chunks.resolved.hidden_states == "cpu" else device
    layout = Layout(batch.seq_len, trainee.mesh.sp, chunk_tokens or trainee.plan.chunk_tokens)
    return {
        "input_ids": batch.input_ids.to(tokens_on),
        "labels": batch.labels.to(tokens_on),
        "position_ids": batch.position_ids.to(tokens_on),
        "attention_context": AttentionContext(
            segments=segments_of(batch.cu_seqlens, device=device),
            mesh=trainee.mesh,
            kernel=trainee.kernel,
            layout=layout,
        ),
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


def _own(loss_sums: list[float], request: Request) -> list[RankMetric]:
    """What every step tells of a rank: its loss sum, where it stopped being finite, its peak, what it was asked."""
    first = next((number for number, loss in enumerate(loss_sums) if not math.isfinite(loss)), -1)
    return [
        RankMetric("loss_sum", sum(loss_sums), Reduction.SUM),
        RankMetric("first_not_finite", first, Reduction.MAX),
        RankMetric("rank_peak_host_rss_bytes", peak_host_rss_bytes(), Reduction.MAX),
        RankMetric("request", request, Reduction.MAX),
    ]


def _gather(mine: Sequence[RankMetric], trainee: Trainee) -> Gathered:
    """The step's only collective of ours: every rank's numbers, to all."""
    pairs = [(metric.value, metric.weight) for metric in mine]
    own = torch.tensor(pairs, dtype=torch.float64, device=trainee.device)
    all_ranks = [torch.empty_like(own) for _ in range(trainee.mesh.world_size)]
    dist.all_gather(all_ranks, own)
    table = torch.stack(all_ranks).cpu()
    return Gathered(mine, values=table[..., 0].tolist(), weights=table[..., 1].tolist())


def _result(gathered: Gathered, update: Update, valid_tokens: int) -> StepResult:
    measured = gathered.reduced()
    return StepResult(
        loss=(measured["loss_sum"] or 0.0) / max(valid_tokens, 1),
        grad_norm=update.grad_norm,
        update_applied=update.applied,
        first_not_finite=tuple(None if number < 0 else int(number) for number in gathered.of_ranks("first_not_finite")),
        peak_host_rss_bytes=tuple(int(rss) for rss in gathered.of_ranks("rank_peak_host_rss_bytes")),
        request=Request(int(measured["request"] or 0)),
        measured=measured,
    )
