"""The tables of docs/benchmarks.md: the goals beside what the plan expects, what was measured, what is only predicted.

    python benchmarks/page.py

Measured is what lies under benchmarks/results/*/results.json, as `alst bench` or `gpu_kit.py keep` wrote it. Predicted
is the planner's, for machines nobody here has. A test holds the page to both.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from pipeline.bench.cases import Basis, Case, plan_of
from pipeline.bench.goals import GOAL_GPU, KEEP, REFERENCE_ALL, WITHOUT, ideal_keep_attention_ratio
from pipeline.bench.machine import Machine
from pipeline.bench.report import judged
from pipeline.bench.results import Results, read_results
from pipeline.plan.estimate import Estimate, estimate
from pipeline.plan.fit import longest
from pipeline.plan.hardware import GIB, HARDWARE
from pipeline.plan.job import plan_job
from pipeline.recipe.load import load

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"

KERNELS = ("flash_attention_2", "flash_attention_3")
LENGTHS = (2**15, 2**17, 2**18, 2**19)
LAYERS = 32
GPUS = (8, 32, 64)
MODELS = ("llama8b", "llama70b", "qwen3-32b")
COMMON_TOKENS = 2**20

ONE_H200 = Machine(GOAL_GPU, "NVIDIA H200", None, 143771, 1, "", 0, (HARDWARE[GOAL_GPU].host_memory_bytes) / GIB)


def expected(rung: str, tokens: int, kernel: str) -> Estimate:
    """Of the whole Llama-8B in one document on one H200; parameters and optimizer wait on the host: else no room."""
    overrides = (f"model.attention={kernel}", "zero.offload_parameters=cpu")
    basis = Basis("llama8b", ONE_H200, Path("corpus"), "meta-llama/Llama-3.1-8B", 3, overrides)
    return estimate(plan_of(Case("alst", rung, tokens, LAYERS, "speed"), basis))


def goal_rows() -> Iterator[str]:
    yield "| one H200, Llama-8B, one document of | " + " | ".join(f"{tokens // 1024}K" for tokens in LENGTHS) + " |"
    yield "|---" * (1 + len(LENGTHS)) + "|"
    shape = expected(KEEP, LENGTHS[0], KERNELS[0]).plan.model
    ideals = [f"{ideal_keep_attention_ratio(shape, tokens=tokens):.3f}" for tokens in LENGTHS]
    yield f"| kept attention, ideal by FLOPs: (4.5a + 4m)/(3.5a + 4m) | {' | '.join(ideals)} |"
    for kernel in KERNELS:
        gains = [_seconds(WITHOUT, tokens, kernel) / _seconds(KEEP, tokens, kernel) for tokens in LENGTHS]
        yield f"| … as the plan expects it, {kernel} | {' | '.join(f'{gain:.3f}' for gain in gains)} |"
    for kernel in KERNELS:
        shares = [f"{expected(KEEP, tokens, kernel).mfu:.1%}" for tokens in LENGTHS]
        yield f"| MFU as the plan expects it, {kernel} | {' | '.join(shares)} |"
    for kernel in KERNELS:
        bounds = [f"{kernel_bound(tokens, kernel):.1%}" for tokens in LENGTHS]
        yield f"| … {kernel}, if nothing but attention and matmuls took time | {' | '.join(bounds)} |"


def _seconds(rung: str, tokens: int, kernel: str) -> float:
    found = expected(rung, tokens, kernel).seconds
    assert found is not None
    return found.total


def kernel_bound(tokens: int, kernel: str) -> float:
    """MFU at the shares of the peak that the kernel and the matmuls reach, with all else hidden."""
    found = expected(KEEP, tokens, kernel)
    assert found.seconds is not None
    busy = sum(found.seconds.by_name[name] for name in ("attention", "matmuls"))
    assert found.mfu is not None
    return found.mfu * found.seconds.total / busy


def length_lines() -> Iterator[str]:
    """What one H200 holds, the reference's features and this project's, in this project's code."""
    yield "| one H200, Llama-8B, longest by the plan | tokens | binds |"
    yield "|---|---|---|"
    for rung in (REFERENCE_ALL, WITHOUT, "layer-groups", "sequence-chunks", "chunks-on-host"):
        plan = longest(lambda tokens, rung=rung: expected(rung, tokens, KERNELS[0]).plan, sp=1)
        yield f"| {rung} | {plan.seq_len:,} | {estimate(plan).load.binding} |"


def predicted_lines() -> Iterator[str]:
    head = ["H100s", "recipe", "at 1M tokens: s a step", "tokens/s/GPU", "MFU", "longest", "s a step", "tokens/s/GPU"]
    yield f"| {' | '.join([*head, 'binds'])} |"
    yield "|---" * 9 + "|"
    for gpus in GPUS:
        for model in MODELS:
            cells = [str(gpus), model]
            for tokens in (str(COMMON_TOKENS), "auto"):
                found = _estimate(model, gpus, tokens)
                if not found.load.fits:
                    cells += ["does not fit", "", ""]
                    continue
                assert found.seconds is not None
                seconds, speed = found.seconds.total, (found.tokens_per_second or 0.0) / found.plan.world_size
                told = [f"{seconds:,.0f}", _rate(speed)]
                cells += [*told, f"{found.mfu:.1%}"] if tokens != "auto" else [f"{found.plan.seq_len:,}", *told]
            yield f"| {' | '.join([*cells, _estimate(model, gpus, 'auto').load.binding])} |"


@cache
def _estimate(model: str, gpus: int, tokens: str) -> Estimate:
    overrides = [f"hardware.nodes={gpus // 8}", f"data.seq_len={tokens}", "model.attention=flash_attention_2"]
    return estimate(plan_job(load(model, overrides=overrides)))


def _rate(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.1f}"


def measured_lines() -> Iterator[str]:
    found = sorted(RESULTS.glob("*/results.json"))
    if not found:
        yield "No bench is committed yet: not yet measured on a GPU, and a CPU's figures say nothing of one."
        return
    yield "| bench | machine | when | commit | rows | judged by the goals | again |"
    yield "|---" * 7 + "|"
    for path in found:
        yield _measured(path.parent.name, read_results(path))


def _measured(name: str, results: Results) -> str:
    conditions = results.conditions
    machine = conditions["machine"]
    told = (
        f"{machine['gpus']} x {machine['gpu_name']}"
        if machine["gpus"]
        else f"{machine['cpu']}, {machine['cores']} cores"
    )
    ran = sum(not row.detail for row in results.rows)
    cells = [f"[{name}](../benchmarks/results/{name}/results.md)", told, conditions["began"][:16].replace("T", " ")]
    cells += [conditions["commit"], f"{ran} of {len(results.rows)} ended well", "yes" if judged(results) else "no"]
    return f"| {' | '.join([*cells, '`' + conditions['command'] + '`'])} |"


BLOCKS = {
    "goals": lambda: [*goal_rows(), "", *length_lines()],
    "measured": lambda: [*measured_lines()],
    "predicted": lambda: [*predicted_lines()],
}


def with_tables(text: str) -> str:
    """The page with its tables replaced."""
    for name, lines in BLOCKS.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n" + "\n".join(lines()) + f"\n\n{end}{after}"
    return text


def main() -> None:
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
