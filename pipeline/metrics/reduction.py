"""How a number that every rank has becomes one of the job: the reduction is an argument of each metric."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Reduction(StrEnum):
    """Over ranks."""

    SUM = "sum"
    MAX = "max"
    MEAN = "mean"
    WEIGHTED_MEAN = "weighted mean"
    """Each rank's value counts by its weight: the tokens that it is a mean over."""


@dataclass(frozen=True)
class RankMetric:
    """A number of one rank, and what becomes of it over all. Every rank has the same names in the same order."""

    name: str
    value: float
    reduction: Reduction
    weight: float = 1.0
    """For WEIGHTED_MEAN; a rank of weight 0 has nothing to say, and its value is not looked at."""


@dataclass(frozen=True)
class Gathered:
    """The metrics of all ranks, as they came out of one collective."""

    metrics: Sequence[RankMetric]
    """This rank's."""
    values: Sequence[Sequence[float]]
    """[ranks][metrics]"""
    weights: Sequence[Sequence[float]]
    """[ranks][metrics]"""

    def of_ranks(self, name: str) -> list[float]:
        """A metric's value on every rank. Raises KeyError if no rank has it."""
        return [row[self._column(name)] for row in self.values]

    def reduced(self) -> dict[str, float | None]:
        """Every metric by its own reduction; None for a weighted mean without weight."""
        return {metric.name: self._reduced(column) for column, metric in enumerate(self.metrics)}

    def _column(self, name: str) -> int:
        names = [metric.name for metric in self.metrics]
        if name not in names:
            raise KeyError(f"no metric {name}; there are {', '.join(names)}")
        return names.index(name)

    def _reduced(self, column: int) -> float | None:
        values = [row[column] for row in self.values]
        match self.metrics[column].reduction:
            case Reduction.SUM:
                return _sum(values)
            case Reduction.MAX:
                return max(values)
            case Reduction.MEAN:
                return _sum(values) / len(values)
            case Reduction.WEIGHTED_MEAN:
                weights = [row[column] for row in self.weights]
                total = _sum(weights)
                weighed = [value * weight for value, weight in zip(values, weights, strict=True) if weight]
                return _sum(weighed) / total if total else None


def _sum(values: Sequence[float]) -> float:
    """The same bits in whatever order ranks come, where all are finite."""
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
