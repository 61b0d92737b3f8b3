"""The file of a bench: what was asked, under which conditions, and a row per run. Rewritten whole after every run."""

import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pipeline.bench.cases import Engine
from pipeline.bench.trial import Outcome, Row
from pipeline.errors import UserError
from pipeline.files import write_json
from pipeline.plan.model_shape import ModelShape

RESULTS_VERSION = 1
NAME = "results.json"


@dataclass(frozen=True)
class Asked:
    """What a bench was asked to measure. What is in here decides the rows; limits of time do not."""

    recipe: str
    overrides: tuple[str, ...]
    model: str | None
    lengths: tuple[int, ...]
    rungs: tuple[str, ...]
    engines: tuple[Engine, ...]
    layers: tuple[int, ...]
    repeats: int
    steps: int
    find_max: bool
    most_tokens: int
    grain_tokens: int
    full_layers: int
    """Of the model, to which speeds are extrapolated."""

    @classmethod
    def of_json(cls, raw: Mapping[str, Any]) -> "Asked":
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()
        }
        return cls(**values)


@dataclass(frozen=True)
class Results:
    """All of it."""

    asked: Asked
    conditions: Mapping[str, Any]
    """Machine, driver, versions, commit, when, how busy, the command."""
    rows: tuple[Row, ...] = field(default=())
    ended: str = "not yet"
    """`finished`, or what stopped it."""

    def with_row(self, row: Row) -> "Results":
        return replace(self, rows=(*self.rows, row))

    def row(self, key: str) -> Row | None:
        return next((row for row in self.rows if row.key == key), None)

    def write(self, folder: Path) -> None:
        told = {
            "results_version": RESULTS_VERSION,
            "ended": self.ended,
            "asked": asdict(self.asked),
            "conditions": dict(self.conditions),
            "rows": [row.to_json() for row in self.rows],
        }
        write_json(folder / NAME, told)


def read_results(path: Path) -> Results:
    """Raises UserError if it is no such file, or of another version."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        version = raw["results_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the results of a bench ({error}); `alst bench` writes them") from None
    if version != RESULTS_VERSION:
        raise UserError(f"{path}: results_version {version!r}, this code reads {RESULTS_VERSION}; bench again")
    rows = tuple(Row.of_json(row) for row in raw["rows"])
    return Results(Asked.of_json(raw["asked"]), raw["conditions"], rows, raw["ended"])


def opened(folder: Path, asked: Asked, conditions: Mapping[str, Any], *, resume: bool) -> Results:
    """New results, or with `resume` those of the folder to go on with.

    Raises UserError if there are some and nobody said to go on, or if they were asked something else.
    """
    path = folder / NAME
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        return Results(asked, conditions)
    if not resume:
        raise UserError(f"{path}: there are results already; go on with --resume, or name another --output")
    found = read_results(path)
    before, now = asdict(found.asked), asdict(asked)
    if changed := [name for name in now if before[name] != now[name]]:
        told = ", ".join(f"{name} was {before[name]!r}, is {now[name]!r}" for name in changed)
        raise UserError(f"--resume {folder}: must ask the same as before, and {told}; name another --output")
    if found.conditions["commit"] != conditions["commit"]:
        raise UserError(
            f"--resume {folder}: its rows are of commit {found.conditions['commit']}, and this is "
            f"{conditions['commit']}; rows of two commits are no comparison, so name another --output"
        )
    return replace(found, ended="not yet")


@dataclass(frozen=True)
class Group:
    """The repeats of one case."""

    engine: Engine
    rung: str
    seq_len: int
    layers: int
    rows: tuple[Row, ...]

    @property
    def outcome(self) -> Outcome:
        """The worst that happened."""
        return next((row.outcome for row in self.rows if row.outcome is not Outcome.OK), Outcome.OK)

    @property
    def ran(self) -> bool:
        return self.outcome is Outcome.OK

    @property
    def shape(self) -> ModelShape:
        """Of the model that ran, with as many layers as it had."""
        told, names = self.rows[0].plan["model"], {field.name for field in fields(ModelShape)}
        return ModelShape(**{name: value for name, value in told.items() if name in names})

    @property
    def title(self) -> str:
        return self.rung if self.engine == "alst" else f"{self.engine}: {self.rung}"

    def median(self, name: str) -> float | None:
        """Of a field of Measured, over the repeats that have it."""
        values = [getattr(row.measured, name) for row in self.rows if row.measured is not None]
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None

    @property
    def speed(self) -> float | None:
        """Tokens per second and GPU; None unless every repeat ended well."""
        return self.median("tokens_per_second_per_gpu") if self.ran else None

    @property
    def spread(self) -> tuple[float, float] | None:
        """The shortest and the longest step of all repeats."""
        found = [row.measured for row in self.rows if row.measured is not None]
        if not found:
            return None
        return min(one.least_step_seconds for one in found), max(one.most_step_seconds for one in found)


def speed_groups(rows: Iterable[Row]) -> list[Group]:
    """The speed rows, repeats together, in the order they were run."""
    found: dict[tuple[Engine, str, int, int], list[Row]] = {}
    for row in rows:
        if row.case.purpose == "speed":
            case = row.case
            found.setdefault((case.engine, case.rung, case.seq_len, case.layers), []).append(row)
    return [Group(*key, tuple(group)) for key, group in found.items()]


@dataclass(frozen=True)
class Longest:
    """What a length search found."""

    engine: Engine
    rung: str
    layers: int
    row: Row | None
    """Of the longest that ran; None if none did."""
    stopped_by: str
    """What the shortest that is longer ended with."""

    @property
    def seq_len(self) -> int | None:
        return None if self.row is None else self.row.case.seq_len


def longest_of(rows: Sequence[Row]) -> list[Longest]:
    """One per search."""
    found: dict[tuple[Engine, str, int], list[Row]] = {}
    for row in rows:
        if row.case.purpose == "length":
            found.setdefault((row.case.engine, row.case.rung, row.case.layers), []).append(row)
    return [_longest(*key, group) for key, group in found.items()]


def _longest(engine: Engine, rung: str, layers: int, rows: Sequence[Row]) -> Longest:
    best = max((row for row in rows if row.outcome is Outcome.OK), key=lambda row: row.case.seq_len, default=None)
    beyond = [row for row in rows if best is None or row.case.seq_len > best.case.seq_len]
    first = min(beyond, key=lambda row: row.case.seq_len, default=None)
    stopped = "--most" if first is None else f"{first.outcome.value} at {first.case.seq_len:,}"
    return Longest(engine, rung, layers, best, stopped)


def load_average() -> float:
    """Of the last minute: how busy the machine is beside the bench."""
    return os.getloadavg()[0]
