"""What is measured of a step, and the record it becomes: between the step and whoever is told of it."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch

from pipeline.data.loader import PackedLoader, StepBatch
from pipeline.memory.apply import Attached
from pipeline.metrics.meter import (
    Eta,
    RunClock,
    StepRecord,
    StepTimer,
    StepTimes,
    flops_utilization,
    memory_metrics,
)
from pipeline.metrics.reduction import RankMetric, Reduction
from pipeline.metrics.system import SystemMeter
from pipeline.parallel.waits import take_waits
from pipeline.plan.hardware import HARDWARE
from pipeline.train.consumed import consumed_before
from pipeline.train.evaluate import evaluations_after
from pipeline.train.flops import StepFlops
from pipeline.train.step import StepResult, Trainee
from pipeline.train.token_losses import BY_DOCUMENT_LENGTH, BY_POSITION, TokenLosses, by_first_token

MEASURED_SECONDS = tuple(field.name for field in fields(StepTimes))
MEASURED_BYTES = ("peak_host_rss_bytes", "host_rss_bytes", "pinned_bytes", "offloaded_bytes", "disk_spill_bytes")
MEASURED_OF_A_DEVICE = ("peak_device_bytes", "peak_device_reserved_bytes", "device_fragmentation")
"""Measured where there is one."""


class Recorder:
    """Measures each step of a job and composes its record, the same on every rank."""

    def __init__(self, trainee: Trainee, loader: PackedLoader, attached: Attached, clock: RunClock) -> None:
        self.timer = StepTimer(synchronize=_synchronize(trainee), take_waits=take_waits)
        self.eta = Eta()
        self._trainee, self._loader, self._attached, self._clock = trainee, loader, attached, clock
        self._counted = StepFlops.of(trainee.engine.module)
        self._consumed = consumed_before(loader)
        self._system = SystemMeter()

    def token_losses(self) -> TokenLosses | None:
        """For the step that begins; None where the model's loss does not tell them."""
        if not self._attached.tells_token_losses:
            return None
        return TokenLosses(self._trainee.layout, self._trainee.mesh, self._trainee.device)

    def measure(self, losses: TokenLosses | None) -> list[RankMetric]:
        """Of this rank, at the end of a step, which ends with it."""
        return [
            *self.timer.end_step().metrics(),
            *memory_metrics(),
            RankMetric("pinned_bytes", self._attached.pinned_bytes, Reduction.SUM),
            RankMetric("offloaded_bytes", self._attached.offloaded_bytes, Reduction.MAX),
            RankMetric("disk_spill_bytes", self._attached.spilled_bytes, Reduction.SUM),
            *(() if losses is None else losses.metrics()),
        ]

    def record(self, batch: StepBatch, result: StepResult, rate: float) -> StepRecord:
        """The step as it is told."""
        self._consumed = self._consumed.after(batch, self._loader)
        measured: dict[str, Any] = dict(result.measured)
        seconds = measured["step_seconds"]
        self.eta.stepped(seconds)
        mfu, hfu = self._utilization(batch, seconds)
        costs = {name: measured[name] for name in MEASURED_SECONDS}
        costs |= {name: int(measured[name]) for name in MEASURED_BYTES}
        costs |= {name: measured.get(name) for name in MEASURED_OF_A_DEVICE}
        return StepRecord(
            step=batch.step + 1,
            epoch=batch.epoch,
            loss=result.loss,
            grad_norm=result.grad_norm,
            learning_rate=rate,
            tokens=batch.tokens,
            valid_tokens=batch.valid_tokens,
            sum_len_squared=batch.sum_len_squared,
            consumed_samples=self._consumed.samples,
            consumed_documents=self._consumed.documents,
            consumed_tokens=self._consumed.tokens,
            tokens_per_second=batch.tokens / seconds,
            tokens_per_second_per_gpu=batch.tokens / seconds / self._trainee.plan.world_size,
            mfu=mfu,
            hfu=hfu,
            eta_seconds=self.eta_seconds(batch.step + 1),
            time=self._clock.now(),
            loss_by_position=by_first_token(measured, BY_POSITION),
            loss_by_document_length=by_first_token(measured, BY_DOCUMENT_LENGTH),
            system=self._system.read() if self._trainee.mesh.rank == 0 else {},
            **costs,
        )

    def eta_seconds(self, step: int) -> float | None:
        """After `step`, counted from 1."""
        plan = self._trainee.plan
        return self.eta.seconds(steps=plan.recipe.train.steps - step, evaluations=evaluations_after(plan, step))

    def _utilization(self, batch: StepBatch, seconds: float) -> tuple[float | None, float | None]:
        """MFU and HFU."""
        plan, counted = self._trainee.plan, self._counted
        if counted is None:
            return None, None
        peak = HARDWARE[plan.recipe.hardware.gpu].peak_flops
        done = (counted.of_step(batch, self._loader), counted.hardware_of_step(batch, self._loader, plan))
        mfu, hfu = (flops_utilization(flops, seconds, peak, plan.world_size) for flops in done)
        return mfu, hfu


def _synchronize(trainee: Trainee) -> Callable[[], None] | None:
    """On a GPU a phase ends when its kernels do."""
    return torch.cuda.synchronize if trainee.device.type == "cuda" else None
