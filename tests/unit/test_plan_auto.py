"""`auto` of what waits for backward: the fastest that fits, told by the same formulas as the plan."""

import pytest

from pipeline.plan.auto import GROUP_SIZES, combinations
from pipeline.plan.documents import documents_of
from pipeline.plan.job import JobPlan, plan_job
from pipeline.plan.limits import load_of
from pipeline.plan.time import step_seconds
from pipeline.recipe.load import load

CHECKPOINT = "memory.activation_checkpoint"
AUTO = f"{CHECKPOINT}={{offload: cpu, keep_attention: auto, layers_per_group: auto, resident_groups: 0}}"
LENGTH = "data.seq_len=2097152"
RESIDENT = f"{CHECKPOINT}.resident_groups=auto"


def planned(*overrides: str, recipe: str = "llama8b", asked: str = AUTO) -> JobPlan:
    length = [LENGTH] if recipe == "llama8b" else []
    return plan_job(load(recipe, overrides=[asked, *length, *overrides]))


def chosen(plan: JobPlan) -> tuple[bool, int]:
    feature = plan.recipe.memory.activation_checkpoint
    assert feature is not None
    return feature.resolved[:2]


@pytest.mark.parametrize(
    ("host_memory_gib", "expected"),
    [(1500, (True, 1)), (1100, (True, 2)), (900, (True, 4)), (700, (False, 2)), (400, (False, 4))],
)
def test_the_less_host_memory_the_less_waits(host_memory_gib, expected):
    plan = planned(f"hardware.host_memory_gib={host_memory_gib}", "data.seq_len=2097152")
    assert load_of(plan).fits
    assert chosen(plan) == expected


def test_no_combination_that_fits_is_faster():
    plan = planned("hardware.host_memory_gib=900")
    recipe = load("llama8b", overrides=[AUTO, LENGTH, "hardware.host_memory_gib=900"])
    others = [plan_job(candidate) for candidate in combinations(recipe)]
    assert len(others) == 2 * len(GROUP_SIZES)

    def seconds(one: JobPlan) -> float:
        found = step_seconds(one, documents_of(one))
        assert found is not None
        return found.total

    assert seconds(plan) == min(seconds(one) for one in others if load_of(one).fits)


def test_what_is_asked_for_stays():
    asked = f"{CHECKPOINT}={{keep_attention: false, layers_per_group: auto}}"
    assert chosen(planned("hardware.host_memory_gib=4000", asked=asked)) == (False, 1)
    asked = f"{CHECKPOINT}={{keep_attention: auto, layers_per_group: 3}}"
    assert chosen(planned("hardware.host_memory_gib=4000", asked=asked)) == (True, 3)


def test_where_nothing_fits_the_plan_lacks_least_and_says_so():
    scarce = "hardware.host_memory_gib=200"
    plan = planned(scarce)
    assert not load_of(plan).fits
    assert missing(plan) == min(
        missing(plan_job(one)) for one in combinations(load("llama8b", overrides=[AUTO, LENGTH, scarce]))
    )


def missing(plan: JobPlan) -> int:
    load = load_of(plan)
    return max(0, -load.gpu_free_bytes) + max(0, -load.host_free_bytes)


def test_without_known_seconds_the_least_is_done():
    assert chosen(planned(recipe="tiny")) == (False, 1)


def test_a_longer_sequence_fits_where_groups_may_be_made():
    fixed = f"{CHECKPOINT}={{keep_attention: false, layers_per_group: 1}}"
    tight = ("hardware.host_memory_gib=600", "data.seq_len=auto")
    assert planned(*tight).seq_len > planned(*tight, asked=fixed).seq_len
