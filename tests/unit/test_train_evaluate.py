"""Which samples an evaluation takes, from where, and when."""

import shutil

import pytest

from pipeline.data.packed_dataset import PackedDataset
from pipeline.errors import DataError
from pipeline.plan.job import JobPlan, plan_job
from pipeline.recipe.load import load
from pipeline.train.evaluate import evaluations_after, is_due, open_held_out
from tests.unit.data_support import packed

SEQ_LEN = 16
LENGTHS = [7, 20, 3, 5, 9, 12, 1, 4, 6, 11]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    return packed(tmp_path_factory.mktemp("training"), LENGTHS, seq_len=SEQ_LEN)


def plan_of(evaluation: str, *, steps: int = 10) -> JobPlan:
    overrides = [f"data.seq_len={SEQ_LEN}", "train.self_check=null", f"train.steps={steps}"]
    return plan_job(load("tiny", overrides=[*overrides, f"evaluation={evaluation}"]))


def test_off_is_null(dataset: PackedDataset) -> None:
    plan = plan_of("null")
    assert open_held_out(plan, dataset) is None
    assert plan.held_out == 0
    assert not any(is_due(plan, step) for step in range(1, 11))


def test_it_comes_every_so_many_steps_and_at_the_end() -> None:
    plan = plan_of("{every_steps: 4, samples: 2}")
    assert [step for step in range(1, 11) if is_due(plan, step)] == [4, 8, 10]


@pytest.mark.parametrize("every", [1, 3, 4, 10, 11])
def test_those_still_to_come_are_counted(every: int) -> None:
    plan = plan_of(f"{{every_steps: {every}, samples: 2}}")
    for step in range(1, 11):
        assert evaluations_after(plan, step) == sum(is_due(plan, later) for later in range(step + 1, 11))


def test_samples_are_held_out_of_the_runs_own_data(dataset: PackedDataset) -> None:
    plan = plan_of("{every_steps: 4, samples: 2}")
    held_out = open_held_out(plan, dataset)
    assert held_out is not None
    assert held_out.dataset is dataset
    assert len(set(held_out.samples)) == plan.held_out == 2
    assert held_out.valid_tokens == sum(dataset.sample(sample).n_valid for sample in held_out.samples)


def test_of_another_data_set_nothing_is_held_out(dataset: PackedDataset, tmp_path_factory) -> None:
    shutil.copytree(dataset.folder, copy := tmp_path_factory.mktemp("other") / "packed")
    for asked, taken in ((2, 2), (1000, dataset.samples)):
        plan = plan_of(f"{{every_steps: 4, samples: {asked}, packed: {copy}}}")
        held_out = open_held_out(plan, dataset)
        assert held_out is not None
        assert held_out.dataset.folder == copy
        assert held_out.samples == tuple(range(taken))
        assert plan.held_out == 0


def test_another_data_set_must_have_samples_of_the_same_length(dataset: PackedDataset, tmp_path_factory) -> None:
    other = packed(tmp_path_factory.mktemp("longer"), LENGTHS, seq_len=32)
    with pytest.raises(DataError, match=r"32 tokens, and those of training 16; pack it with data.seq_len=16"):
        open_held_out(plan_of(f"{{every_steps: 4, samples: 2, packed: {other.folder}}}"), dataset)


def test_another_data_set_must_have_the_same_tokenizer(dataset: PackedDataset, tmp_path_factory, monkeypatch) -> None:
    from tests.unit import data_support

    folder = tmp_path_factory.mktemp("tokenizer")
    usual = data_support.number_tokenizer
    monkeypatch.setattr(data_support, "number_tokenizer", lambda path: usual(path, vocab_size=900))
    other = packed(folder, LENGTHS, seq_len=SEQ_LEN)
    with pytest.raises(DataError, match=r"another tokenizer than the training data; pack it with data.tokenizer="):
        open_held_out(plan_of(f"{{every_steps: 4, samples: 2, packed: {other.folder}}}"), dataset)


def test_more_than_there_is_cannot_be_held_out(dataset: PackedDataset) -> None:
    with pytest.raises(DataError, match="hold out fewer"):
        open_held_out(plan_of("{every_steps: 4, samples: 1000}"), dataset)
