"""A length search may use short documents: the bytes of a step do not depend on how a sample is divided."""

import pytest

from benchmarks import replay
from pipeline.plan.job import plan_job
from pipeline.recipe.load import load

SIZES = (
    "model.config={vocab_size: 512, hidden_size: 128, intermediate_size: 448, num_hidden_layers: 2}",
    "model.dtype=bfloat16",
    "memory.tiled_loss={tile_tokens: 64}",
    "memory.tiled_mlp={tile_tokens: 128}",
    "memory.activation_checkpoint={offload: null}",
    "train.self_check=null",
    "evaluation=null",
    "hardware.gpus_per_node=1",
    "data.seq_len=2048",
)


def test_the_peak_of_a_step_is_the_same_for_few_documents_and_for_many(monkeypatch):
    plan = plan_job(load("tiny", overrides=list(SIZES)))
    peaks = {}
    for tokens in (16, 64, 128):
        monkeypatch.setattr(replay, "DOCUMENT", tokens)
        peaks[tokens] = replay.measured(plan).peak_bytes
    # What is left is the CPU kernel's block of scores, which no kernel on a GPU has.
    assert peaks[16] == pytest.approx(peaks[128], rel=0.04), peaks
