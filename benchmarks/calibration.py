"""What the planner predicts for the runs that the ALST paper and its recipes report, beside what they measured.

    python benchmarks/calibration.py

fits the constants of plan/fitted.py, says if those there are others, and writes benchmarks/results/calibration.json and
its plot, the tables in docs/calibration.md and README.md, and the line of recipes' heads that says what they are
planned at. Needs no GPU. A test holds all of them to what the planner predicts now. Their code is not this project's:
`predicted` takes the planner's own terms and changes those in which theirs differs (`_theirs`), so that what remains is
the planner's error.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from math import exp, floor, log, log10, sqrt
from pathlib import Path
from statistics import median
from typing import Literal

from pipeline.plan import fitted
from pipeline.plan.estimate import estimate
from pipeline.plan.fit import STEP_TOKENS
from pipeline.plan.hardware import GIB, hardware_of
from pipeline.plan.host_memory import host_bytes
from pipeline.plan.job import JobPlan, plan_job
from pipeline.plan.limits import load_of
from pipeline.plan.memory import LOSS, MOMENTS, GpuBytes, Sizes, allocator, gpu_bytes
from pipeline.plan.model_shape import ModelShape, model_shape
from pipeline.plan.terms import Item, Term
from pipeline.recipe.load import load
from pipeline.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "calibration.json"
PLOT = RESULTS.with_suffix(".png")
DOCS = ROOT / "docs" / "calibration.md"
README = ROOT / "README.md"
RECIPES = ROOT / "configs" / "alst"
PLANNED = "# Planned here:"
BEGIN, END = "<!-- calibration: begin -->\n", "<!-- calibration: end -->\n"

RATES = ("attention_backward", "host_update_rate")
"""The constants that are fitted to seconds."""

OUTSIDE = ("communication", "context", "allocator")
"""Items that are no tensors."""


@dataclass(frozen=True)
class Run:
    """A run that was reported: its recipe under configs/alst/, and what was measured of it."""

    recipe_name: str
    gib: float | None = None
    """Peak of a GPU. Most are marked as the driver's, and all are read so: what torch does not count is in them."""
    seconds: int | None = None
    """Of an iteration."""
    tokens: int = 0
    """Of the samples, where they are not the recipe's."""
    stopped_by: str = "memory"
    """What kept them from longer samples."""
    kernel: Literal["flash_attention", "sdpa"] = "flash_attention"

    @cached_property
    def recipe(self) -> Recipe:
        return load(f"alst/{self.recipe_name}")

    @cached_property
    def shape(self) -> ModelShape:
        return model_shape(self.recipe.model)

    @property
    def length(self) -> int:
        return self.tokens or int(self.recipe.data.seq_len)

    @property
    def sp(self) -> int:
        return int(self.recipe.parallel.sp)

    @cached_property
    def features(self) -> str:
        """By their letters: tiled Loss, tiled MLP, Offload of layer inputs, Parameter offload."""
        memory = self.recipe.memory
        offloaded = memory.activation_checkpoint is not None and memory.activation_checkpoint.offload is not None
        told = {"L": memory.tiled_loss, "M": memory.tiled_mlp, "O": offloaded, "P": self.recipe.zero.offload_parameters}
        return "".join(letter for letter, feature in told.items() if feature)

    def plan(self, tokens: int) -> JobPlan:
        """At the next length that this run's group divides."""
        data = self.recipe.data.model_copy(update={"seq_len": -(-tokens // self.sp) * self.sp})
        return plan_job(self.recipe.model_copy(update={"data": data}), shape=self.shape)


REPORTED = (
    Run("h100-sp1-llama-8b-baseline", gib=71.91, tokens=32_768),
    Run("h100-sp1-llama-8b-baseline"),
    Run("h100-sp1-llama-8b", seconds=1010, stopped_by="an illegal access in a kernel, at 555,000"),
    Run("h100-sp1-qwen3-32b"),
    Run("h200-sp1-llama-8b-baseline", gib=137.36),
    Run("h200-sp1-llama-8b-liger", gib=134.96),
    Run("h200-sp1-llama-8b-liger-offload", gib=126.81),
    Run("h200-sp1-llama-8b-liger-offload-tiled-mlp", gib=136.15),
    Run("h100-sp8-llama-8b-no-ulysses-no-liger-no-extras", seconds=17),
    Run("h100-sp8-llama-8b-no-ulysses-yes-liger-no-extras", seconds=123),
    Run("h100-sp8-llama-8b-no-mlp-no-act-offload", seconds=564),
    Run("h100-sp8-llama-8b-yes-mlp", seconds=703, kernel="sdpa"),
    Run("h100-sp8-llama-8b-yes-act-offload", seconds=2610),
    Run("h100-sp8-llama-8b", seconds=6455),
    Run("h100-sp8-llama-70b"),
    Run("h100-sp8-qwen3-32b"),
    Run("h100-sp16-llama-8b"),
    Run("h100-sp16-llama-70b"),
    Run("h100-sp16-qwen3-32b"),
    Run("h100-sp32-llama-8b-baseline", stopped_by="the same length as on one GPU, to compare"),
    Run("h100-sp32-llama-8b", seconds=26709),
    Run("h100-sp32-llama-70b", gib=47.70),
    Run("h100-sp32-qwen3-32b", gib=71.55),
    Run("h100-sp64-llama-70b", gib=53.83),
    Run("h100-sp64-qwen3-32b", gib=71.00),
)
"""ALST, arXiv 2506.13996, and the recipes of ArcticTraining with their comments."""


# Their code, where it differs


def _theirs(plan: JobPlan, run: Run) -> GpuBytes:
    """The planner's terms as their code would have them.

    - Liger's RMSNorm keeps its input and output, as a tiled one does, and has no float32 copies of a tile either.
    - Liger's SwiGLU, which they use where the MLP is not tiled, keeps gate and up and works in place; beside them are
      the product and its gradient.
    - Without Liger's loss, transformers' own: bfloat16 logits, float32 log-softmax, and the gradients of both.
    - With torch's scaled_dot_product_attention, transformers repeats keys and values for every query head; they and
      their gradients are what the planner counts for keys and values, that many times.
    """
    ours = [item for item in gpu_bytes(plan).items if item.name != "allocator"]
    items = [replace(item, terms=tuple(_their_terms(item, run, Sizes(plan)))) for item in ours]
    allocated = {moment: sum(item.at(moment) for item in items if item.name not in OUTSIDE) for moment in MOMENTS}
    peak = max(MOMENTS, key=lambda moment: allocated[moment])
    return GpuBytes((*items, allocator(Sizes(plan), allocated[peak])), peak)


def _their_terms(item: Item, run: Run, at: Sizes) -> Iterator[Term]:
    for part in item.terms:
        if item.name == "tiled_norm" and "L" in run.features and part.what.startswith("float32"):
            continue
        if item.name == "tiled_mlp" and "L" in run.features and "M" not in run.features:
            yield _first_factor(part, 4.0)
        elif item.name == "tiled_loss" and "L" not in run.features and part.when == frozenset((LOSS,)):
            if part.what == "logits":
                yield _first_factor(part, 2.0 + 4.0 + 4.0 + 4.0)
        elif run.kernel == "sdpa" and at.kv_held in part.factors:
            yield replace(part, factors=(*part.factors, ("copies", at.shape.num_query_heads / at.kv_heads)))
        else:
            yield part


def _first_factor(part: Term, value: float) -> Term:
    (name, _), *others = part.factors
    return replace(part, factors=((name, value), *others))


# What is predicted


def _seconds(run: Run) -> float:
    seconds = estimate(run.plan(run.length)).seconds
    assert seconds is not None
    return seconds.total


def _allocated(gpu: GpuBytes) -> float:
    """Bytes of tensors."""
    return sum(size for name, size in gpu.by_name.items() if name not in OUTSIDE)


def _ours_fits(plan: JobPlan, run: Run) -> bool:
    return load_of(plan).fits


def theirs_fits(plan: JobPlan, run: Run) -> bool:
    hardware = hardware_of(plan.recipe.hardware)
    return (
        _theirs(plan, run).total <= (hardware.memory_bytes or 0)
        and host_bytes(plan).total <= hardware.host_memory_bytes
    )


def _most_tokens(run: Run, fits: Callable[[JobPlan, Run], bool]) -> int:
    step = STEP_TOKENS * run.sp
    low, high = 0, 2
    while fits(run.plan(high * step), run):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(run.plan(middle * step), run) else (low, middle)
    return low * step


# The fit


@contextmanager
def planned_with(constants: fitted.Fitted) -> Iterator[None]:
    """Plans in here are made with other constants."""
    before, fitted.constants = fitted.constants, constants
    try:
        yield
    finally:
        fitted.constants = before


def fit(runs: Sequence[Run]) -> fitted.Fitted:
    """The constants that these runs give.

    Bytes are the most with which every run that was reported still fits: first the reserve, then what communication
    takes on several GPUs, and what surrounds the optimizer's states. The two rates make the squares of the steps'
    relative errors least, in turn until neither moves. All to three digits.
    """
    found = replace(fitted.constants, allocator_reserve=0.0, communication_bytes=0.0, host_bytes_per_parameter=0.0)
    for name, group, room in (
        ("allocator_reserve", runs, _room_of_allocated),
        ("communication_bytes", [run for run in runs if run.plan(run.length).world_size > 1], _room_on_gpu),
        ("host_bytes_per_parameter", runs, _room_per_parameter),
    ):
        with planned_with(found):
            found = replace(found, **{name: _rounded_down(min(room(run) for run in group))})
    rates = _rates(tuple(run for run in runs if run.seconds is not None))
    return replace(found, **rates)


@cache
def _rates(runs: tuple[Run, ...]) -> dict[str, float]:
    """Both rates, by runs whose seconds are known."""
    found, before = fitted.constants, None
    while found != before:
        before = found
        for name in RATES:
            found = _least_squares(found, name, runs)
    return {name: getattr(found, name) for name in RATES}


def _room_on_gpu(run: Run) -> float:
    """Bytes left of a GPU."""
    plan = run.plan(run.length)
    return (hardware_of(plan.recipe.hardware).memory_bytes or 0) - _theirs(plan, run).total


def _room_of_allocated(run: Run) -> float:
    """What is left of a GPU, of what torch allocates."""
    return _room_on_gpu(run) / _allocated(_theirs(run.plan(run.length), run))


def _room_per_parameter(run: Run) -> float:
    """Bytes left of a node's memory, for each parameter whose states it keeps."""
    plan = run.plan(run.length)
    kept = plan.model.total_parameters * plan.recipe.hardware.gpus_per_node / plan.world_size
    return (hardware_of(plan.recipe.hardware).host_memory_bytes - host_bytes(plan).total) / kept


def _rounded_down(value: float) -> float:
    digits = 2 - floor(log10(value))
    return round(floor(value * 10**digits) / 10**digits, digits)


def _least_squares(constants: fitted.Fitted, name: str, runs: Sequence[Run]) -> fitted.Fitted:
    """With the value of one constant that errs least, by golden section in its logarithm."""

    def error(value: float) -> float:
        with planned_with(replace(constants, **{name: value})):
            return sum(log(_seconds(run) / (run.seconds or 1)) ** 2 for run in runs)

    low, high = log(getattr(constants, name) / 4), log(getattr(constants, name) * 4)
    ratio = (sqrt(5) - 1) / 2
    while high - low > 1e-4:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if error(exp(left)) < error(exp(right)) else (left, high)
    return replace(constants, **{name: float(f"{exp((low + high) / 2):.3g}")})


# The tables


@dataclass(frozen=True)
class Row:
    """One comparison. What is predicted is for their code, but for `ours`."""

    run: str
    tokens: int
    features: str
    what: str
    measured: float
    predicted: float
    left_out: float
    """Predicted with constants that were fitted to the other runs."""
    ours: float
    """This project's, with their features."""
    stopped_by: str

    @property
    def error(self) -> float:
        """Of what was predicted without it."""
        return self.left_out / self.measured - 1


def rows() -> list[Row]:
    return [row for run in REPORTED for row in _rows(run)]


def _rows(run: Run) -> Iterator[Row]:
    def row(what: str, measured: float, value: Callable[[], float], ours: float) -> Row:
        predicted = value()
        with planned_with(others):
            left_out = value()
        told = (run.recipe_name, run.length, run.features or "-", what, measured)
        return Row(*told, round(predicted, 2), round(left_out, 2), round(ours, 2), run.stopped_by)

    others, plan = fit([other for other in REPORTED if other is not run]), run.plan(run.length)
    if run.seconds is not None:
        yield row("seconds", run.seconds, lambda: _seconds(run), _seconds(run))
    if run.gib is not None:
        yield row("GiB", run.gib, lambda: _theirs(plan, run).total / GIB, gpu_bytes(plan).total / GIB)
    if not run.tokens:
        longest = _most_tokens(run, _ours_fits)
        yield row("tokens", run.length, lambda: _most_tokens(run, theirs_fits), longest)


def as_json(found: list[Row]) -> list[dict[str, object]]:
    return [asdict(row) | {"error": round(row.error, 3)} for row in found]


def as_tables(found: list[Row]) -> str:
    lines = []
    for what, title in (
        ("seconds", "Seconds of a step"),
        ("GiB", "Peak of a GPU, GiB"),
        ("tokens", "Longest sequence, tokens"),
    ):
        asked = [row for row in found if row.what == what]
        counted = sorted(abs(row.error) for row in asked if what != "tokens" or row.stopped_by == "memory")
        worst = f"median error {median(counted):.0%}, worst {counted[-1]:.0%}"
        lines += [f"### {title}", "", f"{len(counted)} runs, each left out of the fit: {worst}.", ""]
        lines += ["| recipe | tokens | features | measured | predicted | left out | error | this project |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for row in asked:
            values = [_number(value) for value in (row.measured, row.predicted, row.left_out)]
            note = "" if what != "tokens" or row.stopped_by == "memory" else " \\*"
            cells = [
                f"`{row.run}`",
                f"{row.tokens:,}",
                row.features,
                *values,
                f"{row.error:+.0%}{note}",
                _number(row.ours),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def as_constants(constants: fitted.Fitted) -> str:
    lines = ["| constant | value | what it is |", "|---|---|---|"]
    for name, value in asdict(constants).items():
        lines.append(f"| `{name}` | {value:g} | {MEANING[name]} |")
    return "\n".join(lines)


MEANING = {
    "attention_backward": "share of the bf16 peak that flash-attn 2's backward reaches on H100; by the steps' seconds",
    "host_update_rate": "bytes per second of a node's CPU Adam with what surrounds it; by the steps' seconds",
    "allocator_reserve": "of what torch allocates, lost between blocks or not counted; by all runs",
    "communication_bytes": "of a GPU, taken by NCCL; by the runs on several",
    "host_bytes_per_parameter": "of host memory, beside the optimizer's states that are kept there; by all runs",
}


def _number(value: float) -> str:
    return f"{value:,.1f}" if value < 200 and value != int(value) else f"{value:,.0f}"


def with_tables(text: str, found: list[Row]) -> str:
    """The page with its tables replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{as_constants(fitted.constants)}\n\n{as_tables(found)}\n{END}{after}"


def with_planned_lines() -> list[Path]:
    """The recipes whose head says what they are planned at: those of the reference, and ours for clusters."""
    return sorted(path for path in RECIPES.parent.rglob("*.yaml") if f"\n{PLANNED}" in path.read_text(encoding="utf-8"))


def with_planned_line(recipe: Path) -> str:
    """The recipe's file with the line of its head that says what it is planned at."""
    plan = plan_job(load(recipe), shape=model_shape(load(recipe).model))
    found, hardware = load_of(plan), hardware_of(plan.recipe.hardware)
    seconds = estimate(plan).seconds
    assert seconds is not None and hardware.memory_bytes is not None
    gpu = f"{found.gpu.total / GIB:.1f} of {hardware.memory_bytes / GIB:.1f} GiB of a GPU"
    host = f"{found.host.total / GIB:,.0f} of {hardware.host_memory_bytes / GIB:,.0f} GiB of a node"
    fits = "" if found.fits else ": does not fit"
    disk = f", {found.scratch.total / GIB:,.0f} on its disk" if found.scratch.total else ""
    line = f"{PLANNED} {plan.seq_len:,} tokens, {gpu}, {host}{disk}, {seconds.total:,.0f} s a step{fits}."
    return re.sub(rf"^{PLANNED}.*$", line, recipe.read_text(encoding="utf-8"), count=1, flags=re.MULTILINE)


COMPARED = ("sp1-llama-8b", "sp8-llama-8b", "sp16-llama-8b", "sp32-llama-8b", "sp64-llama-70b", "sp64-qwen3-32b")
OURS = {"llama-8b": "llama8b", "llama-70b": "llama70b", "qwen3-32b": "qwen3-32b"}
"""This project's own recipe of a model."""


def as_comparison() -> str:
    """What ALST measured on H100 beside what is predicted of this project, at its lengths and its own."""
    lines = [
        "| H100 | model | ALST: tokens | tokens/s per GPU | here, as long: tokens/s per GPU | with `offload: disk` | "
        "longest: tokens | tokens/s per GPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in COMPARED:
        (run,) = (run for run in REPORTED if run.recipe_name == f"h100-{name}")
        gpus, model = run.sp, name.partition("-")[2]
        measured = "-" if run.seconds is None else _per_gpu(run.length / run.seconds / gpus)
        longest = _ours(run, model, "auto")
        cells = [str(gpus), model, f"{run.length:,}", measured]
        cells += [_rate(_ours(run, model, run.length, offload=offload)) for offload in ("cpu", "disk")]
        lines.append(f"| {' | '.join([*cells, f'{longest.seq_len:,}', _rate(longest)])} |")
    return "\n".join(lines)


def _ours(run: Run, model: str, tokens: int | str, offload: str = "cpu") -> JobPlan:
    asked = ["model.attention=flash_attention_2", f"parallel.sp={run.sp}", f"data.seq_len={tokens}"]
    asked += [
        f"hardware.nodes={run.recipe.hardware.nodes}",
        f"hardware.gpus_per_node={run.recipe.hardware.gpus_per_node}",
    ]
    asked += [f"zero.offload_parameters={run.recipe.zero.offload_parameters or 'null'}"]
    asked += [f"memory.activation_checkpoint.offload={offload}"]
    recipe = load(OURS[model], overrides=asked)
    return plan_job(recipe, shape=run.shape)


def _rate(plan: JobPlan) -> str:
    seconds = estimate(plan).seconds
    assert seconds is not None
    return _per_gpu(plan.seq_len / seconds.total / plan.world_size)


def _per_gpu(tokens: float) -> str:
    return f"{tokens:,.0f}" if tokens >= 100 else f"{tokens:.1f}"


def with_comparison(text: str) -> str:
    """The README with its table replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{as_comparison()}\n\n{END}{after}"


def plot(found: list[Row]) -> None:
    """Predicted over measured, a dot a run: its own error, not that of a fit that has seen it."""
    import matplotlib.pyplot as plt

    kinds = {"seconds": "seconds of a step", "GiB": "peak of a GPU", "tokens": "longest sequence"}
    figure, axes = plt.subplots(1, 3, figsize=(15, 6.5), sharex=True, layout="constrained")
    for axis, (what, title) in zip(axes, kinds.items(), strict=True):
        asked = [row for row in found if row.what == what][::-1]
        colours = ["tab:blue" if what != "tokens" or row.stopped_by == "memory" else "lightgrey" for row in asked]
        axis.axvspan(0.85, 1.15, color="tab:green", alpha=0.12)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.scatter([1 + row.error for row in asked], range(len(asked)), c=colours, zorder=3)
        axis.set_yticks(range(len(asked)), [row.run for row in asked], fontsize=7)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("predicted / measured")
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(PLOT, dpi=110)
    plt.close(figure)


def main() -> None:
    if (best := fit(REPORTED)) != fitted.constants:
        raise SystemExit(f"plan/fitted.py has other constants than the fit: {best}; write them there first")
    found = rows()
    RESULTS.write_text(json.dumps(as_json(found), indent=1) + "\n", encoding="utf-8")
    DOCS.write_text(with_tables(DOCS.read_text(encoding="utf-8"), found), encoding="utf-8")
    for recipe in with_planned_lines():
        recipe.write_text(with_planned_line(recipe), encoding="utf-8")
    README.write_text(with_comparison(README.read_text(encoding="utf-8")), encoding="utf-8")
    plot(found)
    print(as_tables(found))


if __name__ == "__main__":
    main()
