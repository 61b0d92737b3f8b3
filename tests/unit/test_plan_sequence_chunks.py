"""Sequence chunks in recipe and plan: what is refused, how long a chunk is, where what lies."""

import json

import pytest

from pipeline.errors import RecipeError
from pipeline.plan.advice import advise
from pipeline.plan.documents import documents_of
from pipeline.plan.job import JobPlan, plan_job, read_plan
from pipeline.plan.limits import load_of
from pipeline.plan.memory import gpu_bytes
from pipeline.plan.savings import savings
from pipeline.plan.time import step_seconds
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


# Bytes, by hand: Llama-8B on 8 GPUs, 2M tokens, 262,144 a rank, in 32 chunks of 65,536


def in_chunks(hidden_states: str, keys_values: str, *overrides: str, kept: str = "false") -> JobPlan:
    places = f"hidden_states: {hidden_states}, keys_values: {keys_values}, keep_keys_values: {kept}"
    settings = "offload: cpu, keep_attention: false, layers_per_group: 1"
    asked = (f"{CHECKPOINT}={{{settings}}}", f"{CHUNKS}={{chunk_tokens: 65536, {places}}}", "data.seq_len=2097152")
    return planned(*asked, "parallel.sp=8", *overrides)


def test_a_gpu_holds_keys_values_and_sums_of_all_chunks_or_of_two():
    weights = 218_103_808 * 4  # without norms
    for keys_values, chunks in (("gpu", 31), ("cpu", 2)):
        (item,) = (one for one in gpu_bytes(in_chunks("cpu", keys_values)).items if one.name == "sequence_chunks")
        mlp = 3 * 4096 * 14336 * 2
        assert item.at("the backward of a layer's MLP") == chunks * 8192 * 2 * 1024 * (2 + 4) + weights + mlp


def test_host_memory_holds_each_hidden_state_once():
    host = load_of(in_chunks("cpu", "cpu")).host.by_name
    hidden, tokens = 2 * 4096, 2_097_152
    assert host["activation_checkpoint"] == tokens * 32 * hidden
    keys_values = 2 * 1024 * (2 * tokens + 4 * tokens * 31 // 32)
    assert host["sequence_chunks"] == tokens * 3 * hidden + keys_values + tokens * 2 * 2 * 128


def test_each_mode_frees_more_of_the_gpu():
    found = [gpu_bytes(in_chunks(*places)).total for places in (("gpu", "gpu"), ("cpu", "gpu"), ("cpu", "cpu"))]
    assert found == sorted(found, reverse=True)
    assert found[-1] < gpu_bytes(planned("data.seq_len=2097152", "parallel.sp=8")).total


# Seconds


def seconds(plan: JobPlan) -> dict[str, float]:
    found = step_seconds(plan, documents_of(plan))
    assert found is not None
    return {f"{item.name}: {part.what}": part.value for item in found.items for part in item.terms}


def test_keys_and_values_are_projected_once_more_unless_they_are_kept():
    again, kept = (seconds(in_chunks("gpu", "gpu", kept=kept)) for kept in ("false", "true"))
    assert "matmuls: keys and values made again" not in kept
    projection = again["matmuls: keys and values made again"]
    assert projection < 0.04 * (again["matmuls: MLPs"] + again["matmuls: attention's projections"])
    assert projection == pytest.approx(2 * 31 / 32 * 32 * 2 * 4096 * 1024 * 262_144 / (989e12 * 0.6))


def test_what_lies_in_host_memory_is_copied_by_chunk():
    found = seconds(in_chunks("cpu", "cpu"))
    link = 64e9 * 0.75
    assert found["offload: hidden states of layers"] == pytest.approx((2 + 31 / 32 + 3) * 32 * 8192 * 262_144 / link)
    fetched = 32 * (32 * 31 // 2) * 65536 // 8  # keys of earlier chunks, of a rank's heads: all layers, each pair once
    pairs = 2 * 1024 * fetched
    assert found["offload: keys and values, for later chunks"] == pytest.approx(3 * 2 * pairs / link)
    assert found["offload: sums of their gradients, there and back"] == pytest.approx(2 * 4 * pairs / link)


def test_short_documents_fetch_next_to_nothing():
    told = "offload: keys and values, for later chunks"
    long, short = (seconds(in_chunks("cpu", "cpu", *more))[told] for more in ((), (LONGEST,)))
    assert short < long / 500


LONGEST = "data.packing.longest_document_tokens=4096"


# What follows from it


def test_what_does_not_fit_is_advised_to_run_in_chunks():
    (first, *_) = advise(planned("data.seq_len=8388608"))
    assert first.changes[0].startswith("memory.sequence_chunks=") and first.fits


def test_a_saving_for_each_of_its_parts():
    found = {saving.feature: saving for saving in savings(in_chunks("cpu", "cpu", kept="true"))}
    assert found["hidden_states on cpu"].gpu_bytes > 0
    assert found["keys_values on cpu"].gpu_bytes > 0 > found["keys_values on cpu"].host_bytes
    assert found["keep_keys_values"].host_bytes < 0
    assert found["sequence_chunks"].gpu_bytes > found["hidden_states on cpu"].gpu_bytes


def test_auto_keeps_things_as_it_is_fastest():
    plan = planned(f"{CHUNKS}={{}}", "data.seq_len=2097152")
    chunks = plan.recipe.memory.sequence_chunks
    assert chunks is not None

    def total(plan: JobPlan) -> float:
        found = step_seconds(plan, documents_of(plan))
        assert found is not None and load_of(plan).fits
        return found.total

    for places in (("gpu", "gpu"), ("cpu", "gpu"), ("cpu", "cpu")):
        settings = f"hidden_states: {places[0]}, keys_values: {places[1]}, keep_keys_values: false"
        assert total(plan) <= total(planned(f"{CHUNKS}={{{settings}}}", "data.seq_len=2097152"))
