"""What one optimizer step was and cost: phases timed, peaks read, rates derived. The train loop's last act each step.

A `StepRecord` is one line of metrics.jsonl and one step of the MLflow run, under the same names.
"""

import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from pipeline.metrics.reduction import RankMetric, Reduction

Phase = Literal["data", "forward", "backward", "optimizer"]
PHASES: tuple[Phase, ...] = ("data", "forward", "backward", "optimizer")
ETA_WINDOW = 20  # steps; long enough for a calm median, short enough to follow a change of pace


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step. Token and byte counts are of the whole job unless they say otherwise."""

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
    consumed_samples: int
    """Since step 1, over all starts of the run; so are the next two."""
    consumed_documents: int
    consumed_tokens: int
    step_seconds: float
    """Of the slowest rank, for which the others wait."""
    data_seconds: float
    """Mean over ranks, and so the next five: they do not overlap, and what they leave of the step is overhead, and
    waiting for the slowest rank."""
    forward_seconds: float
    backward_seconds: float
    offload_stall_seconds: float
    """In forward and backward, for tensors on their way to or from where they wait; not counted there."""
    communication_seconds: float
    """In forward and backward, for the exchange of sequence parallelism; not counted there."""
    optimizer_seconds: float
    tokens_per_second: float
    tokens_per_second_per_gpu: float
    mfu: float | None
    """Model FLOPs over peak, 0 to 1; None when the peak is unknown."""
    hfu: float | None
    """With the FLOPs of what runs again in backward."""
    peak_device_bytes: int | None
    """Largest over ranks since the process began; None on the CPU. So are the next two."""
    peak_device_reserved_bytes: int | None
    """What the caching allocator took from the device."""
    device_fragmentation: float | None
    """The part of what was reserved at its peak that was never allocated at once, 0 to 1."""
    peak_host_rss_bytes: int
    """Of the largest process since it began."""
    host_rss_bytes: int
    """Of all processes, now; pages that processes share count in each."""
    pinned_bytes: int
    """Of all ranks: host memory that the kernel may not move."""
    offloaded_bytes: int
    """Of the rank with most: what waited in host memory at once."""
    disk_spill_bytes: int
    """Of all ranks: what waited on disk at once."""
    eta_seconds: float | None
    """Of the steps still to do and the evaluations between them."""
    time: float
    """Unix seconds at the end of the step; never before those of the step before."""
    loss_spike: bool = False
    """The loss stands out above those before it."""
    eval_loss: float | None = None
    """Mean over the valid tokens of the held-out samples, in nats; None when the step was not followed by one."""
    eval_seconds: float | None = None
    """Not part of the step's."""
    loss_by_position: Mapping[str, float | None] = field(default_factory=dict)
    """By the first token of a bucket (`metrics.buckets`), as attention counts positions; None where no token was."""
    loss_by_document_length: Mapping[str, float | None] = field(default_factory=dict)
    """By the length of the token's document, as far as it is in the sample."""
    system: Mapping[str, float] = field(default_factory=dict)
    """Of rank 0's node since the step before, under MLflow's names."""

    def to_row(self) -> dict[str, Any]:
        """Flat: a map's values stand under `map/key`."""
        row: dict[str, Any] = {}
        for name, value in asdict(self).items():
            nested = isinstance(value, Mapping)
            row |= {f"{name}/{key}": inner for key, inner in value.items()} if nested else {name: value}
        return row


@dataclass(frozen=True)
class StepTimes:
    """Wall seconds of one step on one rank. The parts do not overlap and need not add up to the whole."""

    step_seconds: float
    data_seconds: float
    forward_seconds: float
    backward_seconds: float
    offload_stall_seconds: float
    communication_seconds: float
    optimizer_seconds: float

    def metrics(self) -> list[RankMetric]:
        """A step is as long as its slowest rank's; of its parts the mean says where time goes."""
        slowest = {"step_seconds"}
        return [
            RankMetric(f.name, getattr(self, f.name), Reduction.MAX if f.name in slowest else Reduction.MEAN)
            for f in fields(self)
        ]


def _no_waits() -> dict[str, float]:
    return {}


class StepTimer:
    """Times the phases of a step. A step begins with its first phase, so that a save between steps counts for none.

    `synchronize` is called at both ends of each phase; on a GPU pass `torch.cuda.synchronize`, otherwise a phase ends
    when its kernels are queued and the wait shows up in a later one. `take_waits` tells what the computation has
    waited for since it was last asked (`communication`, `offload_stall`): that is taken out of the phase.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.perf_counter,
        synchronize: Callable[[], None] | None = None,
        take_waits: Callable[[], Mapping[Any, float]] = _no_waits,
    ) -> None:
        self._clock = clock
        self._synchronize = synchronize
        self._take_waits = take_waits
        self._began: float | None = None
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Add the time of the block to `name`; a phase may come many times (gradient accumulation)."""
        if name not in PHASES:
            raise ValueError(f"phase {name!r} is unknown; use one of {', '.join(PHASES)}")
        if self._synchronize is not None:
            self._synchronize()
        self._take_waits()  # of what ran since the last phase, an evaluation: it belongs to no phase
        start = self._clock()
        if self._began is None:
            self._began = start
        yield
        if self._synchronize is not None:
            self._synchronize()
        self._add(name, self._clock() - start)  # not of a phase that fails: asking its events would hide the error

    def _add(self, name: Phase, seconds: float) -> None:
        waits = self._take_waits()
        for what, waited in (*waits.items(), (name, seconds - sum(waits.values()))):
            self._seconds[what] = self._seconds.get(what, 0.0) + waited

    def end_step(self) -> StepTimes:
        """Close the step and make ready for the next."""
        if self._began is None:
            raise ValueError("end_step without a phase; a step begins with its first phase")
        parts = {f.name: self._seconds.get(f.name.removesuffix("_seconds"), 0.0) for f in fields(StepTimes)}
        times = StepTimes(**parts | {"step_seconds": self._clock() - self._began})
        self._began = None
        self._seconds = {}
        return times


class Eta:
    """The time still to go: steps at their recent pace, and the evaluations between them."""

    def __init__(self) -> None:
        self._steps: list[float] = []
        self._evaluations: list[float] = []

    def stepped(self, seconds: float) -> None:
        self._steps.append(seconds)

    def evaluated(self, seconds: float) -> None:
        self._evaluations.append(seconds)

    def seconds(self, *, steps: int, evaluations: int = 0) -> float | None:
        """Of so many steps and evaluations to come; None before the first step. An evaluation takes nothing before
        the first has told how long it takes."""
        training = eta_seconds(self._steps, steps)
        if training is None or not self._evaluations:
            return training
        return training + evaluations * statistics.median(self._evaluations[-ETA_WINDOW:])


def eta_seconds(step_seconds: Sequence[float], remaining_steps: int) -> float | None:
    """Remaining steps at the median pace of the recent ones.

    The first step of a process warms up allocator and kernels: it counts only while there is no other.
    """
    steady = step_seconds[1:][-ETA_WINDOW:] or step_seconds
    return statistics.median(steady) * remaining_steps if steady else None


class RunClock:
    """Unix time that never goes back: neither when the machine's clock is set, nor from one start of a run to the next.

    Steps keep their order in time then, whatever happens to the clock.
    """

    def __init__(
        self,
        *,
        after: float = -math.inf,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`after`: the last time that earlier starts have told."""
        self._monotonic = monotonic
        self._offset = max(wall(), after) - monotonic()

    def now(self) -> float:
        return self._offset + self._monotonic()


def flops_utilization(
    flops: float | None, seconds: float, peak_flops_per_rank: float | None, ranks: int
) -> float | None:
    """FLOPs of the job over what its ranks could have done in that time; None when either is unknown."""
    if flops is None or peak_flops_per_rank is None:
        return None
    return flops / (seconds * peak_flops_per_rank * ranks)


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


def host_rss_bytes() -> int:
    """Resident set of this process now; 0 where there is no procfs."""
    try:
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return resident_pages * resource.getpagesize()


def peak_device_bytes() -> int | None:
    """Largest sum of allocated tensors on this rank's GPU since the process began; None without one."""
    import torch

    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else None


def memory_metrics() -> list[RankMetric]:
    """Host and device memory of this rank; nothing of a device where there is none."""
    import torch

    found = [
        RankMetric("peak_host_rss_bytes", peak_host_rss_bytes(), Reduction.MAX),
        RankMetric("host_rss_bytes", host_rss_bytes(), Reduction.SUM),
    ]
    allocated = peak_device_bytes()
    if allocated is not None:
        reserved = torch.cuda.max_memory_reserved()
        found += [
            RankMetric("peak_device_bytes", allocated, Reduction.MAX),
            RankMetric("peak_device_reserved_bytes", reserved, Reduction.MAX),
            RankMetric("device_fragmentation", 1 - allocated / reserved if reserved else 0.0, Reduction.MAX),
        ]
    return found
