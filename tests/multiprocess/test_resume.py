"""Interrupted and resumed is as if it had not been: bit for bit on the same ranks, within rounding on others."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.plan.run_dir import RunDir
from pipeline.train import operators
from pipeline.train.export import export
from tests.multiprocess.case import Case
from tests.multiprocess.ranks import ON_CPU, run_ranks
from tests.multiprocess.resume import SAVED_STEP, STEPS
from tests.multiprocess.test_parity import SECONDS_PER_CASE, START_SECONDS

ADAM = "optimizer={name: adamw, lr: 1e-2, weight_decay: 0.1}"
BFLOAT16 = "model.dtype=bfloat16"
ROPE = "model.config.rope_parameters={rope_type: linear, factor: 4.0, rope_theta: 10000.0}"


def run(
    cases: list[Case], what: str, *, ranks: int, folder: Path, variables: Mapping[str, str] = ON_CPU
) -> dict[str, dict[str, list[float]]]:
    """The losses of each case's phases, by the case's name."""
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in cases]))
    timeout = START_SECONDS + 2 * SECONDS_PER_CASE * len(cases)
    arguments = (str(folder / "cases.json"), str(folder), what)
    run_ranks("tests.multiprocess.resume", *arguments, ranks=ranks, timeout=timeout, logs=folder, variables=variables)
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
    Case(sp=2, stage=3, overrides=(ADAM, ROPE)),
    Case(sp=2, stage=3, overrides=(ADAM, "train.deterministic=true")),
]
ON_HOST = [Case(sp=2, stage=stage, overrides=(ADAM, "zero.offload_optimizer=cpu")) for stage in (1, 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("resume2-")


@pytest.fixture(scope="module")
def two_ranks(folder) -> dict[str, dict[str, list[float]]]:
    return run(SAME_RANKS, "both", ranks=2, folder=folder)


def check_equal(losses: dict[str, list[float]]) -> None:
    assert len(losses["save"]) == STEPS
    assert losses["resume"] == losses["save"][SAVED_STEP:], losses
    assert len(set(losses["save"])) == STEPS, "weights moved in every step"


@pytest.mark.parametrize("case", SAME_RANKS, ids=lambda case: case.name)
def test_on_the_same_ranks_losses_are_the_same_bit_for_bit(two_ranks, case):
    check_equal(two_ranks[case.name])


@pytest.mark.parametrize("case", SAME_RANKS, ids=lambda case: case.name)
def test_an_export_holds_the_weights_that_training_goes_on_with(two_ranks, folder, case, tmp_path):
    run_dir = RunDir(folder / f"run{SAME_RANKS.index(case)}")
    trained = torch.load(run_dir.path / "weights.pt")
    export(run_dir, tmp_path / "out", step=SAVED_STEP)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {name: p.dtype for name, p in loaded.named_parameters()} == {name: p.dtype for name, p in trained.items()}
    assert [name for name, p in loaded.named_parameters() if not torch.equal(p, trained[name])] == []
    scaling = loaded.config.rope_parameters.get("factor") if ROPE in case.overrides else None
    assert scaling == (4.0 if ROPE in case.overrides else None)


@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its CPU Adam at first use, with g++")
def test_with_adam_on_the_host_too_and_a_killed_process_has_left_torchs_lock(tmp_path, monkeypatch):
    monkeypatch.setenv(operators.FOLDER, os.environ.get(operators.FOLDER, operators.default_folder()))
    lock = Path(os.environ[operators.FOLDER]) / "cpu_adam" / operators.TORCHS_LOCK
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    losses = run(ON_HOST, "both", ranks=2, folder=tmp_path)
    for case in ON_HOST:
        check_equal(losses[case.name])


SAVED = [
    *(Case(sp=2, stage=stage, accumulation=2, overrides=(ADAM,)) for stage in range(4)),
    *(Case(sp=2, stage=stage, accumulation=2, overrides=(ADAM, BFLOAT16)) for stage in (1, 3)),
]
"""Two samples a step, whatever the mesh that goes on."""
OTHERS = {
    "one rank": [replace(case, sp=1) for case in SAVED],
    "dp instead of sp": [replace(case, sp=1, dp=2, accumulation=1) for case in SAVED],
    "twice the ranks": [replace(case, dp=2, accumulation=1) for case in SAVED],
    "another stage": [replace(case, stage=stage) for case, stage in zip(SAVED, (0, 2, 1, 3, 2, 3), strict=True)],
}
SEQ_LEN = "data.seq_len=122"


def with_length(case: Case) -> Case:
    """Every mesh sees the same samples: of one length."""
    return replace(case, overrides=(*case.overrides, SEQ_LEN))


@pytest.mark.parametrize("how", OTHERS)
def test_on_other_ranks_losses_are_the_same_within_rounding(saved, how, tmp_path):
    folder, before = saved
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    cases = [with_length(case) for case in OTHERS[how]]
    after = run(cases, "resume", ranks=cases[0].ranks, folder=tmp_path)
    for case, losses in zip(cases, before.values(), strict=True):
        rounding = 1e-2 if BFLOAT16 in case.overrides else 2e-5
        assert after[case.name]["resume"] == pytest.approx(losses["save"][SAVED_STEP:], rel=rounding), case.name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved-")
    return folder, run([with_length(case) for case in SAVED], "save", ranks=2, folder=folder)
