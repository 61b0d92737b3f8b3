"""The axes of the parity suite, pair by pair: every value appears, and every pair of values that may stand together.

`make test-full` runs their product, for one architecture in one dtype.
"""

import json
from importlib.metadata import version
from itertools import combinations, product
from typing import Any

import pytest

from pipeline.launch.snapshot import ROOT, commit
from tests.multiprocess.case import CHUNKS, CHUNKS_ON_HOST, FEATURES, Case
from tests.multiprocess.test_parity import CHECKPOINT, check, run

RESULTS = ROOT / "benchmarks" / "results"
AXES: dict[str, tuple[Any, ...]] = {
    "sp": (1, 2, 4, 8),
    "dp": (1, 2),
    "stage": (0, 1, 2, 3),
    "accumulation": (1, 3),
    "features": tuple(FEATURES),
    "reduce_scatter": (True, False),
    "offload_optimizer": ("null", "cpu"),
    "offload_parameters": ("null", "cpu"),
    "dtype": ("float32", "bfloat16"),
    "architecture": ("llama", "llama-one-kv-head", "llama-tied", "qwen3"),
}


def allowed(row: dict[str, Any]) -> bool:
    """Whether the recipe allows these values together, as far as they are chosen."""
    if row.get("sp") == 8 and row.get("dp", 1) != 1:
        return False  # 16 processes on two cores
    if row.get("offload_optimizer") == "cpu" and row.get("stage", 1) == 0:
        return False
    return not (row.get("offload_parameters") == "cpu" and row.get("stage", 3) != 3)


def case_of(row: dict[str, Any]) -> Case:
    return Case(
        architecture=row["architecture"],
        sp=row["sp"],
        dp=row["dp"],
        stage=row["stage"],
        accumulation=row["accumulation"],
        overrides=(
            *FEATURES[row["features"]],
            f"zero.reduce_scatter={str(row['reduce_scatter']).lower()}",
            f"zero.offload_optimizer={row['offload_optimizer']}",
            f"zero.offload_parameters={row['offload_parameters']}",
            f"model.dtype={row['dtype']}",
        ),
    )


def covering_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A few of `rows` that hold every pair of values that any of them holds: greedily the one with most new pairs."""
    bits: dict[frozenset, int] = {}
    pairs_of = []
    for row in rows:
        pairs = (frozenset(pair) for pair in combinations(row.items(), 2))
        pairs_of.append(sum(1 << bits.setdefault(pair, len(bits)) for pair in pairs))
    missing = (1 << len(bits)) - 1
    chosen = []
    while missing:
        best = max(range(len(rows)), key=lambda index: (pairs_of[index] & missing).bit_count())
        chosen.append(rows[best])
        missing &= ~pairs_of[best]
    return chosen


def product_of(axes: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Every allowed row, those with few ranks first: of two equally good ones the cheaper is taken."""
    rows = (dict(zip(axes, values, strict=True)) for values in product(*axes.values()))
    return sorted(filter(allowed, rows), key=lambda row: row["sp"] * row["dp"])


ALL_ROWS = product_of(AXES)
ROWS = covering_rows(ALL_ROWS)
# Of the whole product, what one machine can run in an hour: the model and its dtype stay the same.
FULL_ROWS = product_of(AXES | {"architecture": ("llama",), "dtype": ("float32",)})


def test_every_value_and_every_pair_that_may_stand_together_is_covered():
    for first, second in combinations(AXES, 2):
        for values in product(AXES[first], AXES[second]):
            pair = {first: values[0], second: values[1]}
            if any(pair.items() <= row.items() for row in ALL_ROWS):
                assert any(pair.items() <= row.items() for row in ROWS), pair


# What only many ranks show: sinks of the right heads, KV heads replicated, values of another size, experts.
MANY_RANKS = [
    Case(name, sp=sp, engine=False)
    for name in ("gpt_oss", "gemma2", "deepseek_v3", "mixtral", "qwen2-window")
    for sp in (4, 8)
]
IN_CHUNKS = [
    Case(name, sp=sp, stage=3, accumulation=2, overrides=(chunks,))
    for name in ("gpt_oss", "mistral")
    for sp, chunks in ((4, CHUNKS_ON_HOST), (8, CHUNKS))
]
# All that waits for backward at once: inputs and attention's outputs, of groups, in host memory, on disk, and staying.
KEPT = f"{CHECKPOINT}={{offload: disk, disk_groups: 1, resident_groups: 1, keep_attention: true, checksums: true}}"
IN_GROUPS, ALL_ON_DISK = f"{CHECKPOINT}.layers_per_group=2", f"{CHECKPOINT}={{disk_groups: 3, resident_groups: 0}}"
WAITING = [
    Case("llama-one-kv-head", sp=4, engine=False, overrides=(KEPT,)),
    Case(sp=4, stage=3, accumulation=3, self_check=True, overrides=(KEPT, ALL_ON_DISK)),
    Case(sp=4, stage=1, overrides=(KEPT, IN_GROUPS)),
    Case(sp=2, dp=2, stage=2, accumulation=2, steps=2, overrides=(KEPT, IN_GROUPS, ALL_ON_DISK)),
    Case(sp=2, dp=2, stage=0, overrides=(KEPT,)),
    Case("llama-one-kv-head", sp=8, stage=3, accumulation=3, overrides=(KEPT, IN_GROUPS, ALL_ON_DISK)),
    Case(sp=4, dp=2, stage=2, accumulation=2, self_check=True, overrides=(KEPT,)),
]
CASES = sorted([*map(case_of, ROWS), *MANY_RANKS, *IN_CHUNKS, *WAITING], key=lambda case: case.ranks)


class Launches:
    """Results by number of ranks; each number is launched once, when it is first asked for."""

    def __init__(self, cases: list[Case], folders) -> None:
        self._cases = cases
        self._folders = folders
        self._results: dict[int, dict[str, dict] | AssertionError] = {}

    def of(self, case: Case) -> dict[str, dict]:
        if case.ranks not in self._results:
            cases = [other for other in self._cases if other.ranks == case.ranks]
            folder = self._folders.mktemp(f"pairs{case.ranks}-")
            try:
                self._results[case.ranks] = run(cases, ranks=case.ranks, folder=folder)
            except AssertionError as error:  # a launch that failed is not tried again for each of its cases
                self._results[case.ranks] = error
        results = self._results[case.ranks]
        if isinstance(results, AssertionError):
            raise results
        return results


@pytest.fixture(scope="module")
def launches(tmp_path_factory) -> Launches:
    return Launches(CASES, tmp_path_factory)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pair_by_pair_it_trains_as_the_stock_model(launches, case):
    check(launches.of(case), case)


@pytest.mark.full
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_product_of_all_axes_trains_as_the_stock_model(ranks, tmp_path):
    """For llama in float32; the differences seen are written to benchmarks/results/parity-<ranks>.json."""
    cases = [case for case in map(case_of, FULL_ROWS) if case.ranks == ranks]
    results = run(cases, ranks=ranks, folder=tmp_path)
    seen = {name: {key: result[key] for key in ("loss", "gradient", "rounding")} for name, result in results.items()}
    conditions = {"commit": commit(), "torch": version("torch"), "deepspeed": version("deepspeed")}
    table = {"conditions": conditions | {"transformers": version("transformers")}, "cases": seen}
    (RESULTS / f"parity-{ranks}.json").write_text(json.dumps(table, indent=1) + "\n")
    for case in cases:
        check(results, case)
