"""What the planner predicts for the runs that the ALST paper and its recipes report, beside what they measured.

    python benchmarks/calibration.py

writes benchmarks/results/calibration.json and the tables in docs/planner.md. Needs no GPU. A test holds both to what
the planner predicts now. Their code is not this project's: the column `as they ran` takes the planner's own terms and
changes those in which theirs differs (`_theirs`), so that what remains is the planner's error.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

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
DOCS = ROOT / "docs" / "planner.md"
BEGIN, END = "<!-- calibration: begin -->\n", "<!-- calibration: end -->\n"

OUTSIDE = ("communication", "context", "allocator")
"""Items that torch's own peak, which they report, does not count."""


@dataclass(frozen=True)
class Run:
    """A run that was reported. Features by their letters: tiled Loss, tiled MLP, Offload, Parameter offload."""

    model: str
    gpu: str
    gpus: int
    tokens: int
    features: str
    shared: bool = True
    """Ulysses over all GPUs; else each GPU has its own sequence."""
    gib: float | None = None
    """Peak that torch reports."""
    seconds: int | None = None
    """Of an iteration."""

    @property
    def name(self) -> str:
        model = {"llama8b": "Llama-8B", "llama70b": "Llama-70B", "qwen3-32b": "Qwen3-32B"}[self.model]
        return f"{self.gpus}x{self.gpu.partition('-')[0]} {model}"

    @cached_property
    def recipe(self) -> Recipe:
        offload = "cpu" if "O" in self.features else "null"
        return load(
            self.model,
            overrides=[
                f"parallel.sp={self.sp}",
                f"hardware.gpu={self.gpu}",
                f"hardware.gpus_per_node={min(self.gpus, 8)}",
                f"hardware.nodes={max(1, self.gpus // 8)}",
                f"model.attention=flash_attention_{3 if self.gpu.startswith('H200') else 2}",
                f"memory.activation_checkpoint={{offload: {offload}, keep_attention: false, layers_per_group: 1}}",
                "memory.activation_checkpoint.resident_groups=0",
                f"zero.offload_parameters={'cpu' if 'P' in self.features else 'null'}",
                *([] if "L" in self.features else ["memory.tiled_loss=null"]),
                *([] if "M" in self.features else ["memory.tiled_mlp=null"]),
            ],
        )

    @cached_property
    def shape(self) -> ModelShape:
        return model_shape(self.recipe.model)

    @property
    def sp(self) -> int:
        return self.gpus if self.shared else 1

    def plan(self, tokens: int) -> JobPlan:
        """At the next length that this run's group divides."""
        data = self.recipe.data.model_copy(update={"seq_len": -(-tokens // self.sp) * self.sp})
        return plan_job(self.recipe.model_copy(update={"data": data}), shape=self.shape)


H100, H200 = "H100-80GB", "H200-141GB"
REPORTED = (
    Run("llama8b", H100, 1, 32_768, "P", gib=71.91),
    Run("llama8b", H100, 1, 500_000, "LMOP", seconds=1010),
    Run("qwen3-32b", H100, 1, 230_000, "LMOP"),
    Run("llama8b", H200, 1, 65_000, "P", gib=137.36),
    Run("llama8b", H200, 1, 300_000, "LP", gib=134.96),
    Run("llama8b", H200, 1, 650_000, "LOP", gib=126.81),
    Run("llama8b", H200, 1, 1_200_000, "LMOP", gib=136.15),
    Run("llama8b", H100, 8, 32_000, "", shared=False, seconds=17),
    Run("llama8b", H100, 8, 160_000, "L", shared=False, seconds=123),
    Run("llama8b", H100, 8, 1_100_000, "L", seconds=564),
    Run("llama8b", H100, 8, 1_200_000, "LM", seconds=703),
    Run("llama8b", H100, 8, 2_400_000, "LO", seconds=2610),
    Run("llama8b", H100, 8, 3_800_000, "LMO", seconds=6455),
    Run("llama70b", H100, 8, 200_000, "LM"),
    Run("qwen3-32b", H100, 8, 1_550_000, "LMO"),
    Run("llama8b", H100, 16, 8_000_000, "LMO"),
    Run("llama70b", H100, 16, 1_200_000, "LMO"),
    Run("qwen3-32b", H100, 16, 4_000_000, "LMO"),
    Run("llama8b", H100, 32, 15_500_000, "LMO", seconds=26709),
    Run("llama70b", H100, 32, 4_000_000, "LMO"),
    Run("qwen3-32b", H100, 32, 7_000_000, "LMO"),
    Run("llama70b", H100, 64, 10_000_000, "LMO"),
    Run("qwen3-32b", H100, 64, 15_000_000, "LMO"),
)
"""ALST, arXiv 2506.13996, and the recipes of ArcticTraining. Lengths are the longest they reached."""


# Their code, where it differs


def _theirs(plan: JobPlan, run: Run) -> GpuBytes:
    """The planner's terms as their code would have them.

    - Liger's RMSNorm keeps its input and output, as a tiled one does, and has no float32 copies of a tile either.
    - Liger's SwiGLU, which they use where the MLP is not tiled, keeps gate and up and works in place; beside them are
      the product and its gradient.
    - Without Liger's loss, transformers' own: bfloat16 logits, float32 log-softmax, and the gradients of both.
    """
    ours = [item for item in gpu_bytes(plan).items if item.name != "allocator"]
    items = [replace(item, terms=tuple(_their_terms(item, run))) for item in ours]
    allocated = {moment: sum(item.at(moment) for item in items if item.name not in OUTSIDE) for moment in MOMENTS}
    peak = max(MOMENTS, key=lambda moment: allocated[moment])
    return GpuBytes((*items, allocator(Sizes(plan), allocated[peak])), peak)


def _their_terms(item: Item, run: Run) -> Iterator[Term]:
    for part in item.terms:
        if item.name == "tiled_norm" and part.what.startswith("float32"):
            continue
        if item.name == "tiled_mlp" and "M" not in run.features:
            yield _first_factor(part, 4.0)
        elif item.name == "tiled_loss" and part.what == "logits" and "L" not in run.features:
            yield _first_factor(replace(part, when=frozenset((LOSS,))), 2.0 + 4.0 + 4.0 + 4.0)
        else:
            yield part


def _first_factor(part: Term, value: float) -> Term:
    (name, _), *others = part.factors
    return replace(part, factors=((name, value), *others))


# The tables


@dataclass(frozen=True)
class Row:
    """One comparison; `error` is what is predicted for their code over what they measured, less one."""

    run: str
    tokens: int
    features: str
    what: str
    measured: float
    ours: float
    as_they_ran: float

    @property
    def error(self) -> float:
        return self.as_they_ran / self.measured - 1


def rows() -> list[Row]:
    found = []
    for run in REPORTED:
        told = (run.name, run.tokens, run.features or "-")
        plan = run.plan(run.tokens)
        if run.gib is not None:
            ours, theirs = _allocated(gpu_bytes(plan)), _allocated(_theirs(plan, run))
            found.append(Row(*told, "GiB", run.gib, round(ours, 2), round(theirs, 2)))
        if run.seconds is not None:
            seconds = estimate(plan).seconds
            assert seconds is not None
            found.append(Row(*told, "seconds", run.seconds, round(seconds.total, 1), round(seconds.total, 1)))
    return [*found, *(_longest(run) for run in REPORTED if run.gib is None)]


def _allocated(gpu: GpuBytes) -> float:
    """GiB of tensors, as torch reports its peak."""
    return sum(size for name, size in gpu.by_name.items() if name not in OUTSIDE) / GIB


def _longest(run: Run) -> Row:
    def ours(plan: JobPlan) -> bool:
        return load_of(plan).fits

    def theirs(plan: JobPlan) -> bool:
        hardware = hardware_of(plan.recipe.hardware)
        gpu, host = _theirs(plan, run).total, host_bytes(plan).total
        return gpu <= (hardware.memory_bytes or 0) and host <= hardware.host_memory_bytes

    told = (run.name, run.tokens, run.features or "-")
    return Row(*told, "tokens", run.tokens, _most_tokens(run, ours), _most_tokens(run, theirs))


def _most_tokens(run: Run, fits: Callable[[JobPlan], bool]) -> int:
    step = STEP_TOKENS * (run.gpus if run.shared else 1)
    low, high = 0, 2
    while fits(run.plan(high * step)):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(run.plan(middle * step)) else (low, middle)
    return low * step


def as_json(found: list[Row]) -> list[dict[str, object]]:
    return [asdict(row) | {"error": round(row.error, 3)} for row in found]


def as_table(found: list[Row]) -> str:
    lines = []
    for what, title in (
        ("seconds", "Seconds of a step"),
        ("GiB", "Peak that torch reports, GiB"),
        ("tokens", "Longest sequence, tokens"),
    ):
        head = f"| {title} | tokens | features | measured | this project | as they ran | error |"
        lines += [head, "|---|---|---|---|---|---|---|"]
        for row in (row for row in found if row.what == what):
            values = [_number(value) for value in (row.measured, row.ours, row.as_they_ran)]
            lines.append(f"| {row.run} | {row.tokens:,} | {row.features} | {' | '.join(values)} | {row.error:+.0%} |")
        lines.append("")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.2f}" if value < 200 and value != int(value) else f"{value:,.0f}"


def with_tables(text: str, found: list[Row]) -> str:
    """The page with its tables replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{as_table(found)}\n{END}{after}"


def main() -> None:
    found = rows()
    RESULTS.write_text(json.dumps(as_json(found), indent=1) + "\n", encoding="utf-8")
    DOCS.write_text(with_tables(DOCS.read_text(encoding="utf-8"), found), encoding="utf-8")
    print(as_table(found))


if __name__ == "__main__":
    main()
