"""Before the queue: plans that the planner says will not fit or end, and what was seen beside what was planned."""

import re

import pytest

from pipeline.errors import UserError
from pipeline.launch.foreseen import check_foreseen
from pipeline.plan.cluster import ClusterProfile, load_cluster
from pipeline.plan.job import JobPlan, plan_job
from pipeline.plan.seen import seen_lines
from pipeline.recipe.load import load

TOO_LONG = ["memory.tiled_norm=null", "data.seq_len=4194304"]


FIXED = "memory.activation_checkpoint={offload: cpu, keep_attention: false, layers_per_group: 1, resident_groups: 0}"


def planned(*overrides: str) -> JobPlan:
    return plan_job(load("llama8b", overrides=[FIXED, "data.seq_len=2097152", *overrides]))


def lasting(time: str) -> ClusterProfile:
    profile = load_cluster("default")
    return profile.model_copy(update={"train": profile.train.model_copy(update={"time": time})})


def test_a_plan_that_fits_and_ends_is_not_refused():
    check_foreseen(planned(), lasting("1-00:00:00"))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            TOO_LONG,
            r"a GPU needs [\d.,]+ of 79.6 GiB; set memory.sequence_chunks=\{hidden_states: gpu, .*\} \(",
        ),
        (["hardware.host_memory_gib=400"], r"a node's host memory needs [\d.,]+ of 400.0 GiB; set "),
        (["data.seq_len=16777216"], r"a GPU needs .*, a node's host memory needs "),
        (
            ["memory.activation_checkpoint.offload=disk", "hardware.host_memory_gib=330", "hardware.scratch_gib=100"],
            r"a node's scratch disk needs [\d.,]+ of 100.0 GiB; set ",
        ),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_with_what_frees_enough(overrides, told):
    with pytest.raises(UserError, match=rf"the plan does not fit: {told}") as refused:
        check_foreseen(planned(*overrides), lasting("1-00:00:00"))
    assert "--force" in str(refused.value)


def test_changes_that_are_named_make_it_fit():
    with pytest.raises(UserError) as refused:
        check_foreseen(planned(*TOO_LONG), lasting("1-00:00:00"))
    found = re.search(r"set (.*) \(`alst plan`", str(refused.value))
    check_foreseen(planned(*TOO_LONG, *found[1].split(" and ")), lasting("1-00:00:00"))


def test_a_time_limit_in_which_no_step_ends_is_refused():
    with pytest.raises(UserError, match=r"train.time = 00:20:00: .* they take 0:3\d:\d\d by the plan; raise it"):
        check_foreseen(planned(), lasting("00:20:00"))
    check_foreseen(planned(), lasting("01:00:00"))


def test_what_was_seen_stands_beside_what_was_planned():
    row = {"peak_device_bytes": 2**30, "peak_host_rss_bytes": 2**31, "step_seconds": 10.0, "tokens_per_second": 123.0}
    lines = list(seen_lines([row | {"step_seconds": 99.0}, row, row], planned()))
    assert lines[0].split() == ["3", "steps", "seen", "planned"]
    assert re.fullmatch(r"  GPU memory, fullest rank +1.00 GiB +[\d.]+ GiB", lines[1])
    assert re.fullmatch(r"  host memory, a rank +2.00 GiB +[\d.]+ GiB", lines[2])
    assert re.fullmatch(r"  seconds per step +10.00 +[\d.]+", lines[3])
    assert list(seen_lines([], planned())) == []


def test_the_share_of_the_hardware_that_was_used_stands_beside_the_planned_one():
    row = {"peak_device_bytes": 1, "peak_host_rss_bytes": 1, "step_seconds": 10.0, "tokens_per_second": 1.0}
    lines = list(seen_lines([row | {"mfu": mfu, "hfu": 0.6} for mfu in (0.1, 0.5, 0.5)], planned()))
    assert re.fullmatch(r"  MFU +50.0% +[\d.]+%", lines[5])
    assert re.fullmatch(r"  HFU +60.0% +[\d.]+%", lines[6])
    on_a_cpu = [row | {"peak_device_bytes": None, "mfu": None, "hfu": None}]
    told = "\n".join(seen_lines(on_a_cpu, plan_job(load("tiny"))))
    assert "MFU" not in told and "tokens per second" in told
