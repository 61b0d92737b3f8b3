"""A number with its formula: what `alst plan` adds up and what `--explain` prints are the same object."""

from dataclasses import dataclass
from math import prod

Factor = tuple[str, float]
"""(what it is, its value)."""


@dataclass(frozen=True)
class Term:
    """A product of named factors, over a product of others."""

    what: str
    factors: tuple[Factor, ...]
    over: tuple[Factor, ...] = ()
    when: frozenset[str] | None = None
    """Moments of a step at which it is there; None is always."""

    @property
    def value(self) -> float:
        return prod(value for _, value in self.factors) / prod(value for _, value in self.over)

    def is_at(self, moment: str | None) -> bool:
        return self.when is None or moment in self.when


@dataclass(frozen=True)
class Item:
    """A row of the plan: the terms of one name, added."""

    name: str
    terms: tuple[Term, ...]

    def at(self, moment: str | None = None) -> float:
        """The sum of the terms that are there at this moment."""
        return sum(term.value for term in self.terms if term.is_at(moment))

    @property
    def total(self) -> float:
        return sum(term.value for term in self.terms)


def term(what: str, *factors: Factor | float, over: tuple[Factor, ...] = (), when: tuple[str, ...] = ()) -> Term:
    """A term; a bare number is a factor that needs no name."""
    named = tuple(factor if isinstance(factor, tuple) else ("", float(factor)) for factor in factors)
    return Term(what, named, over, frozenset(when) or None)
