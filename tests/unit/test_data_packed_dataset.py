"""On disk: a person with `datasets` and a rank with pread read the same bytes, and damage does not pass."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import write
from pipeline.data.loss_runs import whole
from pipeline.data.manifest import FORMAT_VERSION
from pipeline.data.packed_dataset import PackedDataset, SampleContent, write_part
from pipeline.errors import DataError
from tests.unit.data_support import packed

LENGTHS = [5, 30, 1, 12, 7, 16, 33, 2, 9, 4] * 3


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    return packed(tmp_path_factory.mktemp("data"), LENGTHS, seq_len=16)


@pytest.fixture
def own_dataset(tmp_path: Path) -> PackedDataset:
    """One that a test may damage."""
    return packed(tmp_path, LENGTHS, seq_len=16)


def test_datasets_opens_the_folder_and_reads_what_the_index_reads(dataset: PackedDataset) -> None:
    datasets = pytest.importorskip("datasets")
    opened = datasets.load_from_disk(str(dataset.folder))
    assert len(opened) == dataset.samples > 10
    for index, row in enumerate(opened):
        known = dataset.sample(index)
        assert row["input_ids"] == dataset.read_tokens(index, 0, 16).tolist()
        assert row["cu_seqlens"] == known.cu_seqlens.tolist()
        assert (row["n_tokens"], row["n_valid"], row["cost"]) == (known.n_tokens, known.n_valid, known.cost)
    assert str(opened.features["input_ids"]) == "LargeList(Value('uint32'))"


def test_a_samples_numbers_follow_from_its_documents(dataset: PackedDataset) -> None:
    for index in range(dataset.samples):
        sample = dataset.sample(index)
        lengths = np.diff(sample.cu_seqlens)
        assert sample.cu_seqlens[0] == 0
        assert (lengths > 0).all()
        assert sample.n_tokens == lengths.sum() <= 16
        assert sample.n_valid == (lengths - 1).sum()
        assert sample.cost == (lengths.astype(int) ** 2).sum()
        assert not dataset.read_tokens(index, sample.n_tokens, 16).any()


def test_the_cost_of_a_long_document_does_not_overflow(tmp_path: Path) -> None:
    tokens, ends = np.zeros(100_000, np.uint32), np.array([0, 100_000], np.int32)
    index = write_part(
        tmp_path / "part.arrow", samples=[SampleContent(tokens, ends, np.zeros(1, np.int64), whole(100_000), 0)]
    ).index
    assert index.cost.tolist() == [10**10]


def test_document_ids_name_the_row_of_documents_arrow(dataset: PackedDataset) -> None:
    datasets = pytest.importorskip("datasets")
    starts = np.cumsum([1, *LENGTHS])  # token numbers run on over the corpus: the first tells the document
    for row in datasets.load_from_disk(str(dataset.folder)):
        for document, first in zip(row["document_ids"], row["cu_seqlens"][:-1], strict=True):
            assert starts[document] <= row["input_ids"][first] < starts[document + 1]


def test_reading_a_slice_reads_its_bytes_and_no_others(dataset: PackedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: asked.append(len(buffers[0])) or preadv(fd, buffers, at))
    tokens = dataset.read_tokens(2, 5, 9)
    assert asked == [4 * 4]
    assert tokens.tolist() == dataset.read_tokens(2, 0, 16)[5:9].tolist()
    assert dataset.read_tokens(2, 7, 7).tolist() == []


@pytest.mark.parametrize("where", [(0, -1, 4), (0, 0, 17), (0, 5, 4), (-1, 0, 4), (10_000, 0, 4)])
def test_tokens_outside_the_data_set_are_not_read(dataset: PackedDataset, where: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"do not exist"):
        dataset.read_tokens(*where)


def test_more_samples_than_a_part_holds_make_several_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(write, "PART_BYTES", 64 * 8 * 4)
    dataset = packed(tmp_path, [7] * 150, seq_len=8)
    assert [(part.name, part.samples) for part in dataset.manifest.parts] == [
        ("data-00000-of-00003.arrow", 64),
        ("data-00001-of-00003.arrow", 64),
        ("data-00002-of-00003.arrow", 22),
    ]
    rows = datasets.load_from_disk(str(dataset.folder))["input_ids"]
    assert list(rows) == [dataset.read_tokens(index, 0, 8).tolist() for index in range(150)]


def test_a_flipped_bit_is_found_and_its_file_named(own_dataset: PackedDataset) -> None:
    own_dataset.verify()
    part = own_dataset.folder / own_dataset.manifest.parts[0].name
    data = bytearray(part.read_bytes())
    data[int(own_dataset.index.payload_offset[3]) + 6] ^= 1
    part.write_bytes(data)
    damaged = PackedDataset.open(own_dataset.folder)
    assert damaged.damaged_samples() == (3,)
    with pytest.raises(DataError, match=r"1 samples .*sample 3\), in files data-00000-of-00001.arrow; copy"):
        damaged.verify()


def test_a_part_that_was_cut_off_or_is_missing_is_found_on_opening(own_dataset: PackedDataset) -> None:
    part = own_dataset.folder / own_dataset.manifest.parts[0].name
    size = part.stat().st_size
    os.truncate(part, size - 100)
    with pytest.raises(DataError, match=rf"arrow has {size - 100} bytes, and the manifest says {size} bytes; copy"):
        PackedDataset.open(own_dataset.folder)
    with pytest.raises(DataError, match=r"ends at byte"):  # cut while it is open
        own_dataset.read_tokens(own_dataset.samples - 1, 0, 16)
    part.unlink()
    with pytest.raises(DataError, match=r"arrow is missing"):
        PackedDataset.open(own_dataset.folder)
    with pytest.raises(DataError, match=r"cannot be read"):
        own_dataset.read_tokens(0, 0, 16)


def test_a_damaged_index_or_manifest_is_found_on_opening(own_dataset: PackedDataset) -> None:
    index, manifest = own_dataset.folder / "index.npz", own_dataset.folder / "manifest.json"
    whole, text = index.read_bytes(), manifest.read_text()
    index.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    with pytest.raises(DataError, match=r"index.npz is missing or not the one"):
        PackedDataset.open(own_dataset.folder)
    index.write_bytes(whole)
    for wrong in ("", text[:300], "[]", text.replace('"samples"', '"sample"'), text.replace("true", "false")):
        manifest.write_text(wrong)
        with pytest.raises(DataError, match=r"manifest.json"):
            PackedDataset.open(own_dataset.folder)


def test_another_format_version_is_refused(own_dataset: PackedDataset) -> None:
    path = own_dataset.folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    with pytest.raises(DataError, match=rf"format version 99, and this version reads {FORMAT_VERSION}; pack"):
        PackedDataset.open(own_dataset.folder)


def test_a_folder_without_a_finished_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no manifest.json; make it with `alst pack`"):
        PackedDataset.open(tmp_path / "nowhere")
    (tmp_path / ".alst-pack").mkdir()
    with pytest.raises(DataError, match=r"has not finished"):
        PackedDataset.open(tmp_path)
