"""What a run has consumed is the same however often it was started."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.data.loader import Cursor, PackedLoader
from pipeline.train.consumed import Consumed, consumed_before
from tests.unit.data_support import packed

LENGTHS = [7, 20, 3, 5, 9, 12, 1, 4, 6, 11]
STEPS = 8


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> PackedLoader:
    """Two samples a step, so that the steps go on into a second epoch and a third."""
    dataset = packed(tmp_path_factory.mktemp("data"), LENGTHS, seq_len=16)
    return PackedLoader(dataset, sp_rank=0, sp=1, dp_rank=0, dp=2, grad_accumulation=1, steps=STEPS, seed=0)


def after_each(loader: PackedLoader) -> list[Consumed]:
    consumed, found = consumed_before(loader), []
    for batch in loader:
        consumed = consumed.after(batch, loader)
        found.append(consumed)
    return found


def test_samples_documents_and_tokens_are_counted_without_padding(loader: PackedLoader) -> None:
    found = after_each(loader)
    samples = [loader.dataset.sample(sample) for batch in loader for sample in batch.samples]
    assert found[-1].samples == 2 * STEPS
    assert found[-1].documents == sum(len(sample.cu_seqlens) - 1 for sample in samples)
    assert found[-1].tokens == sum(sample.n_tokens for sample in samples) < 16 * len(samples)


@pytest.mark.parametrize("start", [1, 5, STEPS - 1])
def test_a_start_in_the_middle_goes_on_counting_where_it_was(loader: PackedLoader, start: int) -> None:
    resumed = replace(loader, start=Cursor(start, 2 * start))
    assert after_each(resumed) == after_each(loader)[start:]


def test_other_ranks_go_on_from_the_same_samples(loader: PackedLoader, tmp_path: Path) -> None:
    alone = replace(loader, dp=1, start=Cursor(4, 8), steps=12)
    assert after_each(alone)[0].samples == 9
    assert after_each(alone)[-1] == after_each(loader)[-1]
