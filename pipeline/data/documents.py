"""Which documents lie where in a sample, by name: what a person is told when a sample goes wrong. Reads no token."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.data.packed_dataset import DOCUMENTS_NAME, PackedDataset
from pipeline.data.token_parts import read_document_rows


@dataclass(frozen=True)
class PlacedDocument:
    """A document, or a piece of one, in tokens `[start, stop)` of a sample."""

    document: int
    """Its row in documents.arrow."""
    name: str
    """As its source calls it."""
    start: int
    stop: int


def documents_within(dataset: PackedDataset, sample: int, *, start: int, stop: int) -> tuple[PlacedDocument, ...]:
    """The documents of a sample that have a token in `[start, stop)`, in order."""
    boundaries = dataset.sample(sample).cu_seqlens.tolist()
    names = read_document_rows(dataset.folder / DOCUMENTS_NAME)["name"]
    return tuple(
        PlacedDocument(document, names[document].as_py(), first, last)
        for document, first, last in zip(_document_ids(dataset, sample), boundaries[:-1], boundaries[1:], strict=True)
        if first < stop and last > start
    )


def _document_ids(dataset: PackedDataset, sample: int) -> list[int]:
    """Of each piece of a sample, from its row in its part file."""
    part = int(dataset.index.part[sample])
    row = sample - int(np.searchsorted(dataset.index.part, part))
    with pa.memory_map(str(dataset.folder / dataset.manifest.parts[part].name)) as source:
        for number, batch in enumerate(pa.ipc.open_stream(source)):
            if number == row:
                ids: list[int] = batch.column("document_ids")[0].as_py()
                return ids
    raise AssertionError(f"part {part} has no row {row}, and its size was checked when the data set was opened")
