"""Reading ahead changes nothing but the time at which bytes are read."""

import threading
import time

import pytest

from pipeline.data.loader import PackedLoader
from pipeline.data.packed_dataset import PackedDataset
from pipeline.data.prefetch import BatchReader
from pipeline.errors import DataError
from tests.unit.data_support import packed

LENGTHS = [5, 30, 1, 12, 7, 16, 33, 2, 9, 4, 3, 8] * 2


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    return packed(tmp_path_factory.mktemp("data"), LENGTHS, seq_len=16)


def loader_of(dataset: PackedDataset, **settings: object) -> PackedLoader:
    defaults = {"sp_rank": 0, "sp": 2, "dp_rank": 1, "dp": 2, "grad_accumulation": 3, "steps": 5, "seed": 0}
    return PackedLoader(dataset, **{**defaults, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize("prefetch", [1, 2, 9])
@pytest.mark.parametrize("order", ["shuffled", "by_cost"])
def test_what_is_read_ahead_is_what_would_be_read(dataset: PackedDataset, prefetch: int, order: str) -> None:
    plain, ahead = loader_of(dataset, order=order), loader_of(dataset, order=order, prefetch=prefetch)
    for expected, found in zip(plain, ahead, strict=True):
        assert expected.samples == found.samples
        for left, right in zip(expected.micro_batches, found.micro_batches, strict=True):
            assert left.sample == right.sample
            assert left.labels.equal(right.labels)
    again = [batch.sample for batch in ahead.step(2).micro_batches]  # a jump back reads what is there
    assert again == [batch.sample for batch in plain.step(2).micro_batches]


def test_the_next_batch_is_read_in_a_thread_while_this_one_is_used() -> None:
    reads: list[tuple[int, bool]] = []

    def read(sample: int) -> int:
        reads.append((sample, threading.current_thread() is threading.main_thread()))
        return sample

    reader = BatchReader(read, ahead=1)  # type: ignore[arg-type]
    assert reader.batch(7, upcoming=(8, 9)) == 7
    deadline = time.monotonic() + 30
    while len(reads) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert reads == [(7, False), (8, False)]
    assert reader.batch(8, upcoming=(9,)) == 8
    assert reader.batch(3) == 3  # another than was announced
    assert [sample for sample, _ in reads].count(8) == 1


def test_the_prefetch_of_a_step_reaches_into_the_next(dataset: PackedDataset) -> None:
    loader = loader_of(dataset, prefetch=2)
    step = loader.step(0)
    assert step.micro_batches.following == tuple(batch.sample for batch in loader.step(1).micro_batches)
    assert loader.step(4).micro_batches.following == ()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_damage_found_while_reading_ahead_stops_the_step_that_needs_it(
    tmp_path_factory: pytest.TempPathFactory, prefetch: int
) -> None:
    own = packed(tmp_path_factory.mktemp("damaged"), LENGTHS, seq_len=16)
    loader = loader_of(own, sp=1, dp=1, dp_rank=0, grad_accumulation=1, prefetch=prefetch)
    third = loader.step(2).samples[0]
    part = own.folder / own.manifest.parts[0].name
    data = bytearray(part.read_bytes())
    data[int(own.index.payload_offset[third])] ^= 1
    part.write_bytes(data)
    steps = iter(loader)
    assert len([batch for _ in range(2) for batch in next(steps).micro_batches]) == 2
    with pytest.raises(DataError, match=rf"sample {third} in .* is not what was written"):
        list(next(steps).micro_batches)
    unchecked = loader_of(own, sp=1, dp=1, dp_rank=0, grad_accumulation=1, prefetch=prefetch, verify=False)
    assert [batch.sample for batch in unchecked.step(2).micro_batches] == [third]
