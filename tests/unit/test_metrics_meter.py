"""The step record's arithmetic: phases, rates, the time still to go."""

import os
import resource
import subprocess
import sys

import pytest

from pipeline.metrics.meter import (
    ETA_WINDOW,
    Eta,
    RunClock,
    StepRecord,
    StepTimer,
    StepTimes,
    eta_seconds,
    flops_utilization,
    memory_metrics,
    peak_host_rss_bytes,
)
from pipeline.metrics.reduction import Reduction


class Clock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run_step(timer: StepTimer, clock: Clock, seconds: dict[str, float]) -> StepTimes:
    for name, length in seconds.items():
        with timer.phase(name):
            clock.now += length
    return timer.end_step()


def test_phases_add_up_over_gradient_accumulation_and_start_anew_each_step():
    clock = Clock()
    timer = StepTimer(clock=clock)
    for _ in range(2):
        for name, length in (("data", 1), ("forward", 2), ("backward", 3)):
            with timer.phase(name):
                clock.now += length
    with timer.phase("optimizer"):
        clock.now += 5
    clock.now += 0.5  # inside the step, in no phase
    assert timer.end_step() == StepTimes(17.5, 2, 4, 6, 0, 0, 5)
    assert run_step(timer, clock, {"forward": 2}) == StepTimes(2, 0, 2, 0, 0, 0, 0)


def test_what_a_phase_waited_for_is_counted_for_itself_and_the_parts_do_not_overlap():
    clock = Clock()
    waits = iter([{}, {"communication": 3.0, "offload_stall": 1.0}, {"communication": 100.0}, {"communication": 0.5}])
    timer = StepTimer(clock=clock, take_waits=lambda: next(waits))
    with timer.phase("forward"):
        clock.now += 10
    clock.now += 7  # an evaluation, whose 100 s of exchange belong to no phase
    with timer.phase("backward"):
        clock.now += 2
    times = timer.end_step()
    assert (times.forward_seconds, times.backward_seconds) == (6.0, 1.5)
    assert (times.communication_seconds, times.offload_stall_seconds) == (3.5, 1.0)
    assert times.step_seconds == 19


def test_time_between_steps_belongs_to_no_step():
    clock = Clock()
    timer = StepTimer(clock=clock)
    run_step(timer, clock, {"forward": 1})
    clock.now += 1000  # a checkpoint is saved
    assert run_step(timer, clock, {"forward": 2}).step_seconds == 2


def test_the_error_of_a_phase_surfaces_whatever_its_events_would_say():
    """On a GPU what a phase that failed waited for may not be asked for: the events never came."""
    told = iter([{}, RuntimeError("the events of this phase have not come")])

    def take_waits():
        answer = next(told)
        if isinstance(answer, Exception):
            raise answer
        return answer

    timer = StepTimer(take_waits=take_waits)
    with pytest.raises(ValueError, match="its own"), timer.phase("forward"):
        raise ValueError("its own")


def test_a_phase_waits_for_the_device_before_it_ends():
    clock = Clock()

    def wait() -> None:
        clock.now += 10

    timer = StepTimer(clock=clock, synchronize=wait)
    assert run_step(timer, clock, {"forward": 1}).forward_seconds == 11


def test_misuse_of_the_timer_is_told():
    timer = StepTimer()
    with pytest.raises(ValueError, match="data, forward, backward, optimizer"), timer.phase("forwards"):
        pass
    with pytest.raises(ValueError, match="end_step without a phase"):
        timer.end_step()


def test_eta_leaves_out_the_slow_first_step_and_stray_ones():
    assert eta_seconds([], 10) is None
    assert eta_seconds([60.0], 3) == 180  # nothing better is known yet
    assert eta_seconds([60.0, 2.0], 3) == 6
    assert eta_seconds([60.0, 2.0, 2.0, 90.0], 3) == 6


def test_eta_follows_a_change_of_pace():
    assert eta_seconds([9.0] * 100 + [1.0] * ETA_WINDOW, 5) == 5


def test_the_eta_counts_evaluations_once_it_is_known_how_long_they_take():
    eta = Eta()
    assert eta.seconds(steps=4, evaluations=2) is None
    for seconds in (50, 3, 3):
        eta.stepped(seconds)
    assert eta.seconds(steps=4, evaluations=2) == 12
    eta.evaluated(10)
    assert eta.seconds(steps=4, evaluations=2) == 32


def test_a_clock_that_is_set_back_or_forth_changes_no_order_and_no_length():
    wall, monotonic = Clock(), Clock()
    clock = RunClock(wall=wall, monotonic=monotonic)
    told = [clock.now()]
    for jump in (-3600, +86_400, 0):
        wall.now += jump
        monotonic.now += 5
        told.append(clock.now())
    assert told == [100, 105, 110, 115]


def test_a_start_on_a_machine_whose_clock_is_behind_goes_on_after_the_last_step_told():
    wall, monotonic = Clock(), Clock()
    clock = RunClock(after=5000.0, wall=wall, monotonic=monotonic)
    monotonic.now += 2
    assert clock.now() == 5002


def test_utilization_is_unknown_without_a_peak_or_a_count():
    assert flops_utilization(8e12, 2.0, 2e12, 4) == pytest.approx(0.5)
    assert flops_utilization(8e12, 2.0, None, 4) is None
    assert flops_utilization(None, 1.0, 1e12, 1) is None


def test_memory_is_told_with_its_own_reduction():
    told = {metric.name: metric for metric in memory_metrics()}
    assert told["peak_host_rss_bytes"].reduction is Reduction.MAX
    assert told["host_rss_bytes"].reduction is Reduction.SUM
    # The kernel counts pages in batches per thread: the two differ by a few of them.
    assert 10 << 20 < told["host_rss_bytes"].value <= told["peak_host_rss_bytes"].value + (1 << 20)


def test_a_row_is_flat_and_sorts_as_it_counts():
    values = dict.fromkeys(StepRecord.__dataclass_fields__, 0)
    values |= {"loss_by_position": {"00000000": 5.0, "00000256": None}, "loss_by_document_length": {}, "system": {}}
    row = StepRecord(**values).to_row()
    assert [name for name in row if "/" in name] == ["loss_by_position/00000000", "loss_by_position/00000256"]
    assert not any(isinstance(value, dict) for value in row.values())


def test_peak_rss_sees_memory_that_was_touched_and_freed():
    before = peak_host_rss_bytes()
    block = bytearray(os.urandom(1)) * (before + (64 << 20))
    del block
    assert peak_host_rss_bytes() >= before + (64 << 20)
    assert peak_host_rss_bytes() < 1 << 40  # bytes, not KiB taken for pages


def test_peak_rss_of_a_small_worker_is_not_that_of_its_large_parent():
    ballast = bytearray(b"x") * (300 << 20)
    code = "from pipeline.metrics.meter import peak_host_rss_bytes; print(peak_host_rss_bytes())"
    worker = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    del ballast
    assert int(worker.stdout) < 200 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 300 << 10


def test_importing_the_room_imports_neither_torch_nor_mlflow():
    imports = "import sys, pipeline.metrics.meter, pipeline.metrics.tracker, pipeline.metrics.plots"
    code = f"{imports}; print('torch' in sys.modules, 'mlflow' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["False", "False"]
