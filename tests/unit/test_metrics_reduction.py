"""The reduction over ranks is an argument of each metric."""

import math

import pytest

from pipeline.metrics.reduction import Gathered, RankMetric, Reduction


def gathered(reduction: Reduction, *ranks: tuple[float, float]) -> Gathered:
    """One metric, by rank as (value, weight)."""
    return Gathered(
        [RankMetric("x", 0.0, reduction)],
        values=[[value] for value, _ in ranks],
        weights=[[weight] for _, weight in ranks],
    )


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        (Reduction.SUM, 9.0),
        (Reduction.MAX, 6.0),
        (Reduction.MEAN, 3.0),
        (Reduction.WEIGHTED_MEAN, (1 * 10 + 2 * 10 + 6 * 80) / 100),
    ],
)
def test_each_metric_is_reduced_as_it_asks(reduction, expected):
    assert gathered(reduction, (1, 10), (2, 10), (6, 80)).reduced() == {"x": expected}


def test_a_rank_without_tokens_has_no_say_whatever_its_value_is():
    assert gathered(Reduction.WEIGHTED_MEAN, (math.nan, 0), (4, 2)).reduced() == {"x": 4}
    assert gathered(Reduction.WEIGHTED_MEAN, (0, 0), (0, 0)).reduced() == {"x": None}


def test_a_sum_is_the_same_bits_in_any_order_of_ranks():
    values = [1e16, 1.0, -1e16, 0.1, 0.2, 0.3]
    sums = {
        gathered(Reduction.SUM, *((value, 1) for value in order)).reduced()["x"] for order in (values, values[::-1])
    }
    assert len(sums) == 1


def test_what_is_not_finite_on_one_rank_is_not_finite_in_the_sum():
    assert math.isnan(gathered(Reduction.SUM, (1, 1), (math.nan, 1)).reduced()["x"])
    assert math.isinf(gathered(Reduction.SUM, (1, 1), (math.inf, 1)).reduced()["x"])


def test_the_value_of_every_rank_can_be_looked_at():
    found = gathered(Reduction.MAX, (1, 1), (5, 1))
    assert found.of_ranks("x") == [1, 5]
    with pytest.raises(KeyError, match="there are x"):
        found.of_ranks("y")
