"""A bench as a page: tables in Markdown, and two plots, length against peak memory and against tokens per second."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.bench.extrapolate import Extrapolated, LineOfPeaks, extrapolated, lines_of_peaks
from pipeline.bench.goals import (
    GOAL_GPU,
    GOAL_HIDDEN,
    Against,
    Gain,
    Goal,
    best_against_best,
    goals,
    keep_attention_gains,
    like_against_like,
)
from pipeline.bench.results import Group, Longest, Results, longest_of, speed_groups
from pipeline.bench.trial import PARTS
from pipeline.files import replaced
from pipeline.plan.hardware import GIB

PAGE, MEMORY_PLOT, SPEED_PLOT = "results.md", "memory.png", "speed.png"


def write_report(results: Results, folder: Path) -> Path:
    """The page and its plots beside the results. The plots are left out where matplotlib is missing."""
    page = folder / PAGE
    with replaced(page) as temporary:
        temporary.write_text("\n".join(page_of(results)) + "\n", encoding="utf-8")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return page
    _plot(results, folder / MEMORY_PLOT, Figure, what="memory")
    _plot(results, folder / SPEED_PLOT, Figure, what="speed")
    return page


def page_of(results: Results) -> Iterator[str]:
    """Line by line."""
    groups, searches = speed_groups(results.rows), longest_of(results.rows)
    yield f"# Bench of {results.asked.model or results.asked.recipe}"
    yield from ("", *conditions(results), "")
    if groups:
        yield from ("## Speed", "", _about_speed(results), "", *speed_table(groups), "")
    whole = extrapolated(groups, layers=results.asked.full_layers)
    if whole:
        yield from ("## The whole model, extrapolated", "", *extrapolated_table(whole), "")
    for engine in ("reference", "plain"):
        same, best = like_against_like(groups, engine), best_against_best(groups, engine)
        if same or best:
            yield from (f"## Against {engine}", "", *against_table(same, best), "")
    if gains := keep_attention_gains(groups):
        yield from ("## Attention's output kept, and the ideal", "", *gains_table(gains), "")
    if searches:
        yield from ("## Longest sequences", "", *longest_table(searches), "")
    if lines := lines_of_peaks(groups):
        yield from ("## Longest sequences by the line of peaks, **extrapolated**", "", *peaks_table(lines, results), "")
    if judged(results):
        yield from ("## Goals", "", *goals_table(goals(groups, searches)), "")
    yield from ("## Runs that did not end well", "", *_unhappy(results)) if any(_unhappy(results)) else ()


def judged(results: Results) -> bool:
    """Whether the goals speak of this machine and this model."""
    hidden = {row.plan["model"]["hidden_size"] for row in results.rows if row.plan}
    machine = results.conditions["machine"]
    return machine["gpu"] == GOAL_GPU.value and machine["gpus"] == 1 and hidden == {GOAL_HIDDEN}


def conditions(results: Results) -> Iterator[str]:
    found, asked = results.conditions, results.asked
    machine: Mapping[str, Any] = found["machine"]
    gpu = f"{machine['gpus']} x {machine['gpu_name']}, driver {machine['driver']}" if machine["gpus"] else "no GPU"
    host = f"{machine['cpu']}, {machine['cores']} cores, {machine['host_memory_gib']:.0f} GiB"
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    kernels = ", ".join(sorted({row.attention for row in results.rows if row.attention})) or "none ran"
    layers = f"{_numbers(asked.layers)} of {asked.full_layers} layers"
    yield f"- Machine: {gpu}; {host}; load before {found['load_before']:.1f}."
    yield f"- Code: commit {found['commit']}; Python {found['python']}, {packages}."
    yield f"- When: {found['began']}; ended: {results.ended}."
    yield f"- Model: shapes of {asked.model or asked.recipe}, {layers}, {found['weights']} weights."
    yield f"- Attention kernels: {kernels}."
    yield f"- Data: {found['data']}."
    yield f"- Steps: medians over {asked.steps} a run, after one that is left out; {asked.repeats} runs of each speed."
    yield "- The resolved plan and the command of every run are in results.json."
    yield f"- Again: `{found['command']}`"


def _numbers(values: Sequence[int]) -> str:
    return " and ".join(f"{value:,}" for value in values)


def _about_speed(results: Results) -> str:
    unit = "allocated and reserved by torch on the fullest GPU" if _on_gpu(results) else "resident, largest process"
    return (
        f"One document per sample. Peak: {unit}; host: resident in all processes. MFU is causal, over document "
        "lengths, without what runs again; HFU with it."
    )


def _on_gpu(results: Results) -> bool:
    return bool(results.conditions["machine"]["gpus"])


def speed_table(groups: Sequence[Group]) -> Iterator[str]:
    head = ["tokens", "layers", "features", "tokens/s/GPU", "step s (least-most)"]
    head += [*(part.replace("_", " ") for part in PARTS), "MFU", "HFU", "peak GiB", "reserved", "host", "stall"]
    yield _line(head)
    yield _line(["---"] * len(head))
    for group in groups:
        yield _line([f"{group.seq_len:,}", str(group.layers), group.title, *_speed_cells(group)])


def _speed_cells(group: Group) -> list[str]:
    spread = group.spread
    if not group.ran or spread is None:
        return [f"**{group.outcome.value}**", *[""] * (len(PARTS) + 7)]
    parts = [_seconds(group.median(f"{part}_seconds")) for part in PARTS]
    stall, seconds = group.median("offload_stall_seconds"), group.median("step_seconds") or 1.0
    peak = group.median("peak_device_bytes") or group.median("peak_host_rss_bytes")
    return [
        f"{group.speed:,.0f}",
        f"{seconds:.2f} ({spread[0]:.2f}-{spread[1]:.2f})",
        *parts,
        *(_share(group.median(name)) for name in ("mfu", "hfu")),
        _gib(peak),
        _gib(group.median("peak_device_reserved_bytes")),
        _gib(group.median("host_rss_bytes")),
        _share(None if stall is None else stall / seconds),
    ]


def extrapolated_table(found: Sequence[Extrapolated]) -> Iterator[str]:
    yield _line(["tokens", "features", "layers", "step s", "tokens/s/GPU", "MFU", "**extrapolated** from"])
    yield _line(["---"] * 7)
    for one in found:
        cells = [f"{one.group.seq_len:,}", one.group.title, str(one.layers), f"{one.step_seconds:,.2f}"]
        yield _line([*cells, f"{one.tokens_per_second_per_gpu:,.0f}", _share(one.mfu), one.how])


def against_table(same: Sequence[Against], best: Sequence[Against]) -> Iterator[str]:
    yield _line(["tokens", "layers", "compared", "ours", "theirs", "ratio", "kernels"])
    yield _line(["---"] * 7)
    for pairs, what in ((same, "same features"), (best, "best against best")):
        for pair in pairs:
            rungs = pair.ours.rung if pair.ours.rung == pair.theirs.rung else f"{pair.ours.rung} / {pair.theirs.rung}"
            speeds = [f"{pair.ours.speed:,.0f}", f"{pair.theirs.speed:,.0f}", f"**{pair.ratio:.2f} x**"]
            kernels = " / ".join(group.rows[0].attention or "?" for group in (pair.ours, pair.theirs))
            yield _line([f"{pair.seq_len:,}", str(pair.layers), f"{what}: {rungs}", *speeds, kernels])
    yield ""
    yield "Tokens per second and GPU, medians over repeats that took turns."


def gains_table(gains: Sequence[Gain]) -> Iterator[str]:
    yield _line(["tokens", "layers", "measured", "ideal with this head", "reached", "ideal of many layers"])
    yield _line(["---"] * 6)
    for gain in gains:
        cells = [
            f"{gain.measured:.3f} x",
            f"{gain.ideal:.3f} x",
            f"{gain.reached:.1%}",
            f"{gain.ideal_of_layers:.3f} x",
        ]
        yield _line([f"{gain.seq_len:,}", str(gain.layers), *cells])
    yield ""
    yield "The ideal is (4.5a + 4m) / (3.5a + 4m) by FLOPs; what is measured, keep-attention over tiled-norm."


def longest_table(searches: Sequence[Longest]) -> Iterator[str]:
    yield _line(["features", "layers", "longest tokens", "documents", "peak GiB", "planned", "host GiB", "stopped by"])
    yield _line(["---"] * 8)
    for search in searches:
        title = search.rung if search.engine == "alst" else f"{search.engine}: {search.rung}"
        row = search.row
        if row is None or row.measured is None:
            yield _line([title, str(search.layers), "none ran", "", "", "", "", search.stopped_by])
            continue
        found = row.measured
        peak = _gib(found.peak_device_bytes or found.peak_host_rss_bytes)
        cells = [
            f"{search.seq_len:,}",
            row.documents,
            peak,
            _gib(row.predicted["gpu_bytes"]),
            _gib(found.host_rss_bytes),
        ]
        yield _line([title, str(search.layers), *cells, search.stopped_by])


def peaks_table(lines: Sequence[LineOfPeaks], results: Results) -> Iterator[str]:
    room = (results.conditions["machine"]["gpu_memory_mib"] or 0) * 2**20
    yield _line(["features", "layers", "from tokens", "bytes a token", "GiB at none", "would fill the GPU at"])
    yield _line(["---"] * 6)
    for line in lines:
        told = [f"{line.slope:,.0f}", _gib(line.offset), f"{line.length_at(room):,}" if room else "no GPU"]
        yield _line([line.title, str(line.layers), _numbers(line.lengths), *told])


def goals_table(found: Sequence[Goal]) -> Iterator[str]:
    yield _line(["goal on one H200, Llama-8B shapes", "asked", "found (worst)", ""])
    yield _line(["---"] * 4)
    for goal in found:
        yield _line([goal.what, goal.asked, goal.found or "-", goal.verdict])


def _unhappy(results: Results) -> list[str]:
    return [f"- `{row.key}`: {row.outcome.value}: {row.detail}" for row in results.rows if row.detail]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _gib(count: float | None) -> str:
    return "" if count is None else f"{count / GIB:.2f}"


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _plot(results: Results, path: Path, figure_of: Any, *, what: str) -> None:
    """Lengths against peak memory or speed, a line a feature set; a cross where a run did not end well."""
    figure = figure_of(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for title, points in _series(results, what).items():
        xs, ys = zip(*sorted(points), strict=True)
        axes.plot(xs, ys, marker="o", markersize=4, label=title)
    floor = axes.get_ylim()[0]
    for row in results.rows:
        if row.detail:
            axes.plot([row.case.seq_len], [floor], marker="x", color="tab:red", clip_on=False)
    memory = results.conditions["machine"]["gpu_memory_mib"]
    if what == "memory" and memory is not None:
        axes.axhline(memory / 1024, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1024:g}K")
    axes.set(xlabel="tokens per sample", ylabel="peak GiB" if what == "memory" else "tokens per second and GPU")
    axes.set_title(
        f"{results.asked.model or results.asked.recipe}, {_numbers(results.asked.layers)} layers", fontsize=10
    )
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, frameon=False)
    with replaced(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _series(results: Results, what: str) -> dict[str, list[tuple[int, float]]]:
    """(tokens, value) of the runs that ended well, by feature set; repeats as their median."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in results.rows:
        case, measured = row.case, row.measured
        if row.detail or measured is None or (what == "speed" and case.purpose != "speed"):
            continue
        peak = (measured.peak_device_bytes or measured.peak_host_rss_bytes) / GIB
        value = peak if what == "memory" else measured.tokens_per_second_per_gpu
        engine = "" if case.engine == "alst" else f"{case.engine}: "
        title = f"{engine}{case.rung}, {case.layers} layers"
        found.setdefault(title, {}).setdefault(case.seq_len, []).append(value)
    return {
        title: [(length, statistics.median(values)) for length, values in by_length.items()]
        for title, by_length in found.items()
    }
