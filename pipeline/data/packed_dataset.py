"""A packed data set on disk: a folder that `datasets.load_from_disk` opens and from which a rank preads its slice.

    data-00000-of-0000N.arrow          Arrow IPC stream, one record batch per sample (PART_SCHEMA)
    dataset_info.json state.json       what `datasets` asks for
    index.npz                          per sample: part, byte offset of its tokens, counts, boundaries, loss runs
    checksums.u64                      xxh3 of every slice of SLICE_TOKENS tokens, sample after sample
    documents.arrow                    one row per document: source, name, first token, length
    tokenizer/                         loaded by AutoTokenizer; absent where every source was tokenized already
    manifest.json                      counts and origin; written last

Between write and loader in the data path. Reading needs no Arrow: the index says where the bytes lie.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from pipeline.data.direct_file import DirectFile
from pipeline.data.files import file_digest, read_bytes_at
from pipeline.data.loss_runs import Runs, count_labels
from pipeline.data.manifest import Manifest, PartFile, read_manifest
from pipeline.direct_io import PAGE
from pipeline.errors import DataError
from pipeline.files import replaced, write_json

INDEX_NAME = "index.npz"
DOCUMENTS_NAME = "documents.arrow"
TOKENIZER_NAME = "tokenizer"
WORK_NAME = ".alst-pack"  # stages keep what they need for each other here; finish removes it
CHECKSUMS_NAME = "checksums.u64"
TOKEN_BYTES = 4
SLICE_TOKENS = 1024
"""Tokens under one checksum: one page, which is what a disk reads at least, so that a shard is verified from the pages
that hold it. Two partial slices add at most 5 % to a shard of 40,960 tokens; 8 bytes per slice are 0.2 % on disk."""

PART_SCHEMA = pa.schema(
    [
        ("n_tokens", pa.int64()),
        ("cu_seqlens", pa.list_(pa.int32())),
        ("n_valid", pa.int64()),
        ("cost", pa.int64()),
        ("document_ids", pa.list_(pa.int64())),
        ("loss_runs", pa.list_(pa.int32())),
        ("input_ids", pa.large_list(pa.uint32())),  # int32 list offsets overflow at 580 rows of 3.7M tokens
    ]
)
"""`loss_runs` is flat: start, stop, start, stop, … `input_ids` is last so that its bytes end a record batch."""


@dataclass(frozen=True, eq=False)
class SampleContent:
    """A sample on its way to disk."""

    input_ids: NDArray[np.uint32]
    """[seq_len]; zeros from the last document's end on"""
    cu_seqlens: NDArray[np.int32]
    """[pieces + 1], `[0, …, n_tokens]`"""
    document_ids: NDArray[np.int64]
    """[pieces]"""
    loss_runs: Runs
    max_token_id: int


@dataclass(frozen=True)
class PackedSample:
    """What is known of a sample without reading its tokens."""

    index: int
    n_tokens: int
    """Without padding."""
    n_valid: int
    """Labels that count."""
    cost: int
    """Sum of squared document lengths, which attention's work follows."""
    cu_seqlens: NDArray[np.int32]
    """[documents + 1], `[0, …, n_tokens]`"""
    loss_runs: Runs
    """Tokens that count where a token of their document precedes them"""


@dataclass(frozen=True, eq=False)
class SampleIndex:
    """Where each sample lies and what it holds; all arrays [samples] unless noted."""

    part: NDArray[np.int32]
    payload_offset: NDArray[np.int64]
    """Byte of the part file at which the tokens begin."""
    n_tokens: NDArray[np.int64]
    n_valid: NDArray[np.int64]
    cost: NDArray[np.int64]
    cu_offsets: NDArray[np.int64]
    """[samples + 1]: the boundaries of sample s are `cu_seqlens[cu_offsets[s]:cu_offsets[s + 1]]`"""
    cu_seqlens: NDArray[np.int32]
    """The samples' boundaries end to end."""
    run_offsets: NDArray[np.int64]
    """[samples + 1]: the loss runs of sample s are `loss_runs[run_offsets[s]:run_offsets[s + 1]]`"""
    loss_runs: Runs
    """The samples' loss runs end to end."""


@dataclass(frozen=True, eq=False)
class WrittenPart:
    """What is known of a part file once it is written."""

    index: SampleIndex
    """Of its samples; the part's number in it is 0, `joined_index` gives the real one."""
    checksums: NDArray[np.uint64]
    """[samples, slices of a sample]"""
    frame_checksum: str
    """xxh3 (hex) of the file's bytes that are no tokens."""
    max_token_id: int


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
        if name not in ("part", "cu_offsets", "run_offsets")
    }
    numbers = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.part) for part in parts])
    offsets = {
        name: np.concatenate([[0], np.cumsum(np.concatenate([np.diff(getattr(part, name)) for part in parts]))])
        for name in ("cu_offsets", "run_offsets")
    }
    return SampleIndex(**joined, **offsets, part=numbers)


def slice_checksums(tokens: NDArray[np.uint32]) -> list[int]:
    """xxh3 of each slice of SLICE_TOKENS tokens; the last may be shorter."""
    view, step = tokens.view(np.uint8).data, TOKEN_BYTES * SLICE_TOKENS
    return [xxhash.xxh3_64_intdigest(view[at : at + step]) for at in range(0, len(view), step)]


def write_part(path: Path, *, samples: Iterable[SampleContent]) -> WrittenPart:
    """Writes a part file atomically, a record batch per sample; samples may use the same memory one after the other."""
    with replaced(path) as temporary, DirectFile(temporary) as file:
        stream = _PartStream(file)
        for sample in samples:
            stream.append(sample)
        stream.close()
    return WrittenPart(
        stream.index(), np.array(stream.checksums, np.uint64), stream.frame_checksum, stream.max_token_id
    )


class _Sink:
    """A file as pyarrow writes to it: told where in memory a sample's tokens are, it notes where they come to lie."""

    def __init__(self, file: DirectFile) -> None:
        self.file = file
        self.frame = xxhash.xxh3_64()
        """Of everything but tokens."""
        self.payload_address = self.payload_offset = 0
        self.closed = False

    def write(self, data: Any) -> int:
        """Bytes, or an array's own memory."""
        if isinstance(data, pa.Buffer) and data.address == self.payload_address:
            self.payload_offset = self.file.position
        else:
            self.frame.update(data)
        self.file.write(data)
        return len(memoryview(data))

    def flush(self) -> None:
        """The file is flushed when it is whole."""

    def close(self) -> None:
        """Its owner closes the file."""


class _PartStream:
    """An Arrow stream into a file, with the tokens of each sample at a page border, so that they are not copied."""

    def __init__(self, file: DirectFile) -> None:
        self._sink = _Sink(file)
        self._stream = pa.ipc.new_stream(pa.PythonFile(self._sink, mode="w"), PART_SCHEMA)
        self.checksums: list[list[int]] = []
        self.max_token_id = -1
        self._rows: list[dict[str, int]] = []
        self._cu_seqlens: list[NDArray[np.int32]] = []
        self._loss_runs: list[Runs] = []

    def append(self, sample: SampleContent) -> None:
        """Writes a sample."""
        self.checksums.append(slice_checksums(sample.input_ids))
        self.max_token_id = max(self.max_token_id, sample.max_token_id)
        row = _row(sample)
        batch = _record_batch(sample, row=row)
        payload = batch.column(len(PART_SCHEMA) - 1).values.buffers()[1]
        self._sink.payload_address = payload.address
        self._stream.write_batch(batch, custom_metadata={"": " " * self._padding(batch, payload=payload.size)})
        self._rows.append(row | {"payload_offset": self._sink.payload_offset})
        self._cu_seqlens.append(sample.cu_seqlens)
        self._loss_runs.append(sample.loss_runs)

    def close(self) -> None:
        """Ends the stream."""
        self._stream.close()

    @property
    def frame_checksum(self) -> str:
        """Of what was written besides tokens."""
        return str(self._sink.frame.hexdigest())

    def _padding(self, batch: pa.RecordBatch, *, payload: int) -> int:
        """Characters of metadata that move the tokens to a page border; at least 8, as none at all is less."""
        begin = self._sink.file.position or len(PART_SCHEMA.serialize())
        alignment = PAGE if payload >= 16 * PAGE else 64  # a page for every tiny sample would double it
        payload_at = begin + pa.ipc.get_record_batch_size(batch) - -(-payload // 8) * 8 + _metadata_bytes()
        return 8 + -payload_at % alignment

    def index(self) -> SampleIndex:
        """Where the samples lie."""
        columns = {name: np.array([row[name] for row in self._rows], np.int64) for name in _ROW}
        return SampleIndex(
            part=np.zeros(len(self._rows), np.int32),
            cu_offsets=np.cumsum([0, *map(len, self._cu_seqlens)], dtype=np.int64),
            cu_seqlens=np.concatenate(self._cu_seqlens),
            run_offsets=np.cumsum([0, *map(len, self._loss_runs)], dtype=np.int64),
            loss_runs=np.concatenate(self._loss_runs),
            **columns,
        )


_ROW = ("payload_offset", "n_tokens", "n_valid", "cost")


@cache
def _metadata_bytes() -> int:
    """What eight characters of metadata add to a record batch; asked of Arrow, which alone knows its padding."""
    schema = pa.schema([("x", pa.int64())])
    sizes = []
    for metadata in (None, {"": " " * 8}):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, schema) as stream:
            stream.write_batch(pa.record_batch([pa.array([0])], schema=schema), custom_metadata=metadata)
        sizes.append(sink.getvalue().size)
    return sizes[1] - sizes[0]


def _row(sample: SampleContent) -> dict[str, int]:
    lengths = np.diff(sample.cu_seqlens).astype(np.int64)  # a square of 15M tokens does not fit into int32
    return {
        "n_tokens": int(sample.cu_seqlens[-1]),
        "n_valid": count_labels(sample.loss_runs, cu_seqlens=sample.cu_seqlens),
        "cost": int((lengths * lengths).sum()),
    }


def _record_batch(sample: SampleContent, *, row: dict[str, int]) -> pa.RecordBatch:
    """One row of PART_SCHEMA; the tokens are not copied."""
    ends = pa.array([0, len(sample.input_ids)], pa.int64())
    columns = [
        pa.array([row["n_tokens"]], pa.int64()),
        pa.array([sample.cu_seqlens], pa.list_(pa.int32())),
        pa.array([row["n_valid"]], pa.int64()),
        pa.array([row["cost"]], pa.int64()),
        pa.array([sample.document_ids], pa.list_(pa.int64())),
        pa.array([sample.loss_runs.reshape(-1)], pa.list_(pa.int32())),
        pa.LargeListArray.from_arrays(ends, pa.array(sample.input_ids)),
    ]
    return pa.record_batch(columns, schema=PART_SCHEMA)


def write_datasets_files(folder: Path, *, part_names: list[str], fingerprint: str) -> None:
    """The two files that make `folder` one that `datasets.load_from_disk` opens."""

    def value(dtype: str) -> dict[str, str]:
        return {"dtype": dtype, "_type": "Value"}

    features = {
        "n_tokens": value("int64"),
        "cu_seqlens": {"feature": value("int32"), "_type": "List"},
        "n_valid": value("int64"),
        "cost": value("int64"),
        "document_ids": {"feature": value("int64"), "_type": "List"},
        "loss_runs": {"feature": value("int32"), "_type": "List"},
        "input_ids": {"feature": value("uint32"), "_type": "LargeList"},
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

    @property
    def slices(self) -> int:
        """Of a sample."""
        return -(-self.seq_len // SLICE_TOKENS)

    def sample(self, index: int) -> PackedSample:
        """What is known of sample `index` without reading it."""
        first, last = self.index.cu_offsets[index : index + 2]
        first_run, last_run = self.index.run_offsets[index : index + 2]
        return PackedSample(
            index=index,
            n_tokens=int(self.index.n_tokens[index]),
            n_valid=int(self.index.n_valid[index]),
            cost=int(self.index.cost[index]),
            cu_seqlens=self.index.cu_seqlens[first:last],
            loss_runs=self.index.loss_runs[first_run:last_run],
        )

    def read_tokens(self, sample: int, start: int, stop: int, *, verify: bool = False) -> NDArray[np.uint32]:
        """Tokens `[start, stop)` of a sample, uint32 [stop - start]; zeros in its padding. Reads those bytes only.

        With `verify` it reads the slices that hold them, and checks them. Raises ValueError outside `[0, seq_len]`,
        DataError if the part file is gone, cut off, or not what was written.
        """
        if not (0 <= start <= stop <= self.seq_len and 0 <= sample < self.samples):
            raise ValueError(
                f"tokens [{start}, {stop}) of sample {sample} do not exist: {self.samples} samples of {self.seq_len}"
            )
        if not verify:
            return self._read(sample, start, stop)
        first = start // SLICE_TOKENS
        tokens = self._read(sample, first * SLICE_TOKENS, min(-(-stop // SLICE_TOKENS) * SLICE_TOKENS, self.seq_len))
        if damaged := self._damaged_slices(sample, tokens, first=first):
            raise DataError(
                f"sample {sample} in {self._part_path(sample)} is not what was written, in the slices from byte "
                f"{int(self.index.payload_offset[sample]) + TOKEN_BYTES * SLICE_TOKENS * damaged[0]} on; copy the file "
                "again, or delete the data set and pack again"
            )
        return tokens[start - first * SLICE_TOKENS :][: stop - start]

    def _part_path(self, sample: int) -> Path:
        return self.folder / self.manifest.parts[self.index.part[sample]].name

    def _read(self, sample: int, start: int, stop: int) -> NDArray[np.uint32]:
        tokens = np.empty(stop - start, np.uint32)
        offset = int(self.index.payload_offset[sample]) + TOKEN_BYTES * start
        _read_into(self._part_path(sample), offset=offset, target=tokens)
        return tokens

    def _damaged_slices(self, sample: int, tokens: NDArray[np.uint32], *, first: int) -> list[int]:
        """Slices among those that `tokens` are, from slice `first` on, with another checksum than was written."""
        found = np.array(slice_checksums(tokens), np.uint64)
        written = np.empty(len(found), np.uint64)
        _read_into(self.folder / CHECKSUMS_NAME, offset=8 * (sample * self.slices + first), target=written)
        return (first + np.flatnonzero(found != written)).tolist()

    def damaged_samples(self) -> tuple[int, ...]:
        """Samples whose tokens are not the ones that were written. Reads the tokens of the whole data set."""
        return tuple(
            sample
            for sample in range(self.samples)
            if self._damaged_slices(sample, self._read(sample, 0, self.seq_len), first=0)
        )

    def damaged_parts(self) -> tuple[str, ...]:
        """Part files whose bytes beside the tokens, which `datasets` reads, are not the ones that were written."""
        return tuple(
            part.name
            for number, part in enumerate(self.manifest.parts)
            if self._frame_checksum(number) != part.frame_checksum
        )

    def _frame_checksum(self, part: int) -> str:
        file = self.manifest.parts[part]
        hasher, size = xxhash.xxh3_64(), TOKEN_BYTES * self.seq_len
        starts = self.index.payload_offset[self.index.part == part].tolist()
        for begin, end in zip([0, *(start + size for start in starts)], [*starts, file.size_bytes], strict=True):
            block = np.empty(end - begin, np.uint8)
            _read_into(self.folder / file.name, offset=begin, target=block)
            hasher.update(block.data)
        return hasher.hexdigest()

    def verify(self) -> None:
        """Raises DataError if a checksum is wrong, and names the file. Reads the whole data set."""
        samples, parts = self.damaged_samples(), self.damaged_parts()
        if samples or parts:
            files = sorted({self.manifest.parts[self.index.part[sample]].name for sample in samples} | set(parts))
            first = f" (first: sample {samples[0]})" if samples else ""
            raise DataError(
                f"{len(samples)} samples of {self.folder} are not what was written{first}, in files "
                f"{', '.join(files)}; copy those files again, or delete the data set and pack again"
            )


def _read_into(path: Path, *, offset: int, target: NDArray[Any]) -> None:
    try:
        read_bytes_at(path, offset=offset, target=target.view(np.uint8).data)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; copy it again") from error


def _check_part_file(path: Path, *, part: PartFile) -> None:
    size = path.stat().st_size if path.exists() else None
    if size != part.size_bytes:
        found = "is missing" if size is None else f"has {size} bytes"
        raise DataError(
            f"{path} {found}, and the manifest says {part.size_bytes} bytes; copy it again, or delete the data set "
            "and pack again"
        )
