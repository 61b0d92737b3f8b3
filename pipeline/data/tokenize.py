"""Texts become token ids: one unit of work becomes one token part.

Third stop of the data path: RawDocument, TokenizedDocuments -> token part. Memory is bounded by a batch and the longest
text.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pipeline.data.chat import ChatTemplate
from pipeline.data.loss_runs import Runs, clipped, runs_of_mask
from pipeline.data.packed_dataset import TOKEN_BYTES
from pipeline.data.source_documents import RawDocument, documents
from pipeline.data.source_tokens import TokenizedDocuments, is_tokenized, tokenized_documents
from pipeline.data.sources import Unit, content_hash
from pipeline.data.token_ids import largest_id
from pipeline.data.token_parts import EVERY_TOKEN, ROW_SCHEMA, TokenPart, TokenRecord
from pipeline.errors import DataError
from pipeline.files import replaced, write_json
from pipeline.recipe.schema import Source

BATCH_CHARACTERS = 1 << 20  # the library's encodings take about 150 bytes per token while a batch is alive
BATCH_DOCUMENTS = 1024

Advance = Callable[[int, int, int], None]
"""Told of documents, tokens and bytes of text that were done."""


@dataclass(frozen=True)
class Encoder:
    """What turns documents into tokens, and which ids there may be."""

    tokenizer: Tokenizer | None
    """None where every source is tokenized already"""
    chat: ChatTemplate | None = None
    separator_id: int | None = None
    """Appended to every text that is no chat"""
    vocab_limit: int | None = None
    """Ids are below it; None is unknown"""

    def encode(self, batch: Sequence[RawDocument]) -> TokenizedDocuments:
        """Tokens of texts, and which of them count."""
        assert self.tokenizer is not None
        texts = [document.text for document in batch]
        if any(document.counted is not None for document in batch):
            encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        else:
            encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = [self._ids(raw, encoding) for raw, encoding in zip(batch, encodings, strict=True)]
        runs = [
            None if raw.counted is None else _counted(encoding.offsets, raw.counted)
            for raw, encoding in zip(batch, encodings, strict=True)
        ]
        return TokenizedDocuments(
            pa.array([raw.name for raw in batch], pa.string()),
            np.concatenate([np.array(found, np.uint32) for found in ids]),
            np.cumsum([0, *map(len, ids)], dtype=np.int64),
            None if all(found is None for found in runs) else runs,
        )

    def _ids(self, raw: RawDocument, encoding: Any) -> list[int]:
        ids: list[int] = encoding.ids
        if raw.counted is None and self.separator_id is not None and ids:
            return [*ids, self.separator_id]
        return ids


def _counted(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> Runs:
    """The tokens that hold a character of one of the spans."""
    begin, end = np.array(offsets, np.int64).reshape(-1, 2).T
    starts, stops = np.array(spans, np.int64).reshape(-1, 2).T
    span = np.searchsorted(stops, begin, side="right")  # the first span that ends behind the token's beginning
    inside = span < len(stops)
    counts = inside & (end > begin)
    counts[inside] &= end[inside] > starts[span[inside]]
    return runs_of_mask(counts)


def tokenize(unit: Unit, *, source: Source, encoder: Encoder, part: TokenPart, key: str, advance: Advance) -> None:
    """Tokenizes all documents of `unit` into `part`, and records that it is whole.

    A token id at or above `encoder.vocab_limit`, or below 0, is a DataError that names the text; those that stay in the
    unit's file are checked when they are read to be written.
    """
    part.folder.mkdir(parents=True, exist_ok=True)
    content = content_hash(unit)
    with (
        replaced(part.tokens_path) as tokens_path,
        replaced(part.runs_path) as runs_path,
        replaced(part.documents_path) as documents_path,
        tokens_path.open("wb") as tokens_file,
        runs_path.open("wb") as runs_file,
        pa.ipc.new_stream(str(documents_path), ROW_SCHEMA) as rows,
    ):
        writer = _PartWriter(unit, source.max_document_tokens, encoder.vocab_limit, tokens_file, runs_file, rows)
        for batch, size in _batches(unit, source=source, encoder=encoder, on_skip=writer.skip):
            before = writer.documents, writer.tokens
            writer.write(batch)
            advance(writer.documents - before[0], writer.tokens - before[1], size)
    write_json(part.record_path, asdict(writer.record(key=key, content=content)))


def _batches(
    unit: Unit, *, source: Source, encoder: Encoder, on_skip: Callable[[str], None]
) -> Iterator[tuple[TokenizedDocuments, int]]:
    """Batches of tokens, and the bytes they were made of."""
    if is_tokenized(source):
        for found in tokenized_documents(unit, source=source):
            yield found, found.input_ids.nbytes
        return
    for batch in _bounded(documents(unit, source=source, chat=encoder.chat, on_skip=on_skip)):
        yield encoder.encode(batch), sum(len(text.text.encode()) for text in batch)


def _bounded(found: Iterator[RawDocument]) -> Iterator[list[RawDocument]]:
    """Batches that are bounded in documents and in characters; one document alone may be larger."""
    batch: list[RawDocument] = []
    size = 0
    for document in found:
        length = len(document.text)
        if batch and (len(batch) == BATCH_DOCUMENTS or size + length > BATCH_CHARACTERS):
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += length
    if batch:
        yield batch


class _PartWriter:
    """Appends documents to the files of a part, and counts what its completion record needs."""

    def __init__(
        self,
        unit: Unit,
        max_document_tokens: int | None,
        vocab_limit: int | None,
        tokens_file: IO[bytes],
        runs_file: IO[bytes],
        rows: pa.RecordBatchStreamWriter,
    ) -> None:
        self._unit, self._most, self._limit = unit, max_document_tokens, vocab_limit
        self._tokens_file, self._runs_file, self._rows = tokens_file, runs_file, rows
        self.texts = self.texts_without_tokens = self.files_skipped = self.documents = self.tokens = 0
        self._in_place: bool | None = None
        """Whether the tokens stay in the unit's file; the first that are found tell."""

    def skip(self, _: str) -> None:
        """A file that is not UTF-8."""
        self.files_skipped += 1

    def write(self, found: TokenizedDocuments) -> None:
        """Appends documents, and cuts those that are too long."""
        lengths = np.diff(found.offsets)
        self.texts += len(lengths)
        self.texts_without_tokens += int((lengths == 0).sum())
        if len(found.input_ids):
            self.tokens += len(found.input_ids)
            self._append(found, lengths=lengths, stored_at=self._stored(found))

    def _stored(self, found: TokenizedDocuments) -> int:
        """Byte at which the tokens lie. Unless the unit's file holds them as they are, they are checked and written."""
        if self._in_place is None:
            self._in_place = found.stored_at is not None
        if not self._in_place:
            largest_id(found.input_ids, limit=self._limit, name_of=found.name_at)
            offset = self._tokens_file.tell()
            self._tokens_file.write(found.input_ids.astype(np.uint32, copy=False).data)
            return offset
        if found.stored_at is None:
            raise DataError(f"{self._unit.files[0].path} is compressed in part; save it again without compression")
        return found.stored_at

    def _append(self, found: TokenizedDocuments, *, lengths: NDArray[np.int64], stored_at: int) -> None:
        """Rows of ROW_SCHEMA: documents of at most max_document_tokens, in order, without gap."""
        step = self._most or int(lengths.max())
        pieces = -(-lengths // step)
        document = np.repeat(np.arange(len(lengths)), pieces)
        first = step * (np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces))
        size = np.minimum(step, lengths[document] - first)
        counts = np.full(len(document), EVERY_TOKEN, np.int32)
        if found.loss_runs is not None:
            counts[:] = [
                self._append_runs(found.loss_runs[number], start=start, stop=start + length)
                for number, start, length in zip(document.tolist(), first.tolist(), size.tolist(), strict=True)
            ]
        columns = [
            pa.array(np.full(len(document), self._unit.source, np.int32)),
            found.names.take(pa.array(document)),
            pa.array(first),
            pa.array(size),
            pa.array(stored_at + TOKEN_BYTES * (found.offsets[document] + first)),
            pa.array(counts),
        ]
        self._rows.write_batch(pa.record_batch(columns, schema=ROW_SCHEMA))
        self.documents += len(document)

    def _append_runs(self, runs: Runs | None, *, start: int, stop: int) -> int:
        """How many runs of the tokens `[start, stop)` were appended."""
        if runs is None:
            return EVERY_TOKEN
        inside = clipped(runs, start=start, stop=stop)
        self._runs_file.write(np.ascontiguousarray(inside, np.int32).tobytes())
        return len(inside)

    def record(self, *, key: str, content: str) -> TokenRecord:
        return TokenRecord(
            key=key,
            content=content,
            texts=self.texts,
            texts_without_tokens=self.texts_without_tokens,
            files_skipped=self.files_skipped,
            documents=self.documents,
            tokens=self.tokens,
            in_place=bool(self._in_place),
        )
