"""Which length to try next on the way to the longest that runs: bisection between what ran and what did not."""

from collections.abc import Mapping

RESOLUTION = 0.04
"""Of the length found: a peak moves by more between two runs of a fragmented allocator."""


def next_length(tried: Mapping[int, bool], *, start: int, grain: int, most: int) -> int | None:
    """The next length, a multiple of `grain` and at most `most`; None when the longest is known.

    `tried` says which lengths ran. The first steps away from `start`, a prediction, are small; then they double.
    """
    if not tried:
        return _rounded(min(start, most), grain)
    fits = max((length for length, ran in tried.items() if ran), default=None)
    fails = min((length for length, ran in tried.items() if not ran and length > (fits or 0)), default=None)
    steps = len(tried)
    if fits is None:
        assert fails is not None
        lower = _rounded(int(fails * (0.8 if steps == 1 else 0.5)), grain)
        return lower if grain <= lower < fails else (grain if fails > grain else None)
    if fails is None:
        higher = min(_rounded(int(fits * (1.25 if steps == 1 else 2)), grain), most)
        return max(higher, min(fits + grain, most)) if fits < most else None
    if fails - fits <= max(grain, RESOLUTION * fits):
        return None
    middle = _rounded((fits + fails) // 2, grain)
    return middle if fits < middle < fails else None


def _rounded(length: int, grain: int) -> int:
    return max(1, length // grain) * grain
