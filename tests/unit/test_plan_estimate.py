"""The planner's items at values computed by hand, how they move, and what fits. No torch."""

import pytest

from pipeline.errors import RecipeError
from pipeline.plan import fitted
from pipeline.plan.advice import advise, changed, choose
from pipeline.plan.documents import documents_of
from pipeline.plan.estimate import Estimate, estimate
from pipeline.plan.fit import STEP_TOKENS
from pipeline.plan.hardware import GIB, HARDWARE
from pipeline.plan.host_memory import HOST_ITEMS
from pipeline.plan.job import JobPlan, plan_job
from pipeline.plan.limits import load_of
from pipeline.plan.memory import ACTIVATIONS, MOMENTS, Sizes, gpu_bytes
from pipeline.recipe.load import load
from pipeline.recipe.schema import Gpu

PARAMETERS = 8_029_995_008
"""Of Llama-3.1-8B without its norms: 2 x 128,256 x 4,096 + 32 x (2 x 4,096 x 128 x 40 + 3 x 4,096 x 14,336)."""
TOKENS = 262_144
"""Of a rank: 2,097,152 over 8."""


@pytest.fixture(autouse=True)
def _no_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)


def planned(*overrides: str, recipe: str = "llama8b") -> JobPlan:
    """By hand everything that is offloaded leaves the GPU; what stays is of test_plan_placement."""
    asked = [
        "memory.activation_checkpoint={offload: cpu, keep_attention: false, layers_per_group: 1, resident_groups: 0}"
    ]
    asked += ["data.seq_len=2097152"] if recipe == "llama8b" else []
    return plan_job(load(recipe, overrides=[*asked, *overrides]))


def estimated(*overrides: str, recipe: str = "llama8b") -> Estimate:
    return estimate(planned(*overrides, recipe=recipe))


def at_every_moment(name: str, *overrides: str) -> dict[str, float]:
    """Bytes of an item of the GPU, where there are any."""
    plan = planned(*overrides)
    (item,) = [item for item in gpu_bytes(plan).items if item.name == name]
    return {moment: item.at(moment) for moment in MOMENTS if item.at(moment)}


LOSS, LOSS_BACKWARD, FINAL_NORM, MLP, NORM, ATTENTION = MOMENTS


# Bytes of a GPU


def test_states_are_partitioned_by_the_stage():
    whole = {"zero.offload_optimizer=null"}
    by_stage = {stage: gpu_bytes(planned(*whole, f"zero.stage={stage}")).by_name for stage in (1, 2, 3)}
    assert {stage: found["parameters"] for stage, found in by_stage.items()} == {
        1: 2 * PARAMETERS,
        2: 2 * PARAMETERS,
        3: 2 * PARAMETERS // 8,
    }
    assert {stage: found["gradients"] for stage, found in by_stage.items()} == {
        1: 2 * PARAMETERS,
        2: 4 * PARAMETERS // 8,
        3: 4 * PARAMETERS // 8,
    }
    assert {found["optimizer"] for found in by_stage.values()} == {12 * PARAMETERS // 8}


def test_what_is_offloaded_is_not_on_the_gpu_but_on_the_host():
    there = estimated("zero.offload_parameters=cpu").load
    assert [there.gpu.by_name[name] for name in ("parameters", "gradients", "optimizer")] == [0, 0, 0]
    assert there.gpu.by_name["activation_checkpoint"] == 2 * TOKENS * 4096  # the next layer's, on its way back
    host = there.host.by_name
    assert host["offloaded_parameters"] == 2 * PARAMETERS
    assert host["optimizer"] == pytest.approx((20 + fitted.constants.host_bytes_per_parameter) * PARAMETERS)
    assert host["activation_checkpoint"] == 256 * 1024 * 2_097_152


def test_narrow_states_halve_the_host():
    wide, narrow = (
        estimated(f"optimizer.states_dtype={dtype}").load.host.by_name["optimizer"] for dtype in ("float32", "bfloat16")
    )
    assert wide - narrow == pytest.approx(10 * PARAMETERS)


def test_the_bytes_of_the_loss():
    head, hidden = 128256 * 4096, TOKENS * 4096
    assert at_every_moment("tiled_loss", "memory.tiled_loss.tile_tokens=2048") == {
        LOSS: 6 * 2048 * 128256 + 3 * 2 * hidden + 6 * head,
        LOSS_BACKWARD: 3 * 2 * hidden + 10 * head,
    }
    whole = at_every_moment("tiled_loss", "memory.tiled_loss=null")
    assert whole[LOSS] == 6 * TOKENS * 128256 + 3 * 2 * hidden + 6 * head


def test_the_bytes_of_the_mlp():
    weights = 3 * 4096 * 14336
    tiled = at_every_moment("tiled_mlp", "memory.tiled_mlp.tile_tokens=16384")
    assert tiled == {MLP: 6 * 2 * 16384 * 14336 + 6 * weights + 2 * TOKENS * 4096}
    assert at_every_moment("tiled_mlp", "memory.tiled_mlp=null") == {MLP: 6 * 2 * TOKENS * 14336}


def test_layer_inputs_on_the_gpu_are_those_of_all_layers_but_the_live_one():
    held = at_every_moment("activation_checkpoint", "memory.activation_checkpoint.offload=null")
    one = 2 * TOKENS * 4096
    assert held == dict.fromkeys((MLP, NORM, ATTENTION), 31 * one) | dict.fromkeys(
        (LOSS, LOSS_BACKWARD, FINAL_NORM), 32 * one
    )


def test_the_bytes_of_attention_with_fewer_kv_heads_than_ranks():
    """At sp = 16 each of the 8 KV heads is held twice."""
    plan = planned("hardware.nodes=2", "data.seq_len=4194304")
    (item,) = [item for item in gpu_bytes(plan).items if item.name == "attention"]
    queries, keys = TOKENS * 4096, TOKENS * 16 * 128
    saved = 2 * 2 * queries + 2 * 2 * keys + 4 * TOKENS * 32
    assert item.at(NORM) == saved + 2 * queries
    flash_2 = 4 * queries + 2 * 2 * queries
    assert item.at(ATTENTION) == saved + 2 * 2 * queries + 2 * 2 * keys + flash_2


def test_the_later_kernels_sum_key_gradients_in_float32_instead():
    def workspace(kernel: str) -> float:
        return at_every_moment("attention", f"model.attention={kernel}")[ATTENTION]

    queries, keys = TOKENS * 4096, TOKENS * 8 * 128
    assert workspace("flash_attention_2") - workspace("flash_attention_3") == 4 * queries - 8 * keys
    assert workspace("auto") == workspace("torch") == workspace("flash_attention_2")


def test_items_add_up_to_the_total_and_the_peak_is_the_largest_moment():
    gpu = gpu_bytes(planned())
    assert sum(gpu.by_name.values()) == gpu.total
    at = Sizes(planned())
    held = {moment: sum(item(at).at(moment) for item in ACTIVATIONS) for moment in MOMENTS}
    assert held[gpu.moment] == max(held.values())
    tensors = gpu.total - sum(gpu.by_name[name] for name in ("communication", "context", "allocator"))
    assert gpu.by_name["allocator"] == pytest.approx(fitted.constants.allocator_reserve * tensors, abs=2)


def test_fragmentation_takes_more_without_expandable_segments():
    off = gpu_bytes(planned("memory.allocator.expandable_segments=false")).by_name["allocator"]
    assert off == pytest.approx(2 * gpu_bytes(planned()).by_name["allocator"], abs=8)


def test_one_gpu_has_no_nccl_and_a_cpu_neither_context_nor_reserve():
    alone = gpu_bytes(planned("hardware.gpus_per_node=1")).by_name
    assert (alone["communication"], alone["context"]) == (0, GIB // 2)
    cpu = gpu_bytes(planned(recipe="tiny")).by_name
    assert [cpu[name] for name in ("communication", "context", "allocator")] == [0, 0, 0]


# Bytes of a host


KEPT_LAYER = 2 * 4096 + 4 * 32
"""Bytes a token of attention's output and log-sum-exp."""


@pytest.mark.parametrize(
    ("settings", "token_bytes"),
    [
        ("keep_attention: true", 32 * (2 * 4096 + KEPT_LAYER)),
        ("layers_per_group: 4", 8 * 2 * 4096),
        ("layers_per_group: 5", 7 * 2 * 4096),
        ("layers_per_group: 99", 2 * 4096),
        ("layers_per_group: 4, keep_attention: true", 8 * 2 * 4096 + 32 * KEPT_LAYER),
    ],
)
def test_what_is_kept_waits_on_the_host(settings, token_bytes):
    host = estimated(f"memory.activation_checkpoint={{{settings}}}").load.host.by_name
    assert host["activation_checkpoint"] + host["kept_attention"] == 2_097_152 * token_bytes
    assert bool(host["kept_attention"]) is ("keep_attention: true" in settings)


def test_on_a_cpu_what_would_lie_on_a_gpu_is_host_memory():
    load_ = estimated(recipe="tiny").load
    assert load_.host.by_name["processes"] > 2 * load_.gpu.total > 0
    assert load_.binding == "host"


def test_disk_holds_the_checkpoints_that_are_kept_and_the_one_being_written():
    disk = estimated("hardware.nodes=2", "checkpoint.keep_last=2", "train.steps=10").disk.by_name
    assert disk["checkpoints"] == 3 * 14 * PARAMETERS // 2
    assert disk["packed_data"] == 4 * 10 * 2_097_152 // 2
    assert estimated("checkpoint=null").disk.by_name["checkpoints"] == 0


# Seconds


def test_what_is_kept_is_not_computed_again_and_what_is_grouped_runs_once_more():
    plain, kept, grouped = (
        estimated("model.attention=flash_attention_3", f"memory.activation_checkpoint={{{settings}}}").seconds.by_name
        for settings in ("keep_attention: false", "keep_attention: true", "layers_per_group: 4")
    )
    forward = 1 / 0.62
    assert kept["attention"] / plain["attention"] == pytest.approx((forward + 2.5 / 0.5) / (2 * forward + 2.5 / 0.5))
    assert grouped["attention"] == plain["attention"]
    assert grouped["matmuls"] > kept["matmuls"] == plain["matmuls"]
    assert plain["offload"] < kept["offload"] + 1e-9  # ZeRO's copies; those of layers hide


def test_attention_runs_forward_twice_and_backward_costs_two_and_a_half():
    seconds = estimated("model.attention=flash_attention_3").seconds
    forward = 2 * 32 * 2_097_152**2 * 4096 / 8
    expected = forward * (2 / (989e12 * 0.62) + 2.5 / (989e12 * 0.50))
    assert seconds.by_name["attention"] == pytest.approx(expected)
    kept = estimated("model.attention=flash_attention_3", "memory.activation_checkpoint=null").seconds
    assert kept.by_name["attention"] == pytest.approx(forward * (1 / (989e12 * 0.62) + 2.5 / (989e12 * 0.50)))


def test_what_is_recomputed_counts_for_hfu_and_not_for_mfu():
    plain = ("memory.tiled_mlp=null", "memory.activation_checkpoint=null")
    off, on = estimated(*plain), estimated()
    assert on.model_flops_per_step == off.model_flops_per_step
    attention = 2 * 32 * 2_097_152**2 * 4096
    layers = 7_504_658_432 - 128256 * 4096
    mlps = 32 * 3 * 4096 * 14336
    again = attention + 2 * 2_097_152 * (layers + mlps)
    assert on.seconds.hardware_flops - off.seconds.hardware_flops == pytest.approx(again)
    assert on.hfu > on.mfu


def test_the_exchange_is_as_large_as_stated_and_leaves_the_node_only_where_it_must():
    inside = estimated().seconds.by_name["exchange"]
    elements = TOKENS * 128 * (2 * 32 + 2 * 8) * 7 / 8
    assert inside == pytest.approx(3 * 2 * elements * 32 / (450e9 * 0.75))
    across = estimated("hardware.nodes=2", "data.seq_len=4194304").seconds.by_name["exchange"]
    elements = TOKENS * 128 * (2 * 32 + 2 * 16) * 8 / 16
    assert across == pytest.approx(3 * 2 * elements * 32 / (50e9 * 0.75))


def test_zero_traffic_hides_behind_a_long_step_and_not_behind_a_short_one():
    assert estimated().seconds.by_name["zero_traffic"] == 0
    short = estimated(
        "data.seq_len=2048", "hardware.nodes=4", "parallel.sp=8", "hardware.fabric_gigabytes_per_second=1"
    )
    assert short.seconds.by_name["zero_traffic"] > 0


def test_keys_of_the_hardware_stand_over_the_profile():
    slow = estimated("hardware.disk_gigabytes_per_second=0.5", "hardware.host_memory_gib=100")
    assert slow.checkpoint_seconds == pytest.approx(14 * PARAMETERS / 0.5e9)
    assert slow.load.hardware.host_memory_bytes == 100 * GIB
    assert not slow.load.fits
    assert slow.load.binding == "host"


def test_a_cpu_has_no_seconds_and_no_mfu():
    found = estimated(recipe="tiny")
    assert (found.seconds, found.mfu, found.hfu, found.tokens_per_second) == (None, None, None, None)


def test_steps_of_a_time_limit_leave_room_to_start_and_to_save():
    found = estimate(planned(), time_limit_seconds=24 * 3600)
    start = 120 + 2 * PARAMETERS / 2e9
    assert found.steps_per_time_limit == int((24 * 3600 - start - found.checkpoint_seconds) / found.seconds.total) > 0
    assert found.least_seconds == start + found.seconds.total + found.checkpoint_seconds
    assert estimate(planned(), time_limit_seconds=60).steps_per_time_limit == 0


def test_a_failure_costs_half_of_what_lies_between_two_saves_and_a_save_and_a_start():
    found = estimated("checkpoint.every_steps=6", "train.steps=100")
    start = 120 + 2 * PARAMETERS / 2e9
    assert found.lost_steps == 3
    assert found.lost_seconds == 3 * found.seconds.total + found.checkpoint_seconds + start
    assert found.to_json()["lost_by_a_failure"] == {"steps": 3, "seconds": found.lost_seconds}
    assert estimated("checkpoint.every_steps=null", "train.steps=100").lost_steps == 50
    assert estimated("checkpoint=null", "train.steps=100").lost_steps == 50
    assert estimated("checkpoint.every_steps=1000", "train.steps=100").lost_steps == 50


# How they move


@pytest.mark.parametrize("gpu", [gpu.value for gpu in Gpu if gpu is not Gpu.CPU])
def test_no_memory_shrinks_and_no_step_gets_shorter_with_the_length(gpu):
    before = None
    for seq_len in (2**14, 2**17, 2**17 + 2048, 2**20, 3 * 2**20, 2**23):
        now = estimated(f"data.seq_len={seq_len}", f"hardware.gpu={gpu}")
        if before is not None:
            assert now.load.gpu.total >= before.load.gpu.total
            assert now.load.host.total >= before.load.host.total
            assert now.seconds.total > before.seconds.total
        before = now


@pytest.mark.parametrize("recipe", ["llama8b", "llama70b", "qwen3-32b"])
def test_more_ranks_for_a_sequence_need_less_of_each(recipe):
    totals = [load_of(planned(f"hardware.nodes={n}", "data.seq_len=2097152", recipe=recipe)) for n in (1, 2, 4)]
    assert [t.gpu.total for t in totals] == sorted((t.gpu.total for t in totals), reverse=True)
    assert [t.host.total for t in totals] == sorted((t.host.total for t in totals), reverse=True)


def test_a_shared_sequence_needs_less_gpu_the_more_share_it():
    totals = [gpu_bytes(planned(f"parallel.sp={sp}")).total for sp in (1, 2, 4, 8)]
    assert totals == sorted(totals, reverse=True)


def test_every_gpu_has_a_profile_and_every_item_a_name_of_its_own():
    assert set(HARDWARE) == set(Gpu)
    found = estimated()
    for items in (found.load.gpu.items, found.load.host.items, found.disk.items, found.seconds.items):
        names = [item.name for item in items]
        assert len(set(names)) == len(names)
    assert len(found.load.host.items) == len(HOST_ITEMS)


# What fits


FITS = [("llama8b", 1), ("llama8b", 4), ("llama70b", 4), ("qwen3-32b", 1), ("tiny", 1)]


@pytest.mark.parametrize(("recipe", "nodes"), FITS)
def test_the_longest_fits_and_one_step_more_does_not(recipe, nodes):
    overrides = (f"hardware.nodes={nodes}", "train.self_check=null")
    found = planned(*overrides, "data.seq_len=auto", recipe=recipe)
    step = STEP_TOKENS * found.sp
    assert found.seq_len % step == 0
    assert load_of(found).fits
    assert not load_of(planned(*overrides, f"data.seq_len={found.seq_len + step}", recipe=recipe)).fits


def test_auto_is_a_number_in_the_plan_and_planned_again_it_is_the_same_plan():
    found = planned("data.seq_len=auto")
    assert found.recipe.data.seq_len == found.seq_len
    assert plan_job(found.recipe) == found
    assert planned(f"data.seq_len={found.seq_len}").packing_key == found.packing_key


def test_where_no_length_fits_the_missing_memory_is_told():
    with pytest.raises(RecipeError) as caught:
        planned("data.seq_len=auto", "hardware.host_memory_gib=100")
    assert "data.seq_len = auto: no length fits" in str(caught.value)
    assert "GiB of host memory are missing" in str(caught.value)
    assert "; `alst plan`" in str(caught.value)


TOO_MUCH = {
    "features off": ("memory={tiled_loss: null, tiled_mlp: null, activation_checkpoint: null}", "zero.stage=1"),
    "one feature off": ("memory.activation_checkpoint=null", "data.seq_len=1048576"),
    "too long": ("data.seq_len=8388608",),
    "small host": ("hardware.host_memory_gib=300",),
    "one old GPU": ("hardware.gpu=A100-40GB", "hardware.gpus_per_node=1"),
    "not shared": ("parallel.sp=1",),
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_advice_that_is_followed_makes_it_fit(name):
    plan = planned(*TOO_MUCH[name])
    assert not load_of(plan).fits
    found = advise(plan)
    steps = [change for change in found if not change.instead]
    assert [change.fits for change in steps] == [False] * (len(steps) - 1) + [True]
    recipe, before = plan.recipe, plan
    for change in steps:
        recipe = changed(recipe, change.changes)
        after = plan_job(recipe, shape=plan.model)
        assert gpu_bytes(before).total - gpu_bytes(after).total == change.frees_gpu_bytes
        before = after
    assert load_of(before).fits
    for change in (change for change in found if change.instead):
        recipe = changed(plan.recipe, [one for step in steps[:-1] for one in step.changes])
        assert load_of(plan_job(changed(recipe, change.changes), shape=plan.model)).fits


def test_the_cheapest_change_comes_first():
    first = advise(planned(*TOO_MUCH["features off"], "data.seq_len=262144"))[0]
    assert first.seconds_per_token_ratio <= 1.0


def test_what_fits_needs_no_advice():
    assert advise(planned()) == ()


def test_chosen_features_fit_and_no_faster_set_of_them_does():
    short = choose(load("llama8b", overrides=["data.seq_len=65536"]), features="auto")
    long = choose(load("llama8b", overrides=["data.seq_len=2883584"]), features="auto")
    assert load_of(short).fits
    assert load_of(long).fits
    assert long.recipe.memory.activation_checkpoint.offload == "cpu"
    everything = estimated("data.seq_len=65536")
    assert estimate(short).seconds.total < everything.seconds.total


def test_no_set_of_features_is_longer_than_the_longest_with_chosen_ones():
    chosen = choose(load("llama8b", overrides=["data.seq_len=auto"]), features="auto")
    assert chosen.seq_len >= planned("data.seq_len=auto").seq_len


def test_a_length_that_no_features_make_fit_is_refused():
    with pytest.raises(
        RecipeError, match=r"fits with no set of features on 1 nodes of 8 H100-80GB; take a shorter one"
    ):
        choose(load("llama8b", overrides=["data.seq_len=67108864"]), features="auto")


@pytest.mark.parametrize(
    ("overrides", "lengths"),
    [
        (("data.packing.longest_document_tokens=1000000",), [1_000_000, 1_000_000, 97_152]),
        (("data.sources.0.max_document_tokens=1048576",), [1_048_576] * 2),
        (("data.packing.longest_document_tokens=9000000",), [2_097_152]),
        (("data.sources.0.max_document_tokens=4096", "data.cross_document_attention=true"), [2_097_152]),
    ],
)
def test_documents_are_as_long_as_the_recipe_lets_them_be(overrides, lengths):
    assert documents_of(planned(*overrides)).sum_len_squared == sum(length**2 for length in lengths)
