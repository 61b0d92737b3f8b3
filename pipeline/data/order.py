"""In which order an epoch visits the samples. Pure functions of the data set's index and a seed.

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


def epoch_order(samples: int, *, seed: int, epoch: int, like_costs: LikeCosts | None = None) -> Ints:
    """int64 [samples]: every sample once, in an order that each epoch has for itself.

    With `like_costs` the steps of the epoch take samples that are neighbours by cost, in a shuffled order of steps.
    What is lost is which samples meet in a step: always about the same ones. Samples of a step that this epoch shares
    with the one before or after it are drawn at random.
    """
    order = seeded_order(samples, seed=seed, stream=epoch)
    if like_costs is None:
        return order
    size = like_costs.per_step
    shared = -epoch * samples % size  # of this epoch's samples, those that fill up the last step of the one before
    groups = max(0, samples - shared) // size
    head, body, tail = np.split(order, [min(shared, samples), min(shared, samples) + groups * size])
    by_cost = body[np.argsort(like_costs.costs[body], kind="stable")].reshape(groups, size)
    steps = by_cost[seeded_order(groups, seed=seed, stream=_GROUPS + epoch)]
    return np.concatenate([head, steps.reshape(-1), tail])
