"""Loss spikes are flagged, and what is no spike is not."""

import math
import random

import pytest

from pipeline.metrics.spikes import FEWEST, LEAST_RISE, WINDOW, SpikeDetector, spike_threshold


def flagged(losses, before=()) -> list[int]:
    """The places of the losses that are flagged."""
    detector = SpikeDetector(before)
    return [place for place, loss in enumerate(losses) if detector.saw(loss)]


def noisy(count, *, level=3.0, noise=0.05, seed=0) -> list[float]:
    dice = random.Random(seed)
    return [dice.gauss(level, noise) for _ in range(count)]


def test_a_loss_that_stands_out_is_flagged_and_its_neighbours_are_not():
    losses = noisy(200)
    losses[100] += 1.0
    assert flagged(losses) == [100]


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_not_flagged(seed):
    assert flagged(noisy(500, seed=seed)) == []


def test_a_falling_loss_is_not_flagged():
    noise = noisy(400, level=0.0, noise=0.02)
    assert flagged([2 + 8 * math.exp(-step / 50) + noise[step] for step in range(400)]) == []


def test_a_spike_does_not_hide_the_next():
    losses = noisy(100)
    for place in (60, 61, 62, 70):
        losses[place] += 2.0
    assert flagged(losses) == [60, 61, 62, 70]


def test_a_loss_that_stays_high_is_flagged_until_it_is_the_usual_one():
    found = flagged([*noisy(WINDOW), *noisy(3 * WINDOW, level=5.0)])
    assert found[0] == WINDOW
    assert found[-1] < 2 * WINDOW


def test_nothing_is_flagged_before_enough_is_known():
    assert flagged([*noisy(FEWEST - 1), 100.0]) == []
    assert flagged([*noisy(FEWEST), 100.0]) == [FEWEST]


def test_a_loss_that_never_moved_has_room_to_move():
    assert flagged([2.0] * 50 + [2.0 * (1 + LEAST_RISE) - 1e-9]) == []
    assert flagged([2.0] * 50 + [2.0 * (1 + LEAST_RISE) + 1e-9]) == [50]


def test_the_threshold_by_hand():
    # median 5, absolute deviations 2 1 0 1 2: their median is 1
    assert spike_threshold([3.0, 4.0, 5.0, 6.0, 7.0]) == pytest.approx(5 + 6 * 1.4826)


def test_a_run_that_goes_on_knows_the_losses_before():
    losses = noisy(60)
    losses[45] += 1.0
    detector = SpikeDetector(losses[:40])
    assert [detector.saw(loss) for loss in losses[40:]].index(True) == 5


def test_a_loss_that_is_not_finite_is_no_yardstick():
    before = [*noisy(FEWEST), math.nan, math.inf]
    assert flagged([3.0, 100.0], before) == [1]
