"""The documents of a sample are named, each where it lies."""

import pytest

from pipeline.data.documents import documents_within
from pipeline.data.packed_dataset import PackedDataset
from tests.unit.data_support import packed

SEQ_LEN = 16
LENGTHS = [7, 20, 3, 5, 9, 12, 1, 4, 6, 11]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    return packed(tmp_path_factory.mktemp("documents"), LENGTHS, seq_len=SEQ_LEN)


def first_token_of(document: int) -> int:
    """Every token of the corpus is another number, counted on from document to document."""
    return 1 + sum(LENGTHS[:document])


def test_every_token_of_every_sample_is_of_the_document_that_is_named(dataset: PackedDataset) -> None:
    seen = set()
    for sample in range(dataset.samples):
        tokens = dataset.read_tokens(sample, 0, SEQ_LEN)
        found = documents_within(dataset, sample, start=0, stop=SEQ_LEN)
        assert [document.start for document in found] == dataset.sample(sample).cu_seqlens[:-1].tolist()
        for document in found:
            assert document.name == f"corpus.jsonl:{document.document + 1}"
            first = first_token_of(document.document)
            owned = set(range(first, first + LENGTHS[document.document]))
            assert set(tokens[document.start : document.stop].tolist()) <= owned
            seen.add(document.document)
    assert seen == set(range(len(LENGTHS)))


def test_only_documents_with_a_token_in_the_range_are_named(dataset: PackedDataset) -> None:
    for sample in range(dataset.samples):
        everything = documents_within(dataset, sample, start=0, stop=SEQ_LEN)
        for start in range(SEQ_LEN):
            within = documents_within(dataset, sample, start=start, stop=start + 1)
            assert within == tuple(d for d in everything if d.start <= start < d.stop)
