"""More tokens than 32 bits can count, in samples of more than 15M: no offset wraps around. Run by `make test-full`."""

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.data.batch import batch_of
from pipeline.data.pack import pack
from pipeline.data.packed_dataset import PackedDataset
from pipeline.recipe.schema import HuggingFaceSource
from tests.unit.data_support import recipe_of

SEQ_LEN = 15 * 1024 * 1024
DOCUMENT_TOKENS = 16_000_003  # a whole sample and a rest
DOCUMENTS = 136
NEEDED_BYTES = 12 << 30


class SparseFile:
    """Arrow writes to it; the zeros of large buffers become holes, which take no disk."""

    def __init__(self, path: Path) -> None:
        self.file, self.closed = path.open("wb"), False
        self.large_buffers: list[int] = []

    def write(self, data: Any) -> int:
        size = len(memoryview(data))
        if size > 1 << 20:
            self.large_buffers.append(self.file.tell())
            self.file.seek(size, 1)
        else:
            self.file.write(data)
        return size

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.closed = True


def write_sparse(folder: Path) -> None:
    """Documents of zeros, but for their first and last token, which number them from 1 on."""
    folder.mkdir()
    sink, schema = SparseFile(folder / "data.arrow"), pa.schema([("ids", pa.list_(pa.int32()))])
    tokens = pa.array(np.zeros(DOCUMENT_TOKENS, np.int32))
    row = pa.record_batch([pa.ListArray.from_arrays(pa.array([0, DOCUMENT_TOKENS], pa.int32()), tokens)], schema=schema)
    with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), schema) as stream:
        for _ in range(DOCUMENTS):
            stream.write_batch(row)
    for number, offset in enumerate(sink.large_buffers, start=1):
        for token in (0, DOCUMENT_TOKENS - 1):
            sink.file.seek(offset + 4 * token)
            sink.file.write(np.int32(number).tobytes())
    sink.file.close()
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_more_than_two_billion_tokens_in_samples_of_fifteen_million(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < NEEDED_BYTES:
        pytest.skip(f"needs {NEEDED_BYTES >> 30} GiB of disk")
    datasets = pytest.importorskip("datasets")
    write_sparse(tmp_path / "in")
    source = {"type": "huggingface", "path": str(tmp_path / "in"), "columns": {"input_ids": "ids"}}
    recipe = recipe_of([HuggingFaceSource.model_validate(source)], tokenizer=None, seq_len=SEQ_LEN)
    try:
        manifest = pack(recipe, tmp_path / "out")
        assert manifest.tokens == DOCUMENTS * DOCUMENT_TOKENS > 1 << 31
        assert manifest.documents_cut == DOCUMENTS
        dataset = PackedDataset.open(tmp_path / "out")
        opened = datasets.load_from_disk(str(tmp_path / "out")).with_format("arrow")
        pieces = [piece for sample in range(dataset.samples) for piece in ends_of_pieces(dataset, opened, sample)]
        assert sorted(pieces) == sorted(
            piece
            for d in range(DOCUMENTS)
            for piece in ((d, SEQ_LEN, d + 1, 0), (d, DOCUMENT_TOKENS - SEQ_LEN, 0, d + 1))
        )
        assert int(dataset.index.cost.max()) == SEQ_LEN**2
        last = batch_of(dataset, dataset.samples - 1, sp_rank=7, sp=8)
        assert last.input_ids.shape == (1, SEQ_LEN // 8)
    finally:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def ends_of_pieces(dataset: PackedDataset, opened: Any, sample: int) -> list[tuple[int, int, int, int]]:
    """(document, tokens, first token, last token) of each piece of a sample."""
    documents = opened[sample]["document_ids"][0].as_py()
    cut = list(pairwise(dataset.sample(sample).cu_seqlens.tolist()))
    return [
        (
            document,
            stop - start,
            int(dataset.read_tokens(sample, start, start + 1)[0]),
            int(dataset.read_tokens(sample, stop - 1, stop)[0]),
        )
        for document, (start, stop) in zip(documents, cut, strict=True)
    ]
