"""Sequence chunks in recipe and plan: what is refused, how long a chunk is, where what lies."""

import json

import pytest

from pipeline.errors import RecipeError
from pipeline.plan.job import JobPlan, plan_job, read_plan
from pipeline.recipe.load import load

CHUNKS = "memory.sequence_chunks"
CHECKPOINT = "memory.activation_checkpoint"


def planned(*overrides: str, recipe: str = "llama8b") -> JobPlan:
    return plan_job(load(recipe, overrides=overrides))


def refusal(*overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        planned(*overrides)
    return str(caught.value)


# What is asked for


def test_a_recipe_may_say_as_little_as_it_likes():
    feature = load("tiny", overrides=[f"{CHUNKS}={{hidden_states: gpu}}"]).memory.sequence_chunks
    assert feature is not None
    assert (feature.chunk_tokens, feature.hidden_states) == ("auto", "gpu")
    assert (feature.keys_values, feature.keep_keys_values) == ("auto", "auto")
    assert load("tiny", overrides=[f"{CHUNKS}={{}}"]).memory.sequence_chunks is not None
    assert load("tiny").memory.sequence_chunks is None


ON_HOST = f"{CHUNKS}={{hidden_states: cpu}}"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ((f"{CHECKPOINT}=null", f"{CHUNKS}={{}}"), "needs activation_checkpoint"),
        ((ON_HOST, f"{CHECKPOINT}.offload=null"), "offload cpu or disk, not null"),
        ((ON_HOST, f"{CHECKPOINT}.offload_dtype=fp8"), "not fp8"),
        ((ON_HOST, f"{CHECKPOINT}.resident_groups=2"), "not 2"),
        ((ON_HOST, "memory.tiled_loss.kernel=liger"), "not liger"),
        ((f"{CHUNKS}.chunk_tokens=0",), "chunk_tokens"),
        ((f"{CHUNKS}.keys_values=disk",), "keys_values"),
    ],
)
def test_what_does_not_go_together_is_refused_with_value_rule_and_remedy(overrides, told):
    said = refusal(*overrides)
    assert told in said
    assert "sequence_chunks" in said


def test_hidden_states_may_lie_on_the_gpu_with_all_of_it():
    for other in (f"{CHECKPOINT}.offload=null", f"{CHECKPOINT}.offload_dtype=fp8", "memory.tiled_loss.kernel=liger"):
        feature = planned(f"{CHUNKS}={{}}", other).recipe.memory.sequence_chunks
        assert feature is not None and feature.hidden_states == "gpu", "auto takes what is allowed"


# How long a chunk is


def test_without_the_feature_there_is_one_chunk():
    plan = planned()
    assert (plan.chunk_tokens, plan.local_chunk_tokens, plan.num_chunks) == (plan.seq_len, plan.local_seq_len, 1)


@pytest.mark.parametrize(
    ("sp", "seq_len", "chunk"),
    [(1, 2**20, 65536), (8, 2**20, 65536), (16, 2**21, 131072), (8, 8192, 8192), (7, 70000 * 7, 65541)],
)
def test_auto_is_64k_tokens_but_at_least_8k_of_a_rank_and_at_most_the_sequence(sp, seq_len, chunk):
    mesh = (f"hardware.gpus_per_node={sp}", f"parallel.sp={sp}", f"data.seq_len={seq_len}")
    heads = (f"model.config.num_attention_heads={4 * sp}", f"model.config.num_key_value_heads={sp}")
    plan = planned(*mesh, *heads, f"model.config.hidden_size={64 * sp}", "train.self_check=null", f"{CHUNKS}={{}}")
    assert plan.chunk_tokens == chunk
    assert plan.local_chunk_tokens * sp == chunk
    assert (plan.num_chunks - 1) * chunk < seq_len <= plan.num_chunks * chunk


def test_a_chunk_that_ranks_cannot_share_is_refused_with_its_neighbours():
    said = refusal(f"{CHUNKS}.chunk_tokens=1001", "parallel.sp=8")
    assert "1001" in said and "1000 or 1008" in said
    assert "use 8 or 8" in refusal(f"{CHUNKS}.chunk_tokens=5", "parallel.sp=8")


def test_a_chunk_longer_than_the_sequence_is_the_sequence():
    plan = planned(f"{CHUNKS}.chunk_tokens=1048576", "data.seq_len=65536")
    assert (plan.chunk_tokens, plan.num_chunks) == (65536, 1)
    assert plan.recipe.memory.sequence_chunks is not None
    assert plan.recipe.memory.sequence_chunks.resolved.chunk_tokens == 65536


def test_a_chunk_shorter_than_an_mlp_tile_is_the_tile():
    plan = planned(f"{CHUNKS}.chunk_tokens=65536", "data.seq_len=1000000", "parallel.sp=8")
    assert (plan.mlp_tile_tokens, plan.num_mlp_tiles, plan.num_chunks) == (8192, 16, 16)
    plan = planned(f"{CHUNKS}.chunk_tokens=400000", "data.seq_len=1000000", "parallel.sp=8")
    assert plan.mlp_tile_tokens == 16384
    assert plan.num_mlp_tiles == 4 + 4 + 2, "50,000, 50,000 and 25,000 tokens of a rank"


def test_a_plan_says_what_auto_stands_for_and_is_read_as_it_was_written(tmp_path):
    plan = planned(f"{CHUNKS}={{}}", "data.seq_len=2097152")
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.to_json()))
    assert read_plan(path) == plan
    raw = json.loads(path.read_text())
    assert raw["num_chunks"] == 32
    assert "auto" not in raw["recipe"]["memory"]["sequence_chunks"].values()
