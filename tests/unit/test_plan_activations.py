"""The planner's activation bytes against the peak that a tiny model's forward and backward really allocate on the CPU:
`benchmarks/replay.py` says how it is measured."""

import pytest

from benchmarks import replay
from benchmarks.replay import measured
from pipeline.memory.offload import HostStore
from pipeline.plan.host_memory import host_bytes, scratch_bytes
from pipeline.plan.job import JobPlan, plan_job
from pipeline.plan.memory import MOMENTS, Sizes, activation_bytes, activation_moment
from pipeline.plan.offload import offload_of
from pipeline.recipe.load import load

TOKENS = 2048
"""Of a shard: the hidden states are then far larger than the weights, whose gradients ZeRO would take away."""
TOLERANCE = 0.04

CHECKPOINT = "memory.activation_checkpoint"

SIZES = (
    "model.config={vocab_size: 512, hidden_size: 128, intermediate_size: 448, num_hidden_layers: 3}",
    "model.config={num_attention_heads: 4, num_key_value_heads: 2}",
    "model.dtype=bfloat16",
    "memory.tiled_loss={tile_tokens: 64}",
    "memory.tiled_mlp={tile_tokens: 128}",
    "memory.tiled_norm={tile_tokens: 128}",
    "memory.activation_checkpoint={offload: null}",
    "train.self_check=null",
    "evaluation=null",
)


def planned(*overrides: str, sp: int = 1) -> JobPlan:
    mesh = (f"hardware.gpus_per_node={sp}", f"parallel.sp={sp}", f"data.seq_len={TOKENS * sp}")
    return plan_job(load("tiny", overrides=[*SIZES, *mesh, *overrides]))


@pytest.fixture
def group_of_two():
    with replay.group_of_two():
        yield


CASES = {
    "every feature": (),
    "no tiled norms": ("memory.tiled_norm=null",),
    "no checkpoints, no tiled norms": ("memory.activation_checkpoint=null", "memory.tiled_norm=null"),
    "no tiled MLP": ("memory.tiled_mlp=null",),
    "no tiled loss": ("memory.tiled_loss=null",),
    "no checkpoints": ("memory.activation_checkpoint=null",),
    "no checkpoints, no tiled MLP": ("memory.activation_checkpoint=null", "memory.tiled_mlp=null"),
    "nothing": (
        "memory.activation_checkpoint=null",
        "memory.tiled_norm=null",
        "memory.tiled_mlp=null",
        "memory.tiled_loss=null",
    ),
    "as many KV heads": ("model.config={num_key_value_heads: 4}",),
    "narrow attention": ("model.config={head_dim: 16, num_key_value_heads: 1}",),
    "wide attention": ("model.config={head_dim: 96}",),
    "large vocabulary, no tiled loss": ("model.config={vocab_size: 4096}", "memory.tiled_loss=null"),
    "more layers": ("model.config={num_hidden_layers: 6}",),
    "float32": ("model.dtype=float32",),
    "groups": (f"{CHECKPOINT}={{layers_per_group: 2}}",),
    "one group": (f"{CHECKPOINT}={{layers_per_group: 8}}",),
    "kept attention": (f"{CHECKPOINT}={{keep_attention: true}}",),
    "kept attention, groups": (f"{CHECKPOINT}={{keep_attention: true, layers_per_group: 2}}",),
    "offload": (f"{CHECKPOINT}={{offload: cpu}}",),
    "offload, groups": (f"{CHECKPOINT}={{offload: cpu, layers_per_group: 2}}",),
    "offload, kept attention": (f"{CHECKPOINT}={{offload: cpu, keep_attention: true}}",),
    "offload, both": (  # of four layers: the planner counts a group of two beside another one
        f"{CHECKPOINT}={{offload: cpu, keep_attention: true, layers_per_group: 2}}",
        "model.config={num_hidden_layers: 4}",
    ),
    "offload, all stay but one": (f"{CHECKPOINT}={{offload: cpu, resident_groups: 2}}",),
    "offload, all stay": (f"{CHECKPOINT}={{offload: cpu, resident_groups: 3, keep_attention: true}}",),
    "offload, some groups stay": (
        f"{CHECKPOINT}={{offload: cpu, resident_groups: 2, keep_attention: true, layers_per_group: 2}}",
        "model.config={num_hidden_layers: 8}",
    ),
    "offload to disk": (f"{CHECKPOINT}={{offload: disk, disk_groups: 2, resident_groups: 1}}",),
    "offload in fp8": (f"{CHECKPOINT}={{offload: cpu, offload_dtype: fp8}}",),
    "offload in fp8, kept attention, some stay": (
        f"{CHECKPOINT}={{offload: cpu, offload_dtype: fp8, keep_attention: true, resident_groups: 2}}",
    ),
    "qwen3": ("model.config={model_type: qwen3, head_dim: 32}",),
}


@pytest.mark.parametrize("name", CASES)
def test_the_planned_activations_are_what_a_model_allocates(name):
    plan = planned(*CASES[name])
    peak = measured(plan).peak_bytes
    assert activation_bytes(plan) == pytest.approx(peak, rel=TOLERANCE), activation_moment(plan)


def test_with_a_shared_sequence_too(group_of_two):
    plan = planned(sp=2)
    assert activation_bytes(plan) == pytest.approx(measured(plan).peak_bytes, rel=TOLERANCE), activation_moment(plan)


@pytest.mark.parametrize(
    "settings",
    [
        "",
        "keep_attention: true",
        "keep_attention: true, layers_per_group: 2",
        "resident_groups: 1",
        "keep_attention: true, layers_per_group: 2, resident_groups: 1",
        "resident_groups: 3",
        "offload_dtype: fp8, keep_attention: true, layers_per_group: 2",
    ],
)
def test_what_waits_in_host_memory_is_counted_to_the_byte_and_taken_at_once(settings):
    plan = planned(f"memory.activation_checkpoint={{offload: cpu, {settings}}}")
    store = measured(plan).attached.store
    assert isinstance(store, HostStore)
    host = host_bytes(plan).by_name
    assert store.peak_bytes == host["activation_checkpoint"] + host["kept_attention"]
    assert store.reserved_bytes == offload_of(plan).arena_bytes, "it did not have to grow"


def test_what_waits_on_disk_is_counted_to_the_byte_and_host_memory_holds_the_rest(tmp_path):
    settings = "keep_attention: true, layers_per_group: 2, disk_groups: 2, resident_groups: 1, checksums: true"
    scratch = (f"hardware.scratch={tmp_path}", "model.config={num_hidden_layers: 7}")
    plan = planned(f"memory.activation_checkpoint={{offload: disk, {settings}}}", *scratch)
    store = measured(plan).attached.store
    assert isinstance(store, HostStore)
    host = host_bytes(plan).by_name
    assert store.disk.peak_bytes == scratch_bytes(plan).total > 0
    assert store.peak_bytes == host["activation_checkpoint"] + host["kept_attention"] > 0
    assert store.reserved_bytes == offload_of(plan).arena_bytes
    assert sum(slot.memory.nbytes for slot in store.disk._slots) <= offload_of(plan).staging_bytes


def test_the_cases_meet_the_moments_that_differ():
    assert len({activation_moment(planned(*overrides)) for overrides in CASES.values()}) >= 4 <= len(MOMENTS)


# In chunks, over one document: every chunk but the last then has keys and values that a later one asks for


IN_CHUNKS = (
    "model.config={vocab_size: 64, hidden_size: 128, intermediate_size: 128, num_hidden_layers: 2}",
    "memory.tiled_norm={tile_tokens: 16}",
    "data.seq_len=256",
)


def in_chunks(hidden_states: str, keys_values: str, settings: str = "", *, kept: str = "false") -> JobPlan:
    places = f"hidden_states: {hidden_states}, keys_values: {keys_values}, keep_keys_values: {kept}"
    chunks = f"memory.sequence_chunks={{chunk_tokens: 32, {places}}}"
    return planned(*IN_CHUNKS, f"{CHECKPOINT}={{{settings or 'offload: null'}}}", chunks)


CHUNK_CASES = {
    "on the device": ("gpu", "gpu"),
    "offload, kept attention": ("gpu", "gpu", "offload: cpu, resident_groups: 0, keep_attention: true"),
    "hidden states on the host": ("cpu", "gpu", "offload: cpu"),
    "keys and values, too; groups": ("cpu", "cpu", "offload: cpu, layers_per_group: 2"),
}


@pytest.mark.parametrize("name", CHUNK_CASES)
def test_in_chunks_the_plan_is_what_is_allocated_and_host_memory_is_counted_to_the_byte(name):
    plan = in_chunks(*CHUNK_CASES[name])
    found, at = measured(plan, document=plan.seq_len), Sizes(plan)
    on_cpu_as_well = 2 * 2 * at.shape.head_dim * (plan.seq_len - plan.local_chunk_tokens)  # cosines and sines
    expected = activation_bytes(plan) + (on_cpu_as_well if at.hidden_on_host else 0)
    assert expected == pytest.approx(found.peak_bytes, rel=TOLERANCE), activation_moment(plan)
    told, arenas = offload_of(plan), found.attached.arenas
    reserved = [told.hidden_states_bytes, told.keys_values_bytes]
    assert [arena.reserved_bytes for arena in arenas] == [size for size in reserved if size], "none had to grow"
    rotary = 2 * 2 * at.shape.head_dim * plan.seq_len if at.hidden_on_host else 0
    host = host_bytes(plan).by_name
    held = sum(arena.peak_bytes for arena in arenas) + found.attached.store.peak_bytes
    planned_bytes = host["activation_checkpoint"] + host["kept_attention"] + host["sequence_chunks"] - rotary
    assert held == planned_bytes


def test_kept_keys_and_values_wait_in_the_store():
    kept, made_again = (
        in_chunks("gpu", "gpu", "offload: cpu, resident_groups: 0", kept=kept) for kept in ("true", "false")
    )
    more = offload_of(kept).arena_bytes - offload_of(made_again).arena_bytes
    keys_values = 2 * 2 * 2 * 64 * 256  # of two layers, two KV heads of 32, bfloat16
    assert host_bytes(kept).by_name["sequence_chunks"] == keys_values
    assert keys_values <= more <= keys_values + 2 * 2 * kept.num_chunks * 512
