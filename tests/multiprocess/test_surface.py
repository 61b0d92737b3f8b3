"""What surrounds a step, on two real ranks: weight decay, evaluation, losses and gradients that are not finite."""

import json
import math
import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from pipeline.data.pack import pack
from pipeline.data.packed_dataset import PackedDataset
from pipeline.plan.checkpoint_dir import damage, read_checkpoint, step_folders
from tests.multiprocess.parity import VOCAB
from tests.multiprocess.ranks import ROOT, run_ranks
from tests.multiprocess.surface import DECAY, EVALUATED, HELD_OUT, LR, NAN_TOKEN, NOT_FINITE, SEQ_LEN, STEPS
from tests.unit.data_support import corpus_recipe

SECONDS = 1500  # 90 on two free cores; others may want them too
GUILTY = 30  # the document with the token whose embedding is nan
FLOAT32_BOUND = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the two ranks left their results, their weights and their packed data."""
    folder = tmp_path_factory.mktemp("surface")
    dice = random.Random(0)
    corpus = [[dice.randrange(NAN_TOKEN + 1, VOCAB) for _ in range(dice.randrange(5, 60))] for _ in range(60)]
    corpus[GUILTY][1] = NAN_TOKEN
    pack(corpus_recipe(folder, corpus, seq_len=SEQ_LEN), folder / "packed")
    run_ranks("tests.multiprocess.surface", str(folder), ranks=2, timeout=SECONDS, logs=folder)
    return folder


@pytest.fixture(scope="module")
def results(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


pytestmark = pytest.mark.timeout(SECONDS + 60)


ON_PACKED = [f"zero{stage} {mesh}" for stage, mesh in EVALUATED]


def is_spared(name: str) -> bool:
    return "norm" in name or "embed" in name


@pytest.mark.parametrize("case", [*(f"adamw zero{stage}" for stage in range(4)), "sgd zero3 1"])
def test_matrices_decay_and_norms_and_embeddings_do_not(results, case):
    factors = results[f"decay {case}"]
    assert {is_spared(name) for name in factors} == {True, False}
    for name, factor in factors.items():
        assert factor == pytest.approx(1.0 if is_spared(name) else 1 - LR * DECAY, abs=1e-6), name


def test_everything_decays_if_the_recipe_says_so(results):
    for name, factor in results["decay adamw zero3 2"].items():
        assert factor == pytest.approx(1 - LR * DECAY, abs=1e-6), name


@pytest.mark.parametrize("case", [" ".join(overrides) for overrides in NOT_FINITE])
def test_a_gradient_that_is_not_finite_leaves_the_weights_alone_and_the_rank_is_known(results, case):
    found = results[f"not finite {case}"]
    assert found["loss"] == found["grad_norm"] == "nan"
    assert not found["update_applied"]
    assert found["unchanged"]
    assert found["first_not_finite"] == [None, 0]


@pytest.mark.parametrize("case", ON_PACKED)
def test_the_guard_names_the_document_and_lets_the_state_be_saved_aside(folder, results, case):
    found = results[f"guard {case}"]
    name = f"corpus.jsonl:{GUILTY + 1}"
    assert name in found["message"]
    assert "the weights are those before it" in found["message"]
    assert found["saved_aside"] == [found["step"]]
    record = found["record"]
    assert (record["step"], record["loss"], record["update_applied"]) == (found["step"], "nan", False)
    assert {document["name"] for suspect in record["suspects"] for document in suspect["documents"]} == {name}
    for suspect in record["suspects"]:
        assert suspect["sample"] in record["samples"]
        assert f"rank {suspect['rank']}, micro-batch {suspect['micro_batch']}" in found["message"]
        tokens = PackedDataset.open(folder / "packed").read_tokens(suspect["sample"], 0, SEQ_LEN)
        (document,) = suspect["documents"]
        assert tokens[document["start"] + 1] == NAN_TOKEN


@pytest.mark.parametrize("case", ON_PACKED)
def test_a_gradient_that_is_not_finite_though_every_loss_is_names_the_samples_of_the_step(results, case):
    first = results[f"evaluation off {case}"]["samples"][: 4 if case.endswith("dp") else 2]
    assert (
        f"Every rank's loss is finite, so it arose in backward, on samples {first}"
        in results[f"guard {case}"]["backward"]
    )


@pytest.mark.parametrize("case", ON_PACKED)
def test_training_is_the_same_to_the_last_bit_with_and_without_evaluation(results, case):
    off, on = results[f"evaluation off {case}"], results[f"evaluation on {case}"]
    assert len(on["losses"]) == STEPS
    for what in ("losses", "samples", "checksum"):
        assert on[what] == off[what]
    assert not set(on["samples"]) & set(on["held_out"])


@pytest.mark.parametrize("case", ON_PACKED)
def test_the_held_out_loss_is_the_stock_models_whatever_the_mesh(folder, results, case):
    found = results[f"evaluation on {case}"]
    dataset = PackedDataset.open(folder / "packed")
    assert len(found["held_out"]) == HELD_OUT
    assert found["evaluations"][0] == pytest.approx(stock_loss(folder, dataset, found["held_out"]), rel=FLOAT32_BOUND)


def test_the_held_out_loss_follows_the_weights(results):
    for case in ("zero3 sp", "zero3 dp"):
        losses = results[f"evaluation on {case}"]["evaluations"]
        assert len(set(losses)) == STEPS + 1
        assert all(math.isfinite(loss) for loss in losses)


def stock_loss(folder: Path, dataset: PackedDataset, samples: list[int]) -> float:
    """Of transformers' own model in float64, a document at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder / "llama", attn_implementation="eager", dtype=torch.float64)
    total, valid = 0.0, 0
    for sample in samples:
        tokens = torch.from_numpy(dataset.read_tokens(sample, 0, SEQ_LEN).astype("int64"))
        for start, stop in pairwise(dataset.sample(sample).cu_seqlens.tolist()):
            with torch.no_grad():
                logits = model(input_ids=tokens[None, start:stop]).logits[0, :-1]
            total += float(F.cross_entropy(logits, tokens[start + 1 : stop], reduction="sum"))
            valid += stop - start - 1
    return total / valid


def test_a_run_that_meets_nan_ends_and_says_where_and_keeps_what_it_has(folder, tmp_path):
    recipe = {
        "base": str(ROOT / "configs" / "base.yaml"),
        "name": "meets-nan",
        "model": {"name_or_path": str(folder / "llama-with-nan"), "dtype": "float32"},
        "data": {
            "sources": [{"type": "jsonl", "path": str(folder / "corpus.jsonl")}],
            "tokenizer": str(folder / "numbers"),
            "seq_len": SEQ_LEN,
            "seed": 3,  # with which the guilty document is neither held out nor met before an evaluation
        },
        "parallel": {"sp": 1},
        "zero": {"offload_optimizer": None},
        "train": {"steps": 100, "self_check": None, "deterministic": True},
        "evaluation": {"every_steps": 6, "samples": HELD_OUT},
        "checkpoint": {"every_steps": 100},
        "tracking": {"mlflow": False},
        "hardware": {"gpu": "cpu", "gpus_per_node": 2},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "train", str(tmp_path / "recipe.yaml")],
        env=os.environ | {"ALST_RUNS": str(tmp_path / "runs")},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 1, printed
    assert "Traceback" not in printed
    (run,) = (tmp_path / "runs").glob("meets-nan-*")
    (record,) = (run / "nan").iterdir()
    found = json.loads(record.read_text())
    (suspect,) = found["suspects"]
    assert f"rank {suspect['rank']}, micro-batch 0, sample {suspect['sample']}: corpus.jsonl:{GUILTY + 1}" in printed
    assert str(record) in printed
    aside = read_checkpoint(run / "checkpoints" / f"aside-step-{found['step'] - 1:06d}")
    assert str(aside.path) in printed
    assert damage(aside, checksums=True) is None
    assert aside.record.step == found["step"] - 1
    assert step_folders(run / "checkpoints") == [], "nobody resumes from there"
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, found["step"]))
    assert f"held out: {HELD_OUT} samples" in printed
    assert [row["step"] for row in rows if row["eval_loss"] is not None] == list(range(6, found["step"], 6))
    assert len(rows) > 6
    assert (run / "training.png").is_file()
