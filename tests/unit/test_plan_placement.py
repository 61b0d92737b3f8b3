"""Where checkpoints wait: on the GPU as many as there is room for, told by the same formulas as the plan."""

import pytest

from pipeline.plan.fit import STEP_TOKENS
from pipeline.plan.host_memory import arena_bytes, resident_tensors
from pipeline.plan.job import JobPlan, plan_job
from pipeline.plan.limits import load_of
from pipeline.plan.memory import MOMENTS, Sizes, gpu_bytes
from pipeline.plan.placement import RESIDENT_SHARE
from pipeline.recipe.load import load

CHECKPOINT = "memory.activation_checkpoint"
FIXED = f"{CHECKPOINT}={{offload: cpu, keep_attention: false, layers_per_group: 1}}"


def planned(*overrides: str, recipe: str = "llama8b") -> JobPlan:
    return plan_job(load(recipe, overrides=[FIXED, *overrides]))


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
    assert load_of(short).host.by_name["activation_checkpoint"] == arena_bytes(short) == 0
    assert residents(long) == 0


def test_what_stays_leaves_the_host_and_its_copies_are_not_made():
    asked = (f"{CHECKPOINT}={{layers_per_group: 3, keep_attention: true}}", "data.seq_len=1048576")
    none, four = (planned(*asked, f"{CHECKPOINT}.resident_groups={groups}") for groups in (0, 4))
    one, token = 131072, 2 * 4096
    attention = token + 4 * 32
    stay = one * (4 * token + 11 * attention)  # of 32 layers in groups of three the last group has two
    assert arena_bytes(none) - arena_bytes(four) == stay + 512 * (4 + 2 * 11)
    host = [
        sum(load_of(plan).host.by_name[name] for name in ("activation_checkpoint", "kept_attention"))
        for plan in (none, four)
    ]
    assert host[0] - host[1] == 8 * stay
    assert resident_tensors(four) == 4 + 2 * 11

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
