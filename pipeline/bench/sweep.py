"""Which runs, in which order, until they are done or the time is up: `alst bench`."""

import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.bench.cases import Basis, Case, Engine, config_of, plan_of
from pipeline.bench.corpus import DOCUMENT_TOKENS, ensure_corpus
from pipeline.bench.ladder import rungs_of
from pipeline.bench.results import Asked, Results, load_average, opened
from pipeline.bench.search import next_length
from pipeline.bench.trial import PORT_TAKEN, ROOT, Bench, Outcome, Row, run_trial
from pipeline.errors import RecipeError, UserError
from pipeline.launch.snapshot import commit
from pipeline.plan.hardware import GIB
from pipeline.plan.model_shape import shape_of
from pipeline.recipe.schema import Gpu

PACKAGES = ("torch", "transformers", "deepspeed", "flash-attn", "flash-attn-4", "liger-kernel", "triton", "numpy")
LEAST_TRIAL_SECONDS = 20.0
"""A run is not begun with less left: starting alone takes as long."""

TIME_UP, INTERRUPTED = "its time was up; --resume goes on", "interrupted; --resume goes on"
"""How a bench ended that is not finished."""

Tell = Callable[[str], None]
Trial = Callable[..., Row]


class Clock:
    """The time a bench may take."""

    def __init__(self, minutes: float | None, *, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._end = None if minutes is None else now() + 60 * minutes

    @property
    def left(self) -> float | None:
        return None if self._end is None else self._end - self._now()


class TimeUpError(Exception):
    """No more run fits into the bench's time."""


@dataclass
class Sweep:
    """A bench on its way."""

    results: Results
    basis: Basis
    bench: Bench
    clock: Clock
    timeout_seconds: float
    tell: Tell
    trial: Trial = run_trial

    @property
    def asked(self) -> Asked:
        return self.results.asked

    def run(self) -> Results:
        """Every case that has no row yet; written after each. What stops it, stands in `ended`."""
        ended = "finished"
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # its default would leave a run running
        try:
            for case in self._speed_cases():
                self._row(case)
            if self.asked.find_max:
                for engine, rung, layers in self._searches():
                    self._search(engine, rung, layers)
        except TimeUpError:
            ended = TIME_UP
        except KeyboardInterrupt:
            ended = INTERRUPTED
        finally:
            signal.signal(signal.SIGTERM, before)
        self._keep(replace(self.results, ended=ended))
        return self.results

    def _speed_cases(self) -> Iterator[Case]:
        """Engines and rungs take turns within a repeat, so that a machine that slows down does so for all."""
        for seq_len in self.asked.lengths:
            for layers in self.asked.layers:
                for repeat in range(1, self.asked.repeats + 1):
                    yield from (
                        Case(engine, rung, seq_len, layers, "speed", repeat) for engine, rung in self._entrants()
                    )

    def _entrants(self) -> Iterator[tuple[Engine, str]]:
        """Who has which feature set: the reference the lower rungs, plain Hugging Face and DeepSpeed the first."""
        for rung in rungs_of(self.asked.rungs):
            for engine in self.asked.engines:
                has = {"alst": True, "reference": rung.reference, "plain": rung.name == "baseline"}[engine]
                if has:
                    yield engine, rung.name

    def _searches(self) -> Iterator[tuple[Engine, str, int]]:
        for layers in self.asked.layers:
            for engine, rung in self._entrants():
                yield engine, rung, layers

    def _search(self, engine: Engine, rung: str, layers: int) -> None:
        """Until the longest of this feature set is known."""
        tried: dict[int, bool] = {}
        start = self._expected_length(engine, rung, layers)
        while True:
            most = max(1, self.asked.most_tokens // self._grain) * self._grain
            length = next_length(tried, start=start, grain=self._grain, most=most)
            if length is None:
                return
            row = self._row(Case(engine, rung, length, layers, "length"))
            tried[length] = row.outcome is Outcome.OK

    @property
    def _grain(self) -> int:
        return self.asked.grain_tokens

    def _expected_length(self, engine: Engine, rung: str, layers: int) -> int:
        """What the plan finds; where no memory is limited, on a CPU, the shortest."""
        if self.basis.machine.gpu is Gpu.CPU:
            return self._grain
        case = Case(engine, rung, self._grain, layers, "length")
        basis = replace(self.basis, overrides=(*self.basis.overrides, "data.seq_len=auto"))
        try:
            return plan_of(case, basis).seq_len
        except RecipeError:
            return self._grain

    def _row(self, case: Case) -> Row:
        """The case's row, run now if there is none. Raises TimeUpError if its time does not suffice."""
        if (known := self.results.row(case.key)) is not None:
            return known
        left = self.clock.left
        if left is not None and left < LEAST_TRIAL_SECONDS:
            raise TimeUpError
        cut = left is not None and left < self.timeout_seconds
        seconds = self.timeout_seconds if left is None else min(self.timeout_seconds, left)
        self.tell(f"{_told_left(left)}{case.key} …")
        row = self._tried(case, seconds)
        if cut and row.outcome is Outcome.TIMEOUT:
            raise TimeUpError  # it had less than its due; a resume gives it that
        self.tell(f"    {told(row)}")
        self._keep(self.results.with_row(row))
        return row

    def _keep(self, results: Results) -> None:
        self.results = results
        results.write(self.bench.folder)

    def _tried(self, case: Case, seconds: float) -> Row:
        """A plan that cannot be is a row as well."""
        began, clock = time.strftime("%Y-%m-%dT%H:%M:%S%z"), time.monotonic()
        try:
            plan = plan_of(case, self.basis)
        except RecipeError as error:
            wall = time.monotonic() - clock
            return Row(case, Outcome.REFUSED, str(error), None, None, {}, {}, "alst plan", wall, began)
        row = self.trial(case, plan, self.bench, timeout_seconds=seconds)
        if row.outcome is Outcome.FAILED and PORT_TAKEN.search(row.detail):
            row = self.trial(case, plan, self.bench, timeout_seconds=seconds)
        return row


def told(row: Row) -> str:
    """A row in one line."""
    found = row.measured
    if row.outcome is not Outcome.OK or found is None:
        return f"{row.outcome.value}: {row.detail}"
    peak = found.peak_device_bytes or found.peak_host_rss_bytes
    stall = found.offload_stall_share
    mfu = "" if found.mfu is None else f", MFU {found.mfu:.1%}, HFU {found.hfu or 0.0:.1%}"
    return (
        f"{found.tokens_per_second_per_gpu:,.0f} tokens/s/GPU, {found.step_seconds:.2f} s a step{mfu}, peak "
        f"{peak / GIB:.2f} GiB" + ("" if stall is None else f", offload stall {stall:.1%}")
    )


def _told_left(left: float | None) -> str:
    return "" if left is None else f"[{left / 60:.1f} min left] "


def start(
    asked: Asked, basis: Basis, folder: Path, *, minutes: float | None, timeout_seconds: float, resume: bool, tell: Tell
) -> Results:
    """Measure what is asked, into the folder. Raises UserError before the first run where that cannot be."""
    _check(asked, basis)
    results = opened(folder, asked, conditions_of(basis), resume=resume)
    ensure_corpus(basis.corpus, tell=tell)
    if results.rows:
        tell(f"{len(results.rows)} rows are there already")
    return Sweep(results, basis, Bench(folder), Clock(minutes), timeout_seconds, tell).run()


def _check(asked: Asked, basis: Basis) -> None:
    """Refuses what could not run before anything does."""
    if {"reference", "plain"} & set(asked.engines) and not (ROOT / "benchmarks" / "baselines").is_dir():
        raise UserError(
            f"--engines {','.join(asked.engines)}: the baselines are in benchmarks/ of a checkout, and {ROOT} is none; "
            "bench in a checkout, or leave --engines out"
        )
    rung = asked.rungs[0]
    for seq_len in asked.lengths or (asked.grain_tokens,):
        plan_of(Case("alst", rung, seq_len, asked.layers[0], "speed"), basis)


def conditions_of(basis: Basis) -> dict[str, Any]:
    """What a figure of this bench has to be read with."""
    return {
        "machine": basis.machine.to_json(),
        "python": sys.version.split()[0],
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "commit": commit(),
        "began": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "load_before": load_average(),
        "data": f"real text, rows of {DOCUMENT_TOKENS:,} tokens in {basis.corpus}; one sample, taken in every step",
        "weights": "random",
        "command": shlex.join(["alst", *sys.argv[1:]]),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def full_layers(basis: Basis) -> int:
    """Of the whole model whose shape is measured."""
    return shape_of(config_of(basis)).num_layers
