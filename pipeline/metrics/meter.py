"""What one optimizer step was and cost: phases timed, peaks read, rates derived. The train loop's last act each step.

A `StepRecord` is one line of metrics.jsonl and one step of the MLflow run, under the same names.
"""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Phase = Literal["data", "forward", "backward", "optimizer"]
PHASES: tuple[Phase, ...] = ("data", "forward", "backward", "optimizer")
ETA_WINDOW = 20  # steps; long enough for a calm median, short enough to follow a change of pace


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step. Token and byte counts are of the whole job; seconds are of rank 0."""

    step: int
    """Counted from 1."""
    epoch: float
    loss: float
    """Mean over the valid tokens of the global batch, in nats."""
    grad_norm: float | None
    learning_rate: float
    tokens: int
    """Real tokens of the global batch, padding left out."""
    valid_tokens: int
    """Labels that counted in the loss."""
    sum_len_squared: int
    """Sum over documents of length squared: what attention costs."""
    step_seconds: float
    data_seconds: float
    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float
    tokens_per_second: float
    tokens_per_second_per_gpu: float
    mfu: float | None
    """Model FLOPs over peak, 0 to 1; None when the peak is unknown."""
    peak_device_bytes: int | None
    """Largest over ranks since the process began; None on the CPU."""
    peak_host_rss_bytes: int
    """Of the largest process since it began."""
    offloaded_bytes: int
    eta_seconds: float | None
    time: float
    """Unix seconds at the end of the step."""
    loss_spike: bool = False
    """The loss stands out above those before it."""
    eval_loss: float | None = None
    """Mean over the valid tokens of the held-out samples, in nats; None when the step was not followed by one."""
    eval_seconds: float | None = None
    """Not part of the step's."""


@dataclass(frozen=True)
class StepTimes:
    """Wall seconds of one step; the phases need not add up to the whole."""

    step_seconds: float
    data_seconds: float
    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float


class StepTimer:
    """Times the phases of a step. A step begins with its first phase, so that a save between steps counts for none.

    `synchronize` is called at the end of each phase; on a GPU pass `torch.cuda.synchronize`, otherwise a phase ends
    when its kernels are queued and the wait shows up in a later one.
    """

    def __init__(
        self, *, clock: Callable[[], float] = time.perf_counter, synchronize: Callable[[], None] | None = None
    ) -> None:
        self._clock = clock
        self._synchronize = synchronize
        self._began: float | None = None
        self._seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self._history: list[float] = []

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Add the time of the block to `name`; a phase may come many times (gradient accumulation)."""
        if name not in PHASES:
            raise ValueError(f"phase {name!r} is unknown; use one of {', '.join(PHASES)}")
        start = self._clock()
        if self._began is None:
            self._began = start
        try:
            yield
            if self._synchronize is not None:
                self._synchronize()
        finally:
            self._seconds[name] += self._clock() - start

    def end_step(self) -> StepTimes:
        """Close the step and make ready for the next."""
        if self._began is None:
            raise ValueError("end_step without a phase; a step begins with its first phase")
        times = StepTimes(
            step_seconds=self._clock() - self._began,
            data_seconds=self._seconds["data"],
            forward_seconds=self._seconds["forward"],
            backward_seconds=self._seconds["backward"],
            optimizer_seconds=self._seconds["optimizer"],
        )
        self._history.append(times.step_seconds)
        self._began = None
        self._seconds = dict.fromkeys(PHASES, 0.0)
        return times

    def eta_seconds(self, remaining_steps: int) -> float | None:
        """Expected seconds of the steps still to do; None before the first has ended."""
        return eta_seconds(self._history, remaining_steps)


def eta_seconds(step_seconds: Sequence[float], remaining_steps: int) -> float | None:
    """Remaining steps at the median pace of the recent ones.

    The first step of a process warms up allocator and kernels: it counts only while there is no other.
    """
    steady = step_seconds[1:][-ETA_WINDOW:] or step_seconds
    return statistics.median(steady) * remaining_steps if steady else None


def step_record(
    *,
    step: int,
    epoch: float,
    loss: float,
    grad_norm: float | None,
    learning_rate: float,
    tokens: int,
    valid_tokens: int,
    sum_len_squared: int,
    times: StepTimes,
    ranks: int,
    model_flops: float | None,
    peak_flops_per_rank: float | None,
    peak_device_bytes: int | None,
    peak_host_rss_bytes: int,
    offloaded_bytes: int,
    eta_seconds: float | None,
    now: float | None = None,
) -> StepRecord:
    """Compose the record of a step; counts, `model_flops` and peaks are already reduced over ranks."""
    tokens_per_second = tokens / times.step_seconds
    return StepRecord(
        step=step,
        epoch=epoch,
        loss=loss,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        tokens=tokens,
        valid_tokens=valid_tokens,
        sum_len_squared=sum_len_squared,
        step_seconds=times.step_seconds,
        data_seconds=times.data_seconds,
        forward_seconds=times.forward_seconds,
        backward_seconds=times.backward_seconds,
        optimizer_seconds=times.optimizer_seconds,
        tokens_per_second=tokens_per_second,
        tokens_per_second_per_gpu=tokens_per_second / ranks,
        mfu=model_flops_utilization(model_flops, times.step_seconds, peak_flops_per_rank, ranks),
        peak_device_bytes=peak_device_bytes,
        peak_host_rss_bytes=peak_host_rss_bytes,
        offloaded_bytes=offloaded_bytes,
        eta_seconds=eta_seconds,
        time=time.time() if now is None else now,
    )


def model_flops_utilization(
    model_flops: float | None, seconds: float, peak_flops_per_rank: float | None, ranks: int
) -> float | None:
    """Model FLOPs of the job over what its ranks could have done in that time; None when either is unknown."""
    if model_flops is None or peak_flops_per_rank is None:
        return None
    return model_flops / (seconds * peak_flops_per_rank * ranks)


def peak_host_rss_bytes() -> int:
    """Largest resident set of this process since it began.

    VmHWM where the kernel tells it: ru_maxrss survives exec, so a small worker would report the peak of the
    large process that started it.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # no procfs: the getrusage number below is the best there is
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_device_bytes() -> int | None:
    """Largest sum of allocated tensors on this rank's GPU since the process began; None without one."""
    import torch

    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else None
