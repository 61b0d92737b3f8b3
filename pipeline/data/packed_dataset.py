"""A packed data set on disk: a folder that `datasets.load_from_disk` opens and from which a rank preads its slice.

    data-00000-of-0000N.arrow          Arrow IPC stream, one record batch per sample (PART_SCHEMA)
    dataset_info.json state.json       what `datasets` asks for
    index.npz                          per sample: part, byte offset of its tokens, counts, boundaries, checksum
    documents.arrow                    one row per document: source, name, first token, length
    tokenizer/                         loaded by AutoTokenizer
    manifest.json                      counts and origin; written last

Between write and loader in the data path. Reading needs no Arrow: the index says where the bytes lie.
"""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.files import file_digest, read_bytes_at
from pipeline.data.manifest import Manifest, PartFile, read_manifest
from pipeline.errors import DataError
from pipeline.files import replaced, write_json

INDEX_NAME = "index.npz"
DOCUMENTS_NAME = "documents.arrow"
TOKENIZER_NAME = "tokenizer"
WORK_NAME = ".alst-pack"  # stages keep what they need for each other here; finish removes it
TOKEN_BYTES = 4

PART_SCHEMA = pa.schema(
    [
        ("input_ids", pa.large_list(pa.uint32())),  # int32 list offsets overflow at 580 rows of 3.7M tokens
        ("n_tokens", pa.int64()),
        ("cu_seqlens", pa.list_(pa.int32())),
        ("n_valid", pa.int64()),
        ("cost", pa.int64()),
        ("document_ids", pa.list_(pa.int64())),
    ]
)


@dataclass(frozen=True, eq=False)
class SampleContent:
    """A sample on its way to disk."""

    input_ids: NDArray[np.uint32]
    """[seq_len]; zeros from the last document's end on"""
    cu_seqlens: NDArray[np.int32]
    """[pieces + 1], `[0, …, n_tokens]`"""
    document_ids: NDArray[np.int64]
    """[pieces]"""


@dataclass(frozen=True)
class PackedSample:
    """What is known of a sample without reading its tokens."""

    index: int
    n_tokens: int
    """Without padding."""
    n_valid: int
    """Labels that count: every token but the last of each document."""
    cost: int
    """Sum of squared document lengths, which attention's work follows."""
    cu_seqlens: NDArray[np.int32]
    """[documents + 1], `[0, …, n_tokens]`"""


@dataclass(frozen=True, eq=False)
class SampleIndex:
    """Where each sample lies and what it holds; all arrays [samples] unless noted."""

    part: NDArray[np.int32]
    payload_offset: NDArray[np.int64]
    """Byte of the part file at which the tokens begin."""
    n_tokens: NDArray[np.int64]
    n_valid: NDArray[np.int64]
    cost: NDArray[np.int64]
    checksum: NDArray[np.uint32]
    """crc32 of the tokens' bytes, padding included."""
    cu_offsets: NDArray[np.int64]
    """[samples + 1]: the boundaries of sample s are `cu_seqlens[cu_offsets[s]:cu_offsets[s + 1]]`"""
    cu_seqlens: NDArray[np.int32]
    """The samples' boundaries end to end."""


_INDEX_ARRAYS = tuple(field.name for field in fields(SampleIndex))


def save_index(index: SampleIndex, path: Path) -> None:
    """Writes the index atomically as one .npz; equal indexes are equal bytes."""
    with replaced(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **{name: getattr(index, name) for name in _INDEX_ARRAYS})


def load_index(path: Path) -> SampleIndex:
    """The index in `path`. Raises DataError if it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return SampleIndex(**{name: file[name] for name in _INDEX_ARRAYS})
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise DataError(f"index {path} cannot be read ({error}); delete the data set and pack again") from error


def joined_index(parts: list[SampleIndex]) -> SampleIndex:
    """One index of several parts' indexes, in order."""
    joined = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in _INDEX_ARRAYS
        if name not in ("part", "cu_offsets")
    }
    numbers = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.part) for part in parts])
    sizes = np.concatenate([np.diff(part.cu_offsets) for part in parts])
    return SampleIndex(**joined, part=numbers, cu_offsets=np.concatenate([[0], np.cumsum(sizes)]))


def write_part(path: Path, *, samples: Iterable[SampleContent]) -> SampleIndex:
    """Writes a part file atomically, a record batch per sample, and returns where its samples lie.

    Holds one sample at a time. In the index the part's number is 0; `joined_index` gives the real one.
    """
    rows: list[dict[str, Any]] = []
    cu_seqlens: list[NDArray[np.int32]] = []
    with replaced(path) as temporary:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, PART_SCHEMA) as stream:
            for sample in samples:
                row = _row(sample)
                stream.write_batch(_record_batch(sample, row=row))
                rows.append(row)
                cu_seqlens.append(sample.cu_seqlens)
        offsets = _payload_offsets(temporary)
    sizes = [len(boundaries) for boundaries in cu_seqlens]
    return SampleIndex(
        part=np.zeros(len(rows), np.int32),
        payload_offset=np.array(offsets, np.int64),
        n_tokens=np.array([row["n_tokens"] for row in rows], np.int64),
        n_valid=np.array([row["n_valid"] for row in rows], np.int64),
        cost=np.array([row["cost"] for row in rows], np.int64),
        checksum=np.array([row["checksum"] for row in rows], np.uint32),
        cu_offsets=np.cumsum([0, *sizes], dtype=np.int64),
        cu_seqlens=np.concatenate(cu_seqlens),
    )


def _row(sample: SampleContent) -> dict[str, int]:
    lengths = np.diff(sample.cu_seqlens).astype(np.int64)  # a square of 15M tokens does not fit into int32
    return {
        "n_tokens": int(sample.cu_seqlens[-1]),
        "n_valid": int(sample.cu_seqlens[-1]) - len(lengths),
        "cost": int((lengths * lengths).sum()),
        "checksum": zlib.crc32(sample.input_ids.data),
    }


def _record_batch(sample: SampleContent, *, row: dict[str, int]) -> pa.RecordBatch:
    """One row of PART_SCHEMA; the tokens are not copied."""
    ends = pa.array([0, len(sample.input_ids)], pa.int64())
    columns = [
        pa.LargeListArray.from_arrays(ends, pa.array(sample.input_ids)),
        pa.array([row["n_tokens"]], pa.int64()),
        pa.array([sample.cu_seqlens], pa.list_(pa.int32())),
        pa.array([row["n_valid"]], pa.int64()),
        pa.array([row["cost"]], pa.int64()),
        pa.array([sample.document_ids], pa.list_(pa.int64())),
    ]
    return pa.record_batch(columns, schema=PART_SCHEMA)


def _payload_offsets(path: Path) -> list[int]:
    """Byte of the file at which each sample's tokens begin; asked of Arrow, which alone knows its padding."""
    with pa.memory_map(str(path)) as source:
        base = source.read_buffer().address
        source.seek(0)
        offsets = []
        for batch in pa.ipc.open_stream(source):
            values = batch.column("input_ids").values
            offsets.append(values.buffers()[1].address - base + TOKEN_BYTES * values.offset)
    return offsets


def write_datasets_files(folder: Path, *, part_names: list[str], fingerprint: str) -> None:
    """The two files that make `folder` one that `datasets.load_from_disk` opens."""

    def value(dtype: str) -> dict[str, str]:
        return {"dtype": dtype, "_type": "Value"}

    features = {
        "input_ids": {"feature": value("uint32"), "_type": "LargeList"},
        "n_tokens": value("int64"),
        "cu_seqlens": {"feature": value("int32"), "_type": "List"},
        "n_valid": value("int64"),
        "cost": value("int64"),
        "document_ids": {"feature": value("int64"), "_type": "List"},
    }
    write_json(folder / "dataset_info.json", {"citation": "", "description": "", "features": features})
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in part_names],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    write_json(folder / "state.json", state)


@dataclass(frozen=True, eq=False)
class PackedDataset:
    """A complete packed data set, open for reading: its manifest and index in memory, its tokens on disk."""

    folder: Path
    manifest: Manifest
    index: SampleIndex

    @classmethod
    def open(cls, folder: Path) -> "PackedDataset":
        """Opens `folder`. Raises DataError if it is missing, unfinished, of another format, or a file was cut off."""
        manifest = read_manifest(folder)
        if manifest is None:
            found = "packing of it has not finished" if (folder / WORK_NAME).exists() else "it has no manifest.json"
            raise DataError(f"{folder} is not a packed data set: {found}; make it with `alst pack`")
        for part in manifest.parts:
            _check_part_file(folder / part.name, part=part)
        if not (folder / INDEX_NAME).exists() or file_digest(folder / INDEX_NAME) != manifest.index_sha256:
            raise DataError(
                f"{folder / INDEX_NAME} is missing or not the one the manifest names; it was damaged: "
                "copy the data set again, or delete it and pack again"
            )
        return cls(folder, manifest, load_index(folder / INDEX_NAME))

    @property
    def samples(self) -> int:
        return self.manifest.samples

    @property
    def seq_len(self) -> int:
        return self.manifest.seq_len

    def sample(self, index: int) -> PackedSample:
        """What is known of sample `index` without reading it."""
        first, last = self.index.cu_offsets[index : index + 2]
        return PackedSample(
            index=index,
            n_tokens=int(self.index.n_tokens[index]),
            n_valid=int(self.index.n_valid[index]),
            cost=int(self.index.cost[index]),
            cu_seqlens=self.index.cu_seqlens[first:last],
        )

    def read_tokens(self, sample: int, start: int, stop: int) -> NDArray[np.uint32]:
        """Tokens `[start, stop)` of a sample, uint32 [stop - start]; zeros in its padding. Reads those bytes only.

        Raises ValueError outside `[0, seq_len]`, DataError if the part file is gone or cut off.
        """
        if not (0 <= start <= stop <= self.seq_len and 0 <= sample < self.samples):
            raise ValueError(
                f"tokens [{start}, {stop}) of sample {sample} do not exist: {self.samples} samples of {self.seq_len}"
            )
        tokens = np.empty(stop - start, np.uint32)
        path = self.folder / self.manifest.parts[self.index.part[sample]].name
        offset = int(self.index.payload_offset[sample]) + TOKEN_BYTES * start
        try:
            read_bytes_at(path, offset=offset, target=tokens.view(np.uint8).data)
        except OSError as error:
            raise DataError(f"sample {sample} in {path} cannot be read: {error.strerror}; copy it again") from error
        return tokens

    def damaged_samples(self) -> tuple[int, ...]:
        """Samples whose tokens are not the ones that were written. Reads the whole data set."""
        return tuple(
            sample
            for sample in range(self.samples)
            if zlib.crc32(self.read_tokens(sample, 0, self.seq_len).data) != self.index.checksum[sample]
        )

    def verify(self) -> None:
        """Raises DataError if a sample's checksum is wrong, and names the file. Reads the whole data set."""
        if damaged := self.damaged_samples():
            files = sorted({self.manifest.parts[self.index.part[sample]].name for sample in damaged})
            raise DataError(
                f"{len(damaged)} samples of {self.folder} are not what was written (first: sample {damaged[0]}; files "
                f"{', '.join(files)}); copy those files again, or delete the data set and pack again"
            )


def _check_part_file(path: Path, *, part: PartFile) -> None:
    size = path.stat().st_size if path.exists() else None
    if size != part.size_bytes:
        found = "is missing" if size is None else f"has {size} bytes"
        raise DataError(
            f"{path} {found}, and the manifest says {part.size_bytes} bytes; copy it again, or delete the data set "
            "and pack again"
        )
