"""Texts become token ids: one unit of work becomes one token part.

Third stop of the data path: RawDocument, TokenizedDocument -> token part. Memory is bounded by a batch and the longest
text.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from pipeline.data.chat import ChatTemplate
from pipeline.data.loss_runs import Runs, clipped, runs_of_mask
from pipeline.data.packed_dataset import TOKEN_BYTES
from pipeline.data.source_documents import RawDocument, TokenizedDocument, documents
from pipeline.data.sources import Unit, content_hash
from pipeline.data.token_parts import EVERY_TOKEN, ROW_SCHEMA, TokenPart, TokenRecord
from pipeline.errors import DataError
from pipeline.files import replaced, write_json
from pipeline.recipe.schema import Source

BATCH_CHARACTERS = 1 << 20  # the library's encodings take about 150 bytes per token while a batch is alive
BATCH_DOCUMENTS = 1024
IDS = 1 << 32  # ids are below it: they are stored in 32 bits

AnyDocument = RawDocument | TokenizedDocument
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

    def encode(self, batch: Sequence[RawDocument]) -> list[TokenizedDocument]:
        """Tokens of texts, and which of them count."""
        assert self.tokenizer is not None
        texts = [document.text for document in batch]
        if any(document.counted is not None for document in batch):
            encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        else:
            encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [self._document(raw, encoding) for raw, encoding in zip(batch, encodings, strict=True)]

    def _document(self, raw: RawDocument, encoding: Any) -> TokenizedDocument:
        ids = list(encoding.ids)
        if raw.counted is not None:
            return TokenizedDocument(raw.name, np.array(ids, np.uint32), _counted(encoding.offsets, raw.counted))
        if self.separator_id is not None and ids:
            ids.append(self.separator_id)
        return TokenizedDocument(raw.name, np.array(ids, np.uint32), None)


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

    A token id at or above `encoder.vocab_limit`, or below 0, is a DataError that names the text.
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
        for batch, text_bytes in _batches(unit, source=source, encoder=encoder, on_skip=writer.skip):
            before = writer.documents, writer.tokens
            writer.write(batch)
            advance(writer.documents - before[0], writer.tokens - before[1], text_bytes)
    write_json(part.record_path, asdict(writer.record(key=key, content=content)))


def _batches(
    unit: Unit, *, source: Source, encoder: Encoder, on_skip: Callable[[str], None]
) -> Iterator[tuple[list[TokenizedDocument], int]]:
    """Batches of tokens, and the bytes they were made of."""
    for batch in _bounded(documents(unit, source=source, chat=encoder.chat, on_skip=on_skip)):
        texts = [document for document in batch if isinstance(document, RawDocument)]
        tokens = [document for document in batch if isinstance(document, TokenizedDocument)]
        text_bytes = sum(len(text.text.encode()) for text in texts)
        token_bytes = sum(document.input_ids.nbytes for document in tokens)
        yield tokens + (encoder.encode(texts) if texts else []), text_bytes + token_bytes


def _bounded(found: Iterator[AnyDocument]) -> Iterator[list[AnyDocument]]:
    """Batches that are bounded in documents and in characters or tokens; one document alone may be larger."""
    batch: list[AnyDocument] = []
    size = 0
    for document in found:
        length = len(document.text) if isinstance(document, RawDocument) else len(document.input_ids)
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
        self.max_token_id = -1
        self._in_place: bool | None = None
        """Whether the tokens stay in the unit's file; the first document tells."""

    def skip(self, _: str) -> None:
        """A file that is not UTF-8."""
        self.files_skipped += 1

    def write(self, batch: list[TokenizedDocument]) -> None:
        """Checks token ids, cuts what is too long, and appends."""
        table: list[tuple[int, str, int, int, int, int]] = []
        for document in batch:
            self.texts += 1
            self.texts_without_tokens += not len(document.input_ids)
            self._check_ids(document)
            table += self._cut(document, offset=self._stored(document))
        columns = zip(*table, strict=True) if table else ((),) * len(ROW_SCHEMA)
        arrays = [pa.array(column, kind.type) for column, kind in zip(columns, ROW_SCHEMA, strict=True)]
        self._rows.write_batch(pa.record_batch(arrays, schema=ROW_SCHEMA))
        self.documents += len(table)

    def _check_ids(self, document: TokenizedDocument) -> None:
        ids = document.input_ids
        self.tokens += len(ids)
        if not len(ids):
            return
        largest = int(
            np.maximum.reduce(ids.view(f"u{ids.itemsize}"))
        )  # a negative id is a huge one: half the time of two looks
        if largest >= min(self._limit or IDS, IDS):
            wrong = int(ids.min()) if int(ids.min()) < 0 else largest
            rule = "is no token" if wrong < 0 or wrong >= IDS else f"is outside the vocabulary of {self._limit}"
            raise DataError(
                f"token id {wrong} in {document.name} {rule}; set data.tokenizer to the model's own, raise "
                "model.config.vocab_size, or repair the row"
            )
        self.max_token_id = max(self.max_token_id, largest)

    def _stored(self, document: TokenizedDocument) -> int:
        """Byte at which the tokens lie; they are written unless the unit's file holds them as they are."""
        if self._in_place is None:
            self._in_place = document.stored_at is not None
        if not self._in_place:
            offset = self._tokens_file.tell()
            self._tokens_file.write(document.input_ids.astype(np.uint32, copy=False).data)
            return offset
        if document.stored_at is None:
            raise DataError(f"{self._unit.files[0].path} is compressed in part; save it again without compression")
        return document.stored_at

    def _cut(self, document: TokenizedDocument, *, offset: int) -> Iterator[tuple[int, str, int, int, int, int]]:
        """Rows of ROW_SCHEMA: documents of at most max_document_tokens, in order, without gap."""
        length = len(document.input_ids)
        step = self._most or max(length, 1)
        for first in range(0, length, step):
            size, count = min(step, length - first), EVERY_TOKEN
            if document.loss_runs is not None:
                runs = clipped(document.loss_runs, start=first, stop=first + size)
                self._runs_file.write(np.ascontiguousarray(runs, np.int32).tobytes())
                count = len(runs)
            yield self._unit.source, document.name, first, size, offset + TOKEN_BYTES * first, count

    def record(self, *, key: str, content: str) -> TokenRecord:
        return TokenRecord(
            key=key,
            content=content,
            texts=self.texts,
            texts_without_tokens=self.texts_without_tokens,
            files_skipped=self.files_skipped,
            documents=self.documents,
            tokens=self.tokens,
            max_token_id=self.max_token_id,
            stored_in=str(self._unit.files[0].path.resolve()) if self._in_place else None,
        )
