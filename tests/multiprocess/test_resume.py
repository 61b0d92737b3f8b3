"""Interrupted and resumed is as if it had not been: bit for bit on the same ranks, within rounding on others."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.multiprocess.case import Case
from tests.multiprocess.ranks import run_ranks
from tests.multiprocess.resume import SAVED_STEP, STEPS
from tests.multiprocess.test_parity import SECONDS_PER_CASE, START_SECONDS

ADAM = "optimizer={name: adamw, lr: 1e-2, weight_decay: 0.1}"
BFLOAT16 = "model.dtype=bfloat16"


def run(cases: list[Case], what: str, *, ranks: int, folder: Path) -> dict[str, dict[str, list[float]]]:
    """The losses of each case's phases, by the case's name."""
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in cases]))
    timeout = START_SECONDS + 2 * SECONDS_PER_CASE * len(cases)
    arguments = (str(folder / "cases.json"), str(folder), what)
    run_ranks("tests.multiprocess.resume", *arguments, ranks=ranks, timeout=timeout, logs=folder)
    return json.loads((folder / f"{what}.json").read_text())


SAME_RANKS = [
    *(Case(sp=2, stage=stage, accumulation=1 + 2 * (stage % 2), overrides=(ADAM,)) for stage in range(4)),
    Case(dp=2, stage=3, accumulation=3, overrides=(ADAM,)),
    Case(dp=2, stage=1, overrides=(ADAM,), self_check=True),
    Case(sp=2, stage=3, overrides=(ADAM,), self_check=True),
    Case(sp=2, stage=3, overrides=(ADAM, BFLOAT16)),
    Case(sp=2, stage=3, overrides=(ADAM, BFLOAT16, "optimizer.states_dtype=bfloat16")),
    Case(sp=2, stage=1, overrides=(ADAM, BFLOAT16)),
    Case(sp=2, stage=0, overrides=(ADAM, BFLOAT16)),
    Case(sp=2, stage=3, overrides=(ADAM, "zero.offload_parameters=cpu")),
    Case("llama-tied", sp=2, stage=2, overrides=(ADAM,)),
    Case("qwen3_moe", sp=2, stage=3, overrides=(ADAM,)),
    Case(sp=2, stage=3, overrides=(ADAM, "checkpoint.asynchronous=false")),
]
ON_HOST = [Case(sp=2, stage=stage, overrides=(ADAM, "zero.offload_optimizer=cpu")) for stage in (1, 3)]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict[str, dict[str, list[float]]]:
    return run(SAME_RANKS, "both", ranks=2, folder=tmp_path_factory.mktemp("resume2-"))


def check_equal(losses: dict[str, list[float]]) -> None:
    assert len(losses["save"]) == STEPS
    assert losses["resume"] == losses["save"][SAVED_STEP:], losses
    assert len(set(losses["save"])) == STEPS, "weights moved in every step"


@pytest.mark.parametrize("case", SAME_RANKS, ids=lambda case: case.name)
def test_on_the_same_ranks_losses_are_the_same_bit_for_bit(two_ranks, case):
    check_equal(two_ranks[case.name])


@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its CPU Adam at first use, with g++")
def test_with_adam_on_the_host_too(tmp_path):
    losses = run(ON_HOST, "both", ranks=2, folder=tmp_path)
    for case in ON_HOST:
        check_equal(losses[case.name])


SAVED = [Case(sp=2, stage=stage, accumulation=2, overrides=(ADAM,)) for stage in range(4)]
"""Two samples a step, whatever the mesh that goes on."""
OTHERS = {
    "one rank": [Case(stage=case.stage, accumulation=2, overrides=(ADAM,)) for case in SAVED],
    "dp instead of sp": [Case(dp=2, stage=case.stage, overrides=(ADAM,)) for case in SAVED],
    "twice the ranks": [Case(sp=2, dp=2, stage=case.stage, overrides=(ADAM,)) for case in SAVED],
    "another stage": [Case(sp=2, accumulation=2, stage=stage, overrides=(ADAM,)) for stage in (0, 2, 1, 3)],
}
SEQ_LEN = "data.seq_len=122"


def with_length(case: Case) -> Case:
    """Every mesh sees the same samples: of one length."""
    return Case(**asdict(case) | {"overrides": (*case.overrides, SEQ_LEN)})


@pytest.mark.parametrize("how", OTHERS)
def test_on_other_ranks_losses_are_the_same_within_rounding(saved, how, tmp_path):
    folder, before = saved
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    cases = [with_length(case) for case in OTHERS[how]]
    after = run(cases, "resume", ranks=cases[0].ranks, folder=tmp_path)
    for case, losses in zip(cases, before.values(), strict=True):
        assert after[case.name]["resume"] == pytest.approx(losses["save"][SAVED_STEP:], rel=2e-5), case.name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved-")
    return folder, run([with_length(case) for case in SAVED], "save", ranks=2, folder=folder)
