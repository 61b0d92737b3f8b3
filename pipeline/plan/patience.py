"""How long ranks may stand still before it is a stall, and collectives before they give up."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.plan.estimate import estimate
from pipeline.plan.job import JobPlan

TIMES_A_STEP = 3
"""Between two layers that a rank reports it may have to wait for all of a step, and what its documents cost is known
roughly."""

LEAST_SECONDS = 600.0
"""Of a stall that is found without being told how long one is: a file server can be silent for minutes."""

FIRST_STEP_FACTOR = 4
"""The first step also compiles, allocates, and reads what no cache holds yet."""

UNKNOWN_SECONDS = 3600.0
"""For a first step of which the plan foresees no seconds: on a CPU."""

WITHOUT_LIMIT_SECONDS = 12 * 3600.0
"""Of collectives, where stalls are not looked for, and before the first step. A rank that dies is noticed by Slurm."""

COLLECTIVE_FACTOR = 2
LEAVING_SECONDS = 120.0
"""Collectives give up later than the watchdog, which can say why: so long it may take to find a stall, to write its own
stacks (5 s) and those of others (60 s), and to leave."""


@dataclass(frozen=True)
class Patience:
    """Seconds without a sign of life from any rank; None where nobody looks."""

    told: float | None
    """As the recipe says, for every step but the first."""
    foreseen_seconds: float | None
    """Of a step with a save, by the plan, for the documents it is planned for."""
    looks: bool

    def seconds(self, longest_seconds: float | None, *, cost: float = 1.0) -> float:
        """When this step, with a save, may take that long by those before it; None for the first one. By its documents
        it is to cost `cost` times the step that the plan foresees."""
        if self.told is not None:
            return self.told * (FIRST_STEP_FACTOR if longest_seconds is None else 1)
        costlier = max(1.0, cost)
        if longest_seconds is None:
            foreseen = UNKNOWN_SECONDS if self.foreseen_seconds is None else self.foreseen_seconds
            return max(LEAST_SECONDS, TIMES_A_STEP * foreseen * costlier) * FIRST_STEP_FACTOR
        return max(LEAST_SECONDS, TIMES_A_STEP * max(longest_seconds, (self.foreseen_seconds or 0.0) * costlier))

    @property
    def starting_seconds(self) -> float:
        """Before the first step, where operators may have to be built, without a byte that this process moves."""
        return max(LEAST_SECONDS, self.seconds(None))

    def collective_seconds(self, longest_seconds: float | None, *, cost: float = 1.0) -> float:
        """After which a collective of this step gives up."""
        if not self.looks:
            return WITHOUT_LIMIT_SECONDS
        return COLLECTIVE_FACTOR * self.seconds(longest_seconds, cost=cost) + LEAVING_SECONDS


def patience_of(plan: JobPlan, *, packed: Path | None = None) -> Patience:
    """Of a plan, for the documents in `packed`."""
    asked = plan.recipe.train.stall_seconds
    foreseen = estimate(plan, packed=packed)
    seconds = None if foreseen.seconds is None else foreseen.seconds.total + (foreseen.checkpoint_seconds or 0.0)
    return Patience(None if asked in (None, "auto") else float(asked), seconds, looks=asked is not None)
