"""Batches and their order: every rank's part is what the whole sample says, and every sample is seen once per epoch."""

from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.batch import IGNORE_INDEX, Batch, batch_of
from pipeline.data.loader import Cursor, PackedLoader, held_out_samples, place_at
from pipeline.data.packed_dataset import PackedDataset
from pipeline.errors import DataError
from pipeline.parallel.shard import Layout
from tests.unit.data_support import packed

SEQ_LEN = 16
LENGTHS = [5, 30, 1, 12, 7, 16, 33, 2, 9, 4, 3, 8] * 3
FIELDS = ("input_ids", "labels", "position_ids")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    return packed(tmp_path_factory.mktemp("data"), LENGTHS, seq_len=SEQ_LEN)


def loader_of(dataset: PackedDataset, **settings: int) -> PackedLoader:
    """One rank, one sample per step, one epoch, unless said otherwise."""
    defaults = {
        "sp_rank": 0, "sp": 1, "dp_rank": 0, "dp": 1, "grad_accumulation": 1, "steps": dataset.samples, "seed": 0
    }  # fmt: skip
    return PackedLoader(dataset, **{**defaults, **settings})


def joined(dataset: PackedDataset, sample: int, *, sp: int, **settings: object) -> dict[str, list[int]]:
    """The shards of all SP ranks, end to end."""
    batches = [batch_of(dataset, sample, sp_rank=rank, sp=sp, **settings) for rank in range(sp)]  # type: ignore[arg-type]
    return {name: torch.cat([getattr(batch, name) for batch in batches], dim=1)[0].tolist() for name in FIELDS}


def in_order(dataset: PackedDataset, sample: int, *, sp: int, chunk_tokens: int) -> dict[str, list[int]]:
    """The same of all SP ranks, put where the layout says that it belongs."""
    layout = Layout(SEQ_LEN, sp, chunk_tokens)
    whole = {name: [-1] * SEQ_LEN for name in FIELDS}
    for rank in range(sp):
        batch = batch_of(dataset, sample, sp_rank=rank, sp=sp, chunk_tokens=chunk_tokens)
        for shard, place in zip(layout.shards(rank), layout.local, strict=True):
            for name in FIELDS:
                whole[name][shard.start : shard.stop] = getattr(batch, name)[0, place].tolist()
    return whole


def written_out(tokens: list[int], ends: list[int], *, seq_len: int) -> dict[str, list[int]]:
    """What a sample must look like, document by document in plain Python."""
    expected: dict[str, list[int]] = {name: [] for name in FIELDS}
    for start, stop in pairwise(ends):
        expected["input_ids"] += tokens[start:stop]
        expected["labels"] += [*tokens[start + 1 : stop], IGNORE_INDEX]
        expected["position_ids"] += range(stop - start)
    padding = {"input_ids": 0, "labels": IGNORE_INDEX, "position_ids": 0}
    return {name: values + [padding[name]] * (seq_len - ends[-1]) for name, values in expected.items()}


@pytest.mark.parametrize("sp", [1, 2, 4, 16])
def test_the_shards_of_all_sp_ranks_are_what_datasets_reads(dataset: PackedDataset, sp: int) -> None:
    datasets = pytest.importorskip("datasets")
    for sample, row in enumerate(datasets.load_from_disk(str(dataset.folder))):
        expected = written_out(row["input_ids"], row["cu_seqlens"], seq_len=SEQ_LEN)
        assert joined(dataset, sample, sp=sp) == expected
        for chunk_tokens in {sp, 3 * sp, 16, 32}:
            assert in_order(dataset, sample, sp=sp, chunk_tokens=chunk_tokens) == expected
        batch = batch_of(dataset, sample, sp_rank=sp - 1, sp=sp)
        assert batch.cu_seqlens.tolist() == row["cu_seqlens"]
        assert (batch.n_tokens, batch.n_valid, batch.seq_len) == (row["n_tokens"], row["n_valid"], SEQ_LEN)
        assert batch.n_valid == sum(label != IGNORE_INDEX for label in expected["labels"])


def test_tensors_have_the_promised_types_and_shapes(dataset: PackedDataset) -> None:
    batch = batch_of(dataset, 0, sp_rank=1, sp=4)
    for name in FIELDS:
        tensor = getattr(batch, name)
        assert (tensor.dtype, tuple(tensor.shape)) == (torch.int64, (1, SEQ_LEN // 4))
        assert tensor.is_contiguous()
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.sample == 0


def test_the_last_token_of_a_document_never_predicts_the_next(dataset: PackedDataset) -> None:
    for sample in range(dataset.samples):
        for cross in (False, True):
            labels = joined(dataset, sample, sp=2, cross_document_attention=cross)["labels"]
            ends = dataset.sample(sample).cu_seqlens[1:]
            assert [labels[end - 1] for end in ends] == [IGNORE_INDEX] * len(ends)


def test_a_document_that_crosses_an_sp_border_has_its_label_across_the_border(dataset: PackedDataset) -> None:
    crossing = [s for s in range(dataset.samples) if 8 not in (ends := dataset.sample(s).cu_seqlens) and ends[-1] > 8]
    assert crossing
    for sample in crossing:
        left, right = (batch_of(dataset, sample, sp_rank=rank, sp=2) for rank in (0, 1))
        assert left.labels[0, -1] == right.input_ids[0, 0] != IGNORE_INDEX
        assert right.position_ids[0, 0] == left.position_ids[0, -1] + 1


def test_a_rank_reads_its_shard_and_one_token_more(dataset: PackedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    read = PackedDataset.read_tokens

    def spy(self: PackedDataset, sample: int, start: int, stop: int, *, verify: bool) -> object:
        asked.append((start, stop))
        return read(self, sample, start, stop, verify=verify)

    monkeypatch.setattr(PackedDataset, "read_tokens", spy)
    for rank in range(4):
        batch_of(dataset, 0, sp_rank=rank, sp=4)
    assert asked == [(0, 5), (4, 9), (8, 13), (12, 16)]


@pytest.mark.parametrize("sp", [1, 2, 4])
def test_cross_document_attention_sees_one_document_but_its_labels_do_not_cross(
    dataset: PackedDataset, sp: int
) -> None:
    for sample in range(dataset.samples):
        known = dataset.sample(sample)
        apart = joined(dataset, sample, sp=sp)
        across = joined(dataset, sample, sp=sp, cross_document_attention=True)
        assert across["labels"] == apart["labels"]
        assert across["input_ids"] == apart["input_ids"]
        assert across["position_ids"] == [*range(known.n_tokens), *[0] * (SEQ_LEN - known.n_tokens)]
        batch = batch_of(dataset, sample, sp_rank=0, sp=sp, cross_document_attention=True)
        assert batch.cu_seqlens.tolist() == [0, known.n_tokens]
        assert batch.n_valid == known.n_valid


@given(sample=st.integers(0, 20), sp=st.sampled_from([1, 2, 4]), blocks=st.integers(1, 4), cross=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_truncated_sample_is_its_first_tokens_and_the_cut_document_ends_there(
    dataset: PackedDataset, sample: int, sp: int, blocks: int, cross: bool
) -> None:
    length = min(sp * blocks, SEQ_LEN)
    known = dataset.sample(sample)
    last = min(length, known.n_tokens)
    ends = [int(end) for end in known.cu_seqlens if end < last] + [last]
    expected = written_out(dataset.read_tokens(sample, 0, length).tolist(), ends, seq_len=length)
    found = joined(dataset, sample, sp=sp, length=length, cross_document_attention=cross)
    assert found["labels"] == expected["labels"]
    assert found["input_ids"] == expected["input_ids"]
    if not cross:
        assert found["position_ids"] == expected["position_ids"]
    batch = batch_of(dataset, sample, sp_rank=0, sp=sp, length=length, cross_document_attention=cross)
    assert batch.cu_seqlens.tolist() == ([0, last] if cross else ends)
    assert (batch.n_tokens, batch.seq_len) == (last, length)
    assert batch.n_valid == sum(label != IGNORE_INDEX for label in expected["labels"])


@pytest.mark.parametrize(("length", "sp"), [(0, 1), (17, 1), (15, 2)])
def test_a_length_that_is_not_in_the_sample_or_that_sp_does_not_divide_is_refused(
    dataset: PackedDataset, length: int, sp: int
) -> None:
    with pytest.raises(ValueError, match=f"{length}"):
        batch_of(dataset, 0, sp=sp, length=length)


@pytest.mark.parametrize(("dp", "grad_accumulation"), [(1, 1), (2, 1), (3, 2), (4, 5)])
def test_every_sample_is_seen_exactly_once_per_epoch_whatever_the_step_takes(
    dataset: PackedDataset, dp: int, grad_accumulation: int
) -> None:
    steps = -(-3 * dataset.samples // (dp * grad_accumulation))
    loaders = [
        loader_of(dataset, dp_rank=rank, dp=dp, grad_accumulation=grad_accumulation, steps=steps) for rank in range(dp)
    ]
    seen: list[int] = []
    for parts in zip(*loaders, strict=True):
        micro_batches = [[batch.sample for batch in part.micro_batches] for part in parts]
        assert {len(samples) for samples in micro_batches} == {grad_accumulation}
        taken = [sample for samples in zip(*micro_batches, strict=True) for sample in samples]
        assert all(part.samples == tuple(taken) for part in parts)
        seen += taken
    for epoch in range(3):
        assert sorted(seen[epoch * dataset.samples : (epoch + 1) * dataset.samples]) == list(range(dataset.samples))


def test_epochs_have_different_orders_and_ranks_the_same(dataset: PackedDataset) -> None:
    count = dataset.samples
    orders = [[place_at(e * count + p, samples=count, seed=5).sample for p in range(count)] for e in range(3)]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert orders[0] != [place_at(position, samples=count, seed=6).sample for position in range(count)]
    again = [step.samples[0] for step in loader_of(dataset, seed=5, sp=4, sp_rank=3)]
    assert again == orders[0]


@pytest.mark.parametrize("held_out", [1, 3])
def test_held_out_samples_are_never_trained_on_and_all_others_once_per_epoch(
    dataset: PackedDataset, held_out: int
) -> None:
    aside = set(held_out_samples(dataset.samples, seed=5, held_out=held_out).tolist())
    rest = set(range(dataset.samples)) - aside
    loader = loader_of(dataset, seed=5, steps=3 * len(rest), held_out=held_out)
    seen = [step.samples[0] for step in loader]
    assert len(aside) == held_out
    for epoch in range(3):
        assert sorted(seen[epoch * len(rest) : (epoch + 1) * len(rest)]) == sorted(rest)
    assert [loader.step(len(rest) - 1).epoch, loader.step(len(rest)).epoch] == [0, 1]


def test_holding_out_changes_nothing_in_the_first_epoch(dataset: PackedDataset) -> None:
    steps = dataset.samples - 3
    whole = [step.samples for step in loader_of(dataset, steps=steps)]
    assert [step.samples for step in loader_of(dataset, steps=steps, held_out=3)] == whole


def test_what_is_held_out_follows_from_the_seed(dataset: PackedDataset) -> None:
    chosen = {tuple(held_out_samples(dataset.samples, seed=seed, held_out=3).tolist()) for seed in range(20)}
    assert len(chosen) > 15


def test_holding_out_every_sample_is_refused(dataset: PackedDataset) -> None:
    count = dataset.samples
    with pytest.raises(DataError, match=rf"evaluation.samples = {count}: .* has {count}, .* hold out fewer"):
        held_out_samples(count, seed=0, held_out=count)


def test_a_step_can_be_read_without_those_before_it(dataset: PackedDataset) -> None:
    loader = loader_of(dataset, dp=2, grad_accumulation=3, steps=9)
    (last,) = islice(loader, 8, 9)
    assert loader.step(8).samples == last.samples
    assert [len(loader), last.step] == [9, 8]
    assert last.epoch == 8 * 6 // dataset.samples


def interrupted(dataset: PackedDataset, jobs: list[tuple[int, int, int]]) -> tuple[list[int], Cursor]:
    """What replicas of consecutive jobs (steps done, dp, grad_accumulation) train on, in order, and where they end."""
    seen: list[int] = []
    cursor = Cursor()
    for done, dp, accumulation in jobs:
        sizes = {"dp": dp, "grad_accumulation": accumulation, "start": cursor, "steps": cursor.step + done}
        loaders = [loader_of(dataset, dp_rank=rank, **sizes) for rank in range(dp)]
        for parts in zip(*loaders, strict=True):
            samples = [[batch.sample for batch in part.micro_batches] for part in parts]
            seen += [sample for micro_batch in zip(*samples, strict=True) for sample in micro_batch]
        cursor = loaders[0].cursor(cursor.step + done)
    return seen, cursor


@given(jobs=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_a_run_that_is_resumed_at_any_dp_takes_every_sample_once_and_in_the_planned_order(
    dataset: PackedDataset, jobs: list[tuple[int, int, int]]
) -> None:
    seen, cursor = interrupted(dataset, jobs)
    planned = [place_at(p, samples=dataset.samples, seed=loader_of(dataset).seed).sample for p in range(len(seen))]
    assert seen == planned
    assert cursor == Cursor(sum(done for done, _, _ in jobs), len(seen))


def test_counts_of_a_step_are_over_all_replicas_and_equal_on_every_rank(dataset: PackedDataset) -> None:
    loaders = [
        loader_of(dataset, dp_rank=d, dp=2, sp_rank=s, sp=2, grad_accumulation=2, steps=12)
        for d in range(2)
        for s in range(2)
    ]
    for parts in zip(*loaders, strict=True):
        batches: list[Batch] = [batch for part in parts for batch in part.micro_batches]
        labels = torch.cat([batch.labels for batch in batches])
        whole = batches[: len(batches) // 4] + batches[len(batches) // 2 : 3 * len(batches) // 4]  # sp_rank 0 only
        documents = [np.diff(batch.cu_seqlens.numpy()) for batch in whole]
        for part in parts:
            assert part.valid_tokens == int((labels != IGNORE_INDEX).sum())
            assert part.tokens == sum(batch.n_tokens for batch in whole)
            assert part.sum_len_squared == sum(int((lengths**2).sum()) for lengths in documents)


def test_with_cross_document_attention_the_cost_is_the_samples(dataset: PackedDataset) -> None:
    step = loader_of(dataset, cross_document_attention=True, grad_accumulation=2, steps=1).step(0)
    assert step.sum_len_squared == sum(dataset.sample(sample).n_tokens ** 2 for sample in step.samples)


def test_fewer_samples_than_a_step_takes_are_taken_again(tmp_path_factory: pytest.TempPathFactory) -> None:
    dataset = packed(tmp_path_factory.mktemp("two"), [10, 9], seq_len=SEQ_LEN)
    step = loader_of(dataset, dp=5, steps=1).step(0)
    assert len(step.samples) == 5
    assert {step.samples.count(0), step.samples.count(1)} == {2, 3}


def test_padding_counts_nowhere(tmp_path_factory: pytest.TempPathFactory) -> None:
    dataset = packed(tmp_path_factory.mktemp("one"), [3], seq_len=SEQ_LEN)
    step = loader_of(dataset, steps=1).step(0)
    assert (step.tokens, step.valid_tokens, step.sum_len_squared) == (3, 2, 9)
    empty = batch_of(dataset, 0, sp_rank=3, sp=4)  # a shard of padding alone
    assert empty.labels.tolist() == [[IGNORE_INDEX] * 4]
    assert empty.input_ids.tolist() == empty.position_ids.tolist() == [[0] * 4]
