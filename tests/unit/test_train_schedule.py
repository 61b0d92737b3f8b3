"""The learning rate as a function of the step."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.recipe.load import load
from pipeline.train.schedule import learning_rate

PEAK = 2e-3


def rates(name: str, *, steps: int, warmup: int, least: float = 0.0) -> list[float]:
    """Of every step."""
    recipe = load(
        "tiny",
        overrides=[
            f"schedule={{name: {name}, warmup_steps: {warmup}, min_lr_fraction: {least}}}",
            f"train.steps={steps}",
            f"optimizer.lr={PEAK}",
        ],
    )
    return [learning_rate(recipe, step) for step in range(1, steps + 1)]


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_warm_up_climbs_evenly_and_reaches_the_peak_after_it(name):
    found = rates(name, steps=100, warmup=4)
    assert found[:4] == pytest.approx([PEAK * k / 5 for k in (1, 2, 3, 4)])
    assert found[4] == pytest.approx(PEAK, rel=0.02)
    assert max(found) <= PEAK


def test_constant_stays_at_the_peak():
    assert rates("constant", steps=10, warmup=0) == [PEAK] * 10


def test_linear_falls_evenly_to_its_least():
    found = rates("linear", steps=12, warmup=2, least=0.1)
    falls = [before - after for before, after in pairwise(found[2:])]
    assert falls == pytest.approx([PEAK * 0.9 / 10] * 9)
    assert found[-1] == pytest.approx(PEAK * 0.1)


def test_cosine_is_half_way_in_the_middle_and_flat_at_its_end():
    found = rates("cosine", steps=100, warmup=0, least=0.2)
    assert found[49] == pytest.approx(PEAK * 0.6)
    assert found[24] == pytest.approx(PEAK * (0.2 + 0.8 * (0.5 + 0.5 * 2**-0.5)))
    assert found[-1] == pytest.approx(PEAK * 0.2)
    assert found[-2] - found[-1] < 0.01 * PEAK / 10


@given(
    name=st.sampled_from(["constant", "linear", "cosine"]),
    steps=st.integers(1, 30),
    warmup=st.integers(0, 40),
    least=st.floats(0, 1),
)
@settings(max_examples=50, deadline=None)
def test_it_climbs_then_never_climbs_again_and_stays_within_its_bounds(name, steps, warmup, least):
    found = rates(name, steps=steps, warmup=warmup, least=least)
    rising, falling = found[:warmup], found[warmup:]
    assert all(before < after for before, after in pairwise(rising))
    assert all(before >= after for before, after in pairwise(falling))
    assert all(0 < rate <= PEAK for rate in rising)
    assert all(PEAK * least * (1 - 1e-9) <= rate <= PEAK * (1 + 1e-9) for rate in falling)
