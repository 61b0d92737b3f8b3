"""What steps cost by their documents, of a packed data set."""

import pytest

from pipeline.data.loader import Cursor, PackedLoader
from pipeline.plan.job import JobPlan, plan_job
from pipeline.recipe.load import load
from pipeline.train.step_costs import step_costs
from tests.unit.data_support import packed

LENGTH = 64


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Samples of one document, and samples of many."""
    return packed(tmp_path_factory.mktemp("costs"), [LENGTH] * 4 + [4] * 64, seq_len=LENGTH)


def planned(**settings) -> JobPlan:
    overrides = [f"data.seq_len={LENGTH}", "hardware.gpus_per_node=2", "parallel.sp=1"]
    return plan_job(load("tiny", overrides=[*overrides, *(f"{key}={value}" for key, value in settings.items())]))


def loader_of(dataset, *, dp: int, **settings) -> PackedLoader:
    found = {"grad_accumulation": 1, "steps": 4, "seed": 0, "start": Cursor()} | settings
    return PackedLoader(dataset, sp_rank=0, sp=1, dp_rank=0, dp=dp, **found)


def test_a_step_costs_what_its_costliest_replica_does(dataset):
    """The others wait for it."""
    plan, loader = planned(), loader_of(dataset, dp=2)
    cost = step_costs(plan, loader)
    costs = {}
    for step in (1, 2, 3, 4):
        slowest = max(dataset.sample(sample).cost for sample in loader.step(step - 1).samples)
        costs[slowest] = cost(step)
    assert len(costs) > 1, "steps differ"
    assert sorted(costs.values()) == [costs[slowest] for slowest in sorted(costs)]


def test_micro_batches_follow_each_other_and_cost_their_mean(dataset):
    one = step_costs(planned(), loader_of(dataset, dp=1))
    both = step_costs(planned(**{"train.grad_accumulation": 2}), loader_of(dataset, dp=1, grad_accumulation=2, steps=2))
    assert both(1) == pytest.approx((one(1) + one(2)) / 2)


def test_where_documents_attend_to_each_other_all_whole_samples_cost_the_same(dataset):
    plan = planned(**{"data.cross_document_attention": "true"})
    loader = loader_of(dataset, dp=2, cross_document_attention=True)
    assert {step_costs(plan, loader)(step) for step in (1, 2, 3)} == {1.0}


def test_the_step_that_the_plan_is_for_costs_one(dataset):
    plan, loader = planned(), loader_of(dataset, dp=1, steps=dataset.samples)
    costs = [step_costs(plan, loader)(step + 1) for step in range(dataset.samples)]
    assert sum(costs) / len(costs) == pytest.approx(1.0, rel=1e-6)
