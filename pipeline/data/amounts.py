"""How often each document is taken: weights and token budgets of sources, weights of lengths. Pure functions.

Inside the plan stage: lengths, sources -> copies.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.data.packing import Ints, seeded_order
from pipeline.errors import DataError
from pipeline.recipe.schema import LengthWeight, Source

_STREAM = 1 << 32  # of the seeded orders here; those of packing and training count from 0


def copies_of(
    lengths: Ints,
    source: NDArray[np.int32],
    *,
    sources: Sequence[Source],
    length_weights: Sequence[LengthWeight],
    seed: int,
) -> Ints:
    """int64 [documents]: how often each document is taken. `lengths` and `source` (its index) are [documents].

    Expected copies that are no integer are rounded so that their sum over any stretch of a seeded order is right
    within one: weight 0.5 takes exactly half of the documents. Raises DataError where a budget cannot be met.
    """
    weights = np.ones(len(lengths))
    for rule in length_weights:
        inside = (lengths >= rule.from_tokens) & (lengths < (rule.to_tokens or np.iinfo(np.int64).max))
        weights[inside] *= rule.weight
    copies = np.zeros(len(lengths), np.int64)
    for index, asked in enumerate(sources):
        rows = np.flatnonzero(source == index)
        rows = rows[seeded_order(len(rows), seed=seed, stream=_STREAM + index)]
        copies[rows] = _rounded(weights[rows] * asked.weight)
        if asked.tokens is not None:
            copies[rows] = _within_budget(lengths[rows], copies[rows], budget=asked.tokens, path=asked.path)
    return copies


def _rounded(expected: NDArray[np.float64]) -> Ints:
    """Integers whose running sums are those of `expected`, rounded."""
    sums = np.floor(np.cumsum(expected) + 0.5).astype(np.int64)
    return np.diff(sums, prepend=0)


def _within_budget(lengths: Ints, copies: Ints, *, budget: int, path: str) -> Ints:
    """Copies of about `budget` tokens: whole rounds, and as many documents of one more as come nearest to it."""
    sums = np.cumsum(lengths * copies)
    total = int(sums[-1]) if len(sums) else 0
    if not total:
        raise DataError(f"data source {path} has no token to take {budget} of; remove it or its `tokens`")
    rounds, rest = divmod(budget, total)
    taken = int(np.searchsorted(sums, rest, side="right"))
    below = int(sums[taken - 1]) if taken else 0
    if taken < len(sums) and sums[taken] - rest < rest - below:
        taken += 1
    if not rounds and not taken:
        raise DataError(
            f"data source {path}: its first document has {lengths[0]} tokens, and tokens: {budget} leaves no room for "
            "it; raise tokens, or set max_document_tokens"
        )
    return rounds * copies + np.where(np.arange(len(copies)) < taken, copies, 0)
