"""The loop: step after step, each recorded."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.data.batch import Batch
from pipeline.data.loader import PackedLoader
from pipeline.memory.apply import Attached
from pipeline.metrics.console import ProgressLine, size, warn
from pipeline.metrics.meter import StepRecord
from pipeline.metrics.spikes import SpikeDetector
from pipeline.metrics.tracker import Tracker
from pipeline.parallel.mesh import limit_collectives
from pipeline.plan.patience import Patience
from pipeline.plan.queue import Request
from pipeline.train.checkpoint import Checkpointer
from pipeline.train.evaluate import HeldOut, evaluate, is_due
from pipeline.train.guard import Guard
from pipeline.train.heartbeat import Heartbeat
from pipeline.train.profiler import profiled
from pipeline.train.recorder import Recorder
from pipeline.train.schedule import learning_rate
from pipeline.train.step import Trainee, model_inputs, run_step
from pipeline.train.stopping import Stopping
from pipeline.train.token_losses import TokenLosses


@dataclass(frozen=True)
class Reporting:
    """Where a step is told: idle on ranks other than 0."""

    tracker: Tracker
    progress: ProgressLine | None

    def step(self, record: StepRecord) -> None:
        """One that has ended."""
        self.tracker.log_step(record)
        if self.progress is not None:
            self.progress.step(record)


@dataclass(frozen=True)
class Watch:
    """Who looks at a step, and what it is to be followed by."""

    guard: Guard
    spikes: SpikeDetector
    held_out: HeldOut | None
    stopping: Stopping
    heartbeat: Heartbeat
    patience: Patience

    def profiled(self, trainee: Trainee, step: int) -> AbstractContextManager[None]:
        """Around the step that the recipe asks to profile, on rank 0."""
        if trainee.mesh.rank != 0 or step != trainee.plan.recipe.train.profile_step:
            return nullcontext()
        return profiled(self.guard.run_dir.profile, step)

    def limit_collectives(self) -> None:
        """For the step that begins."""
        seconds = self.patience.collective_seconds(self.stopping.longest_seconds, cost=self.stopping.cost)
        limit_collectives(timedelta(seconds=seconds))


@dataclass(frozen=True)
class Outcome:
    """How training ended."""

    peak_host_rss_bytes: tuple[int, ...]
    """By rank."""
    ended_by: Request
    """NOTHING if all steps are done."""


def train(
    trainee: Trainee,
    loader: PackedLoader,
    attached: Attached,
    watch: Watch,
    checkpointer: Checkpointer,
    reporting: Reporting,
) -> Outcome:
    """Run every step of `loader`, and save when it is due; or until the step after which some rank is to stop.

    Raises NotFiniteError, on every rank, at the first step whose loss or gradient is not finite; UserError before the
    first step, if none can end in this job's time.
    """
    recorder = Recorder(trainee, loader, attached, reporting.tracker.clock)
    timer = recorder.timer
    peaks: tuple[int, ...] = ()
    iterator = iter(loader)
    ended_by = _stop(watch.stopping.at_start(trainee.device))
    while not ended_by:
        watch.limit_collectives()
        watch.heartbeat.beat("data")
        with timer.phase("data"):
            batch = next(iterator, None)
            if batch is None:
                break
            losses = recorder.token_losses()
            micro_batches = [_inputs(micro_batch, trainee, loader, losses) for micro_batch in batch.micro_batches]
        watch.stopping.before_step()
        watch.heartbeat.step = batch.step + 1
        rate = learning_rate(trainee.plan.recipe, batch.step + 1)
        with watch.profiled(trainee, batch.step + 1):
            result = run_step(
                trainee,
                micro_batches,
                valid_tokens=batch.valid_tokens,
                learning_rate=rate,
                timer=timer,
                asked=watch.stopping.after_step,
                measure=partial(recorder.measure, losses),
            )
        watch.guard.check(batch, result)
        peaks = result.peak_host_rss_bytes
        record = replace(recorder.record(batch, result, rate), loss_spike=watch.spikes.saw(result.loss))
        record, request = _evaluated(record, result.request, trainee, watch, recorder)
        reporting.step(record)
        if batch.step + 1 < trainee.plan.recipe.train.steps:
            ended_by = _stop(request)
        if checkpointer.due(batch.step + 1, asked=request >= Request.SAVE):
            watch.heartbeat.beat("save")
            checkpointer.save(loader.cursor(batch.step + 1))
        if request >= Request.SAVE:
            watch.stopping.saved()
        _tell(checkpointer, reporting)
    watch.heartbeat.beat("last save")
    try:
        checkpointer.finish()
    finally:
        _tell(checkpointer, reporting)
    return Outcome(peaks, ended_by)


def _stop(request: Request) -> Request:
    """The request if it ends training."""
    return request if request >= Request.REQUEUE else Request.NOTHING


def _tell(checkpointer: Checkpointer, reporting: Reporting) -> None:
    """What became of checkpoints since the last step."""
    for news in checkpointer.news():
        if isinstance(news, str):
            warn(news)
            continue
        reporting.tracker.log_checkpoint({"name": Path(news.path).name, **asdict(news)})
        if reporting.progress is not None:
            reporting.progress.note(
                f"checkpoint {Path(news.path).name}: {size(news.bytes)} on disk after {news.seconds:.1f} s, training "
                f"waited {news.stall_seconds:.1f} s"
            )


def _inputs(batch: Batch, trainee: Trainee, loader: PackedLoader, losses: TokenLosses | None) -> dict[str, Any]:
    """What the model is called with, and what it is to fill in."""
    inputs = model_inputs(batch, trainee)
    if losses is not None:
        inputs["token_losses"] = losses.buffer(batch, loader.dataset.sample(batch.sample).cu_seqlens)
    return inputs


def _evaluated(
    record: StepRecord, request: Request, trainee: Trainee, watch: Watch, recorder: Recorder
) -> tuple[StepRecord, Request]:
    """The record with the held-out loss, if it is due, and what is asked for by now."""
    if _stop(request) or watch.held_out is None or not is_due(trainee.plan, record.step):
        return record, request  # whoever has to go needs the time for the save
    evaluation = evaluate(trainee, watch.held_out)
    recorder.eta.evaluated(evaluation.seconds)
    eta = recorder.eta_seconds(record.step)
    request = max(request, watch.stopping.after_evaluation(evaluation.seconds, trainee.device))
    return replace(record, eval_loss=evaluation.loss, eval_seconds=evaluation.seconds, eta_seconds=eta), request
