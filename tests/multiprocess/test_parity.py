"""Loss and every gradient of real multi-process runs equal the stock model's, through DeepSpeed and without it."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.multiprocess.parity import Case
from tests.multiprocess.ranks import run_ranks

FLOAT64_BOUND = 1e-9
ROUNDINGS = 3.0  # float32: within three times the stock model's own rounding
LAUNCH_SECONDS = 600


def check(results: dict[str, dict], case: Case) -> None:
    result = results[case.name]
    bound = max(ROUNDINGS * result["rounding"], 2e-6) if case.engine else FLOAT64_BOUND
    assert result["loss"] <= bound, result
    assert result["gradient"] <= bound, result
    assert not result["zero_gradients"], result


def run(cases: list[Case], *, ranks: int, folder: Path) -> dict[str, dict]:
    cases_path, results_path = folder / "cases.json", folder / "results.json"
    cases_path.write_text(json.dumps([asdict(case) for case in cases]))
    arguments = (str(cases_path), str(results_path))
    run_ranks("tests.multiprocess.parity", *arguments, ranks=ranks, timeout=LAUNCH_SECONDS, logs=folder)
    return json.loads(results_path.read_text())


TWO_RANKS = [
    Case(sp=2, engine=False),
    Case(sp=1, engine=False),
    Case(sp=2, engine=False, overrides=("memory.tiled_mlp=null", "memory.activation_checkpoint=null")),
    Case("llama-one-kv-head", sp=2, engine=False),
    *(Case(sp=sp, stage=stage, accumulation=1 + 2 * (stage % 2)) for sp in (1, 2) for stage in range(4)),
    Case(sp=2, stage=3, accumulation=3, steps=3),
    Case(sp=2, stage=3, overrides=("memory.tiled_loss=null", "memory.activation_checkpoint.offload=null")),
    Case("llama-tied", sp=2, stage=3, accumulation=3),
    Case("qwen3", sp=2, stage=2),
]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict[str, dict]:
    return run(TWO_RANKS, ranks=2, folder=tmp_path_factory.mktemp("parity2"))


@pytest.mark.parametrize("case", TWO_RANKS, ids=lambda case: case.name)
def test_two_ranks_train_as_the_stock_model(two_ranks, case):
    check(two_ranks, case)
