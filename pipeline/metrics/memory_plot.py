"""A plan's memory against the length of its samples, item by item, with the limits: `alst plan --plot`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import RecipeError, UserError
from pipeline.files import replaced
from pipeline.plan.fit import STEP_TOKENS
from pipeline.plan.hardware import GIB
from pipeline.plan.job import JobPlan, plan_job
from pipeline.plan.limits import load_of

POINTS = 48
COLORS = (
    *("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#bbbbbb"),  # Paul Tol's bright scheme,
    *("#77aadd", "#99ddff", "#44bb99", "#eedd88", "#ee8866", "#ffaabb", "#dddddd"),  # and his light one
)
FORMATS = ("png", "svg", "pdf")


@dataclass(frozen=True)
class _Curve:
    """One memory at every length; None is no limit."""

    title: str
    columns: Sequence[Mapping[str, int]]
    limit: int | None


def plot_memory(plan: JobPlan, path: Path) -> None:
    """A rank's GPU and a node's host memory up to half again what the plan, or what fits, is long.

    Raises UserError if matplotlib is not installed, or cannot write such a file.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"--plot {path}: matplotlib is not installed ({error}); install alst-pipeline[train]") from None
    suffix = path.suffix.removeprefix(".").lower()
    if suffix not in FORMATS:
        raise UserError(f"--plot {path}: must end in one of {', '.join(FORMATS)}; write e.g. {path.stem}.png")
    fitting = _longest(plan)
    lengths = _lengths(plan, 1.5 * max(plan.seq_len, fitting or 0))
    loads = [load_of(_at(plan, length)) for length in lengths]
    hardware = loads[0].hardware
    curves = (
        _Curve("GPU, a rank", [load.gpu.by_name for load in loads], hardware.memory_bytes),
        _Curve("host, a node", [load.host.by_name for load in loads], hardware.host_memory_bytes),
    )
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    for axes, curve in zip(figure.subplots(1, 2), curves, strict=True):
        _draw(axes, lengths, curve, planned=plan.seq_len, fitting=fitting)
    gpus = plan.recipe.hardware
    figure.suptitle(f"{plan.recipe.name} on {gpus.nodes} x {gpus.gpus_per_node} {gpus.gpu.value}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as temporary:
            figure.savefig(temporary, format=suffix, dpi=110)
    except OSError as error:
        raise UserError(f"--plot {path}: cannot be written ({error.strerror}); name another file") from None


def _longest(plan: JobPlan) -> int | None:
    """What fits; None if no length does."""
    data = plan.recipe.data.model_copy(update={"seq_len": "auto"})
    try:
        return plan_job(plan.recipe.model_copy(update={"data": data}), shape=plan.model).seq_len
    except RecipeError:
        return None


def _lengths(plan: JobPlan, most: float) -> list[int]:
    step = STEP_TOKENS * plan.sp
    every = max(1, round(most / step / POINTS))
    return [step * every * number for number in range(1, POINTS + 1)]


def _at(plan: JobPlan, length: int) -> JobPlan:
    data = plan.recipe.data.model_copy(update={"seq_len": length})
    return plan_job(plan.recipe.model_copy(update={"data": data}), shape=plan.model)


def _draw(axes: Any, lengths: Sequence[int], curve: _Curve, *, planned: int, fitting: int | None) -> None:
    names = [name for name in curve.columns[0] if any(column[name] for column in curve.columns)]
    layers = [[column[name] / GIB for column in curve.columns] for name in names]
    colors = [COLORS[place % len(COLORS)] for place in range(len(names))]
    axes.stackplot(lengths, layers, labels=[name.replace("_", " ") for name in names], colors=colors, alpha=0.85)
    if curve.limit is not None:
        axes.axhline(curve.limit / GIB, color="black", linewidth=1.2)
        told = f"there is: {curve.limit / GIB:,.0f} GiB"
        axes.annotate(told, (0, curve.limit / GIB), textcoords="offset points", xytext=(4, 3), fontsize=8)
    axes.axvline(planned, color="black", linestyle=":", label=f"planned: {planned:,}")
    if fitting is not None:
        axes.axvline(fitting, color="black", linestyle="--", label=f"longest: {fitting:,}")
    axes.set(title=curve.title, xlabel="tokens per sample", ylabel="GiB", xlim=(0, lengths[-1]))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}M")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7, reverse=True, frameon=False)
