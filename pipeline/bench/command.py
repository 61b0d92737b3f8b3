"""`alst bench` from its options to its page."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.bench.cases import Basis
from pipeline.bench.corpus import corpus_in
from pipeline.bench.machine import machine_here
from pipeline.bench.options import check_asked, engines_of, layers_of, lengths_of, rung_names, tokens_of
from pipeline.bench.report import write_report
from pipeline.bench.results import Asked
from pipeline.bench.sweep import INTERRUPTED, full_layers, start
from pipeline.plan.run_dir import runs_root


@dataclass(frozen=True)
class Options:
    """As they were written."""

    recipe: str
    overrides: tuple[str, ...]
    lengths: str
    find_max: bool
    rungs: str
    engines: str
    model: str | None
    layers: str
    steps: int
    repeats: int
    most: str
    grain: str


def run_bench(
    options: Options,
    *,
    data: Path | None,
    output: Path | None,
    minutes: float | None,
    timeout_seconds: float,
    resume: bool,
    tell: Callable[[str], None],
) -> Path:
    """Measure, and write the page; its path.

    Raises UserError where something must change first, and KeyboardInterrupt, the page written, if it was interrupted.
    """
    lengths = lengths_of(options.lengths)
    check_asked(lengths, find_max=options.find_max)
    rungs, engines = rung_names(options.rungs), engines_of(options.engines)
    layers = layers_of(options.layers, speed=bool(lengths))
    most = tokens_of(options.most, option="--most")
    grain = tokens_of(options.grain, option="--grain")
    folder = (output or runs_root() / "bench").resolve()
    basis = Basis(
        recipe=options.recipe,
        machine=machine_here(),
        corpus=corpus_in(data, root=folder),
        model=options.model,
        steps=options.steps,
        overrides=options.overrides,
    )
    asked = Asked(
        recipe=options.recipe,
        overrides=options.overrides,
        model=options.model,
        lengths=lengths,
        rungs=rungs,
        engines=engines,
        layers=layers,
        repeats=options.repeats,
        steps=options.steps,
        find_max=options.find_max,
        most_tokens=most,
        grain_tokens=grain,
        full_layers=full_layers(basis),
    )
    results = start(asked, basis, folder, minutes=minutes, timeout_seconds=timeout_seconds, resume=resume, tell=tell)
    page = write_report(results, folder)
    if results.ended == INTERRUPTED:
        raise KeyboardInterrupt
    return page
