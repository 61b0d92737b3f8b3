"""Where checkpoints wait: on the GPU as many as there is room for, told by the same formulas as the plan."""

import re
from itertools import pairwise, product

import pytest

from pipeline.errors import RecipeError
from pipeline.plan.advice import advise, choose
from pipeline.plan.estimate import estimate
from pipeline.plan.fit import STEP_TOKENS
from pipeline.plan.job import JobPlan, plan_job
from pipeline.plan.limits import load_of
from pipeline.plan.memory import MOMENTS, Sizes, gpu_bytes, in_host_memory
from pipeline.plan.memory import on_disk as on_disk_terms
from pipeline.plan.offload import offload_of
from pipeline.plan.placement import RESIDENT_SHARE
from pipeline.plan.table import print_plan
from pipeline.recipe.load import load

CHECKPOINT = "memory.activation_checkpoint"
FIXED = f"{CHECKPOINT}={{offload: cpu, keep_attention: false, layers_per_group: 1}}"


def planned(*overrides: str, recipe: str = "llama8b") -> JobPlan:
    length = ["data.seq_len=2097152"] if recipe == "llama8b" else []
    return plan_job(load(recipe, overrides=[FIXED, *length, *overrides]))


def residents(plan: JobPlan) -> int:
    return plan.recipe.memory.activation_checkpoint.resolved.resident_groups


@pytest.mark.parametrize("settings", ["", "keep_attention: true", "layers_per_group: 3, keep_attention: true"])
@pytest.mark.parametrize("seq_len", [3 << 19, 2 << 20])
def test_as_many_groups_stay_as_the_gpu_has_room_for_and_not_one_more(seq_len, settings):
    asked = (f"{CHECKPOINT}={{{settings}}}", f"data.seq_len={seq_len}")
    plan = planned(*asked)
    room = RESIDENT_SHARE * load_of(plan).hardware.memory_bytes
    assert 0 < residents(plan) < Sizes(plan).groups
    assert gpu_bytes(plan).total <= room
    more = planned(*asked, f"{CHECKPOINT}.resident_groups={residents(plan) + 1}")
    assert gpu_bytes(more).total > room


def test_a_short_sequence_stays_and_a_long_one_leaves():
    short, long = planned("data.seq_len=65536"), planned("data.seq_len=4194304")
    assert residents(short) == 32
    assert load_of(short).host.by_name["activation_checkpoint"] == offload_of(short).arena_bytes == 0
    assert residents(long) == 0


def test_what_stays_leaves_the_host_and_its_copies_are_not_made():
    asked = (f"{CHECKPOINT}={{layers_per_group: 3, keep_attention: true}}", "data.seq_len=1048576")
    none, four = (planned(*asked, f"{CHECKPOINT}.resident_groups={groups}") for groups in (0, 4))
    one, token = 131072, 2 * 4096
    attention = token + 4 * 32
    stay = one * (4 * token + 11 * attention)  # of 32 layers in groups of three the last group has two
    assert offload_of(none).arena_bytes - offload_of(four).arena_bytes == stay + 512 * (4 + 2 * 11)
    host = [
        sum(load_of(plan).host.by_name[name] for name in ("activation_checkpoint", "kept_attention"))
        for plan in (none, four)
    ]
    assert host[0] - host[1] == 8 * stay
    assert offload_of(four).resident_tensors == 4 + 2 * 11

    def of_item(plan: JobPlan, moment: str) -> float:
        (item,) = [item for item in gpu_bytes(plan).items if item.name == "activation_checkpoint"]
        return item.at(moment)

    group = one * (token + 3 * attention)
    live = one * 2 * (token + attention)
    for moment in MOMENTS[:3]:
        assert (of_item(none, moment), of_item(four, moment)) == (0, stay)
    for moment in MOMENTS[3:]:
        assert (of_item(none, moment), of_item(four, moment)) == (group + live, 3 * group + live)


def test_what_is_asked_for_stays_and_without_offload_or_gpu_there_is_nothing_to_place():
    assert residents(planned(f"{CHECKPOINT}.resident_groups=3")) == 3
    assert residents(planned(f"{CHECKPOINT}.offload=null", "data.seq_len=65536")) == 0
    assert residents(planned(recipe="tiny")) == 0


def test_planned_again_it_is_the_same_plan_and_a_length_more_does_not_fit():
    plan = planned("data.seq_len=auto", "hardware.host_memory_gib=500")
    assert residents(plan) > 0
    assert plan_job(plan.recipe) == plan
    more = planned(f"data.seq_len={plan.seq_len + STEP_TOKENS * plan.sp}", "hardware.host_memory_gib=500")
    assert not load_of(more).fits


def test_where_host_memory_binds_what_stays_makes_longer_sequences_fit():
    tight = ("data.seq_len=auto", "hardware.host_memory_gib=500")
    assert planned(*tight).seq_len > 1.1 * planned(*tight, f"{CHECKPOINT}.resident_groups=0").seq_len


# On disk


DISK = f"{CHECKPOINT}={{offload: disk, keep_attention: true}}"


def on_disk(plan: JobPlan) -> int:
    return plan.recipe.memory.activation_checkpoint.resolved.disk_groups


@pytest.mark.parametrize(("layers_per_group", "host_memory_gib"), [(1, 300), (1, 400), (3, 450)])
def test_as_few_groups_wait_on_disk_as_host_memory_has_no_room_for(layers_per_group, host_memory_gib):
    asked = (DISK, f"{CHECKPOINT}.layers_per_group={layers_per_group}", "data.seq_len=2097152")
    asked += (f"hardware.host_memory_gib={host_memory_gib}",)
    plan = planned(*asked)
    assert load_of(plan).fits
    assert 0 < on_disk(plan) <= Sizes(plan).sent_groups
    assert not load_of(planned(*asked, f"{CHECKPOINT}.disk_groups={on_disk(plan) - 1}")).fits
    assert plan_job(plan.recipe) == plan


def test_host_memory_that_is_enough_leaves_the_disk_alone():
    plan = planned(DISK, "data.seq_len=3145728", "hardware.host_memory_gib=4000")
    assert on_disk(plan) == load_of(plan).scratch.total == offload_of(plan).disk_bytes == 0


def test_what_waits_on_disk_is_not_in_host_memory_but_for_two_groups_on_their_way():
    asked = (DISK, "data.seq_len=3145728", f"{CHECKPOINT}.resident_groups=0")
    none, ten = (planned(*asked, f"{CHECKPOINT}.disk_groups={groups}") for groups in (0, 10))
    group = 393216 * (4 * 4096 + 4 * 32)
    assert load_of(ten).scratch.total == 10 * 8 * group
    assert load_of(none).host.total - load_of(ten).host.total == 8 * 8 * group
    offload = offload_of(ten)
    assert offload.arena_bytes == 22 * (group + 3 * 512)
    assert (offload.disk_bytes, offload.staging_bytes) == (10 * (group + 3 * 4096), 2 * (group + 3 * 4096))


def test_the_groups_on_disk_are_spread_and_their_tensors_are_known_by_position():
    plan = planned(DISK, "data.seq_len=3145728", f"{CHECKPOINT}.resident_groups=2", f"{CHECKPOINT}.disk_groups=10")
    groups = Sizes(plan).disk_groups
    assert len(groups) == 10
    assert {later - earlier for earlier, later in pairwise(groups)} == {3}
    offload = offload_of(plan)
    assert {position // 3 for position in range(96) if offload.is_on_disk(position)} == set(groups)


@pytest.mark.parametrize(("layers", "size", "sent", "count"), [*product((7, 8), (1, 3), (0, 1, 2), (0, 1, 2, 3))])
def test_every_group_waits_in_one_place(layers, size, sent, count):
    config = f"model.config={{num_hidden_layers: {layers}}}"
    places = f"layers_per_group: {size}, resident_groups: {sent}, disk_groups: {count}"
    at = Sizes(planned(config, f"{CHECKPOINT}={{offload: disk, {places}}}", recipe="tiny"))
    assert len(at.disk_groups) == min(count, at.groups - sent)
    token = at.d * at.shape.hidden_size
    waiting = sum(part.value for part in (*in_host_memory(at), *on_disk_terms(at)))
    assert waiting == token * at.plan.local_seq_len * (at.groups - sent)


def test_a_slow_disk_makes_the_step_longer_and_a_fast_one_hides():
    asked = (DISK, "data.seq_len=1048576", f"{CHECKPOINT}.resident_groups=0", f"{CHECKPOINT}.disk_groups=32")

    def seconds(rate: float) -> float:
        return estimate(planned(*asked, f"hardware.scratch_gigabytes_per_second={rate}")).seconds.by_name["offload"]

    moved = 2 * 32 * 1048576 * (4 * 4096 + 4 * 32)
    compute = sum(estimate(planned(*asked)).seconds.by_name[name] for name in ("attention", "matmuls", "elementwise"))
    assert seconds(100) < seconds(0.5)
    assert seconds(0.5) - seconds(100) == pytest.approx(moved / 0.5e9 - compute)


def test_a_scratch_disk_that_is_too_small_does_not_fit_and_binds():
    plan = planned(DISK, "data.seq_len=3145728", "hardware.host_memory_gib=330", "hardware.scratch_gib=100")
    load = load_of(plan)
    assert not load.fits
    assert load.binding == "scratch"
    assert load.missing_bytes[:2] == (0, 0)


def test_where_host_memory_binds_advice_names_the_disk_and_auto_takes_it_where_nothing_else_fits():
    tight = ("data.seq_len=4194304", "hardware.host_memory_gib=290", f"{CHECKPOINT}.layers_per_group=16")
    plan = planned(*tight)
    assert not load_of(plan).fits
    assert any("offload: disk" in change for advice in advise(plan) for change in advice.changes)
    chosen = choose(load("llama8b", overrides=[*tight]), features="auto")
    assert load_of(chosen).fits
    assert chosen.recipe.memory.activation_checkpoint.offload == "disk"


@pytest.mark.parametrize("offload", ["cpu", "auto"])
def test_groups_on_disk_without_a_disk_are_refused(offload):
    with pytest.raises(RecipeError, match=rf"disk_groups 3 needs offload disk, not {offload}; set offload: disk, or"):
        planned(f"{CHECKPOINT}.disk_groups=3", f"{CHECKPOINT}.offload={offload}")


# `offload: auto`


AUTO = f"{CHECKPOINT}.offload=auto"
SCRATCH = "hardware.scratch=/local"
SCARCE = ("data.seq_len=4194304", "hardware.host_memory_gib=900")


def place(plan: JobPlan) -> str | None:
    return plan.recipe.memory.activation_checkpoint.offload


def seconds_of(plan: JobPlan) -> float:
    found = estimate(plan).seconds
    assert found is not None
    return found.total


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (("data.seq_len=65536",), None),
        (("data.seq_len=4194304",), "cpu"),
        (SCARCE, "disk"),
    ],
    ids=["device", "host", "disk"],
)
def test_auto_takes_the_nearest_place_that_has_room_and_it_is_as_fast_as_any(asked, expected):
    plan = planned(AUTO, SCRATCH, *asked)
    assert place(plan) == expected
    assert load_of(plan).fits
    assert plan_job(plan.recipe) == plan
    for offload in ("null", "cpu", "disk"):
        other = planned(f"{CHECKPOINT}.offload={offload}", SCRATCH, *asked)
        assert not load_of(other).fits or seconds_of(plan) <= seconds_of(other)
        if place(other) == expected:
            assert other == plan


def test_auto_leaves_a_disk_alone_that_nobody_has_named():
    plan = planned(AUTO, *SCARCE)
    assert place(plan) == "cpu"
    assert not load_of(plan).fits


def test_auto_sends_what_would_fill_the_last_tenth_of_a_gpu_while_host_memory_has_room():
    full = planned(f"{CHECKPOINT}.offload=null", "data.seq_len=auto")
    states = load_of(full).host.total / 2**30
    roomy, scarce = (
        planned(AUTO, f"data.seq_len={full.seq_len}", f"hardware.host_memory_gib={gib}") for gib in (1769, states + 1)
    )
    assert place(roomy) == "cpu"
    assert gpu_bytes(roomy).total <= RESIDENT_SHARE * load_of(roomy).hardware.memory_bytes
    assert place(scarce) is None
    assert load_of(scarce).fits


def test_where_nothing_has_room_auto_takes_the_farthest_and_advice_goes_on_from_there():
    for scratch, farthest in (((), "cpu"), ((SCRATCH,), "disk")):
        plan = planned(AUTO, "data.seq_len=8388608", "hardware.host_memory_gib=400", *scratch)
        assert not load_of(plan).fits
        assert place(plan) == farthest
        assert advise(plan)[-1].fits


PLACES = ("null", "cpu", "disk")


def test_with_auto_a_length_fits_that_any_place_fits():
    tight = ("data.seq_len=auto", "hardware.host_memory_gib=500", SCRATCH)
    longest = [planned(f"{CHECKPOINT}.offload={offload}", *tight).seq_len for offload in PLACES]
    assert planned(AUTO, *tight).seq_len == max(longest) == longest[-1]


def test_what_is_stored_in_eight_bits_leaves_the_device():
    plan = planned(AUTO, "data.seq_len=65536", f"{CHECKPOINT}.offload_dtype=fp8")
    assert place(plan) == "cpu"


def test_without_a_gpu_there_is_one_memory_and_all_stays_in_place():
    assert place(planned(AUTO, recipe="tiny")) is None


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (("data.seq_len=65536",), "layer inputs on device"),
        (("data.seq_len=4194304",), "layer inputs in host memory"),
        (
            ("data.seq_len=2097152", "hardware.host_memory_gib=300", f"{CHECKPOINT}.keep_attention=true"),
            r"layer inputs and attention outputs in host memory \(of \d+ layers on disk, of the last \d+ on device\)",
        ),
        (("data.seq_len=4194304", f"{CHECKPOINT}.layers_per_group=2"), "the input of every 2 layers in host memory"),
    ],
)
def test_the_plan_tells_what_auto_has_chosen(asked, told, capsys):
    print_plan(planned(AUTO, SCRATCH, *asked))
    assert re.search(f"for backward +{told}", " ".join(capsys.readouterr().out.split()))


def test_auto_decides_together_with_what_is_kept():
    """Where it is allowed a disk, the faster combination fits: attention's outputs are kept, and some of them there."""
    asked = (AUTO, f"{CHECKPOINT}={{keep_attention: auto, layers_per_group: auto}}", "data.seq_len=3800000")
    without, with_disk = planned(*asked), planned(*asked, SCRATCH)
    assert (place(without), place(with_disk)) == ("cpu", "disk")
    assert seconds_of(with_disk) < 0.85 * seconds_of(without)
