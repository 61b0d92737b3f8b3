"""A length search finds the longest that runs, in few runs, wherever it begins."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.bench.search import RESOLUTION, next_length

GRAIN = 16


def searched(limit: int, *, start: int, most: int) -> dict[int, bool]:
    """All that was tried where everything up to `limit` runs."""
    tried: dict[int, bool] = {}
    while (length := next_length(tried, start=start, grain=GRAIN, most=most)) is not None:
        assert length not in tried, "a length is tried once"
        tried[length] = length <= limit
    return tried


@given(limit=st.integers(0, 5000), start=st.integers(1, 6000), most=st.integers(1, 400).map(lambda n: n * GRAIN))
def test_the_longest_is_found_within_the_resolution_and_no_multiple_beyond_most_is_tried(limit, start, most):
    tried = searched(limit, start=start, most=most)
    found = max((length for length, ran in tried.items() if ran), default=0)
    reachable = min(limit, most) // GRAIN * GRAIN
    assert found <= reachable
    assert reachable - found <= max(GRAIN, RESOLUTION * found)
    assert all(length % GRAIN == 0 and length <= most for length in tried)


def test_a_good_prediction_takes_few_runs():
    assert len(searched(100_000, start=98_000, most=2**20)) <= 5


@pytest.mark.parametrize("limit", [0, GRAIN - 1])
def test_where_nothing_runs_the_search_ends_with_nothing(limit):
    assert not any(searched(limit, start=5000, most=2**20).values())
