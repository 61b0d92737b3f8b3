"""How long nothing may happen, from what the plan foresees and what steps took."""

import pytest

from pipeline.plan.documents import DocumentMix
from pipeline.plan.estimate import estimate
from pipeline.plan.job import JobPlan, plan_job
from pipeline.plan.patience import LEAST_SECONDS, patience_of
from pipeline.plan.step_cost import step_cost
from pipeline.recipe.load import load


def planned(recipe: str, *overrides: str) -> JobPlan:
    return plan_job(load(recipe, overrides=list(overrides)))


@pytest.fixture(autouse=True)
def _no_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))


def test_patience_grows_with_the_step_that_is_foreseen_or_seen_and_is_longer_for_the_first():
    plan = planned("llama8b", "data.seq_len=2097152")
    found = estimate(plan)
    one = found.seconds.total + found.checkpoint_seconds
    patience = patience_of(plan)
    assert patience.seconds(None) == 4 * 3 * one > 4 * LEAST_SECONDS
    assert patience.seconds(1.0) == 3 * one
    assert patience.seconds(2 * one) == 6 * one
    assert patience.collective_seconds(1.0) == 6 * one + 120, "the watchdog comes first, it can say why"


def test_patience_grows_with_what_the_documents_of_the_step_cost():
    plan = planned("llama8b", "data.seq_len=2097152")
    patience = patience_of(plan)
    mean, costly = patience.seconds(1.0), patience.seconds(1.0, cost=5.0)
    assert costly == pytest.approx(5 * mean)
    assert patience.seconds(None, cost=5.0) == pytest.approx(5 * patience.seconds(None))
    assert patience.seconds(1.0, cost=0.1) == mean, "a cheap step may be slow for another reason"
    assert patience.collective_seconds(1.0, cost=5.0) == pytest.approx(2 * costly + 120)


def test_a_step_of_one_document_costs_more_than_one_of_many_and_by_what_attention_takes():
    for recipe in ("llama8b", "tiny"):
        plan = planned(recipe, "data.seq_len=2097152")
        costs = [step_cost(plan, DocumentMix(cost, cost, "")) for cost in (0, 2**40, 2**41)]
        assert costs[0] < costs[1] < costs[2]
        assert costs[2] - costs[1] == pytest.approx(costs[1] - costs[0], rel=1e-3)


def test_a_short_step_is_given_the_time_that_a_file_server_may_take():
    patience = patience_of(planned("tiny"))
    assert patience.seconds(0.1) == LEAST_SECONDS
    assert patience.seconds(None) > LEAST_SECONDS


def test_the_recipe_may_say_how_long_or_that_nobody_looks():
    told = patience_of(planned("tiny", "train.stall_seconds=20"))
    assert (told.seconds(None), told.seconds(1000.0)) == (80, 20)
    assert told.starting_seconds == LEAST_SECONDS, "a start has more to do that nothing is heard of"
    assert told.collective_seconds(1000.0) == 40 + 120, "however short a stall is, its stacks take their time"
    never = patience_of(planned("tiny", "train.stall_seconds=null"))
    assert not never.looks
    assert never.collective_seconds(1.0) == 12 * 3600
