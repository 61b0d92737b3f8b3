"""Samples of like cost in one step: a pure function of the data set's index, a seed and the epoch.

Inside the last stop of the data path; `loader` says who gets which of them.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.data.packing import Ints, seeded_order

_GROUPS = 1 << 33  # stream of the order of groups, apart from that of samples


@dataclass(frozen=True, eq=False)
class LikeCosts:
    """Samples of like cost share a step, so that its DP ranks wait little for each other."""

    costs: Ints
    """[samples]: sum of squared lengths of what attends to itself"""
    per_step: int
    """dp x gradient accumulation, samples of a step"""


def by_cost(order: Ints, like: LikeCosts, *, seed: int, epoch: int) -> Ints:
    """An epoch's order [samples], rearranged: its steps take neighbours by cost, in a shuffled order of steps.

    What is lost is which samples meet in a step: always about the same ones. Samples of a step that this epoch shares
    with the one before or after it stay drawn at random.
    """
    size = like.per_step
    first = min(-epoch * len(order) % size, len(order))  # the samples before it fill up the last step before this epoch
    groups = (len(order) - first) // size
    head, body, tail = np.split(order, [first, first + groups * size])
    neighbours = body[np.argsort(like.costs[body], kind="stable")].reshape(groups, size)
    steps = neighbours[seeded_order(groups, seed=seed, stream=_GROUPS + epoch)]
    return np.concatenate([head, steps.reshape(-1), tail])
