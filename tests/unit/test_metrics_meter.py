"""The step record's arithmetic: phases, rates, the time still to go."""

import os
import resource
import subprocess
import sys

import pytest

from pipeline.metrics.meter import (
    ETA_WINDOW,
    StepTimer,
    StepTimes,
    eta_seconds,
    model_flops_utilization,
    peak_host_rss_bytes,
    step_record,
)


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


def record(**changes):
    values = {
        "step": 2,
        "epoch": 0.5,
        "loss": 3.0,
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
        "tokens": 6000,
        "valid_tokens": 5990,
        "sum_len_squared": 9_000_000,
        "times": StepTimes(2.0, 0.1, 0.5, 1.0, 0.3),
        "ranks": 4,
        "model_flops": 8e12,
        "peak_flops_per_rank": 2e12,
        "peak_device_bytes": None,
        "peak_host_rss_bytes": 2**30,
        "offloaded_bytes": 7,
        "eta_seconds": 12.0,
        "now": 1_700_000_000.0,
    }
    return step_record(**(values | changes))


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
    assert timer.end_step() == StepTimes(17.5, 2, 4, 6, 5)
    assert run_step(timer, clock, {"forward": 2}) == StepTimes(2, 0, 2, 0, 0)


def test_time_between_steps_belongs_to_no_step():
    clock = Clock()
    timer = StepTimer(clock=clock)
    run_step(timer, clock, {"forward": 1})
    clock.now += 1000  # a checkpoint is saved
    assert run_step(timer, clock, {"forward": 2}).step_seconds == 2


def test_a_phase_that_fails_is_timed_and_the_error_surfaces():
    clock = Clock()
    timer = StepTimer(clock=clock)
    with pytest.raises(RuntimeError, match="out of memory"), timer.phase("forward"):
        clock.now += 3
        raise RuntimeError("out of memory")
    assert timer.end_step().forward_seconds == 3


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


def test_timer_gives_the_eta_of_its_own_steps():
    clock = Clock()
    timer = StepTimer(clock=clock)
    assert timer.eta_seconds(4) is None
    for seconds in (50, 3, 3):
        run_step(timer, clock, {"forward": seconds})
    assert timer.eta_seconds(4) == 12


def test_rates_are_of_real_tokens_over_all_ranks():
    made = record()
    assert made.tokens_per_second == 3000
    assert made.tokens_per_second_per_gpu == 750
    assert made.mfu == pytest.approx(8e12 / (2.0 * 2e12 * 4))
    assert (made.step_seconds, made.data_seconds, made.forward_seconds) == (2.0, 0.1, 0.5)
    assert (made.backward_seconds, made.optimizer_seconds) == (1.0, 0.3)
    assert made.time == 1_700_000_000.0


def test_mfu_is_unknown_without_a_peak():
    assert record(peak_flops_per_rank=None).mfu is None
    assert model_flops_utilization(None, 1.0, 1e12, 1) is None


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
