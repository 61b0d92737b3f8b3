"""Texts become token ids: a tokenizer, trained or loaded, and a part file of uint32 tokens with its documents' lengths.

First stage of packing: RawDocument -> part `tokens-00000-of-00001`. A part is two files and a completion record,
written last: `.u32` holds the tokens of all its documents end to end, `.arrow` one row per document.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import rmtree
from typing import IO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipeline.data.files import fill, read_json
from pipeline.data.progress import PackProgress, ReportProgress
from pipeline.data.sources import RawDocument, documents, source_bytes
from pipeline.errors import DataError
from pipeline.files import replaced, write_json
from pipeline.recipe.schema import JsonlSource, TextSource, TrainTokenizer

END_OF_TEXT = "<|endoftext|>"
BATCH_CHARACTERS = 1 << 20  # the library's encodings take about 150 bytes per token while a batch is alive
BATCH_DOCUMENTS = 1024
TRAINING_TEXT_CHARACTERS = 1 << 18  # of one text; a single huge one must not be the whole training sample

DOCUMENT_SCHEMA = pa.schema(
    [("source", pa.int32()), ("name", pa.string()), ("first_token", pa.int64()), ("length", pa.int64())]
)
"""A row per document; its id is its row number. `first_token` is where it starts in a text that was cut."""

AnySource = TextSource | JsonlSource


@dataclass(frozen=True)
class TokenRecord:
    """The completion record of a token part."""

    key: str
    """Digest of the inputs it was made from."""
    texts: int
    texts_without_tokens: int
    files_skipped: int
    """Not UTF-8, and passed over as the recipe says."""
    documents: int
    """Texts, after `max_document_tokens` cut the long ones."""
    tokens: int
    max_token_id: int
    vocab_size: int
    tokenizer_hash: str


def train_tokenizer(sources: Sequence[AnySource], *, settings: TrainTokenizer) -> Tokenizer:
    """A byte-level BPE trained on about `sample_mib` of text, spread evenly over the sources; deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(sources, budget=int(settings.sample_mib * 2**20)), trainer=trainer)
    return tokenizer


def training_texts(sources: Sequence[AnySource], *, budget: int) -> Iterator[str]:
    """About `budget` characters of text, every n-th document: the head of an alphabet is not a fair sample."""
    share = min(1.0, budget / max(1, sum(source_bytes(source) for source in sources)))
    seen = taken = 0
    for index, source in enumerate(sources):
        for document in documents(source, index=index):
            text = document.text[:TRAINING_TEXT_CHARACTERS]
            if taken <= seen * share:
                yield text
                taken += len(text)
            seen += len(document.text)


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """The tokenizer in a folder (its tokenizer.json), or on the hub. Raises DataError if there is none."""
    folder = Path(name_or_path).expanduser()
    looks_local = folder.exists() or folder.is_absolute() or name_or_path.startswith((".", "~"))
    try:
        if looks_local:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json" if folder.is_dir() else folder))
        else:
            tokenizer = Tokenizer.from_pretrained(name_or_path)
    except Exception as error:  # the library raises bare Exception, whatever went wrong
        rule = "a folder with a tokenizer.json" if looks_local else "a hub name with a tokenizer.json, or a folder"
        raise DataError(
            f"tokenizer {name_or_path!r} cannot be loaded: {error}; set data.tokenizer to {rule}"
        ) from error
    tokenizer.no_truncation()  # some published tokenizers carry a limit of 512 tokens, or pad
    tokenizer.no_padding()
    return tokenizer


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """sha256 (hex) of the tokenizer's whole definition."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a folder that `AutoTokenizer.from_pretrained` loads, and replaces one that is there.

    Written here rather than by transformers, because a machine that packs need not have it.
    """
    config: dict[str, str | bool] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        config["eos_token"] = END_OF_TEXT
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    with replaced(temporary / "tokenizer.json") as path:
        path.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    write_json(temporary / "tokenizer_config.json", config)
    if folder.exists():
        rmtree(folder)
    temporary.rename(folder)


@dataclass(frozen=True)
class TokenPart:
    """Where a part of the tokens lies: `folder`, part `index` of `count`."""

    folder: Path
    index: int = 0
    count: int = 1

    @property
    def name(self) -> str:
        return f"tokens-{self.index:05d}-of-{self.count:05d}"

    @property
    def tokens_path(self) -> Path:
        return self.folder / f"{self.name}.u32"

    @property
    def record_path(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def documents_path(self) -> Path:
        return self.folder / f"{self.name}.arrow"

    def record(self, *, key: str) -> TokenRecord | None:
        """Its completion record, if it is complete and was made from the inputs that `key` stands for."""
        value = read_json(self.record_path)
        return TokenRecord(**value) if value and value.get("key") == key else None

    def forget(self) -> None:
        """Withdraws the completion record: first step of making the part again from other inputs."""
        self.record_path.unlink(missing_ok=True)


def tokenize(
    sources: Sequence[AnySource],
    *,
    tokenizer: Tokenizer,
    part: TokenPart,
    key: str,
    vocab_limit: int | None = None,
    progress: ReportProgress | None = None,
) -> TokenRecord:
    """Tokenizes all documents of `sources` into `part`, in bounded memory, and records that it is whole.

    `vocab_limit` is the model's vocab_size: a token id at or above it is a DataError that names the text. So are
    sources without a single token.
    """
    part.folder.mkdir(parents=True, exist_ok=True)
    writer = _PartWriter(tokenizer, sources=sources, vocab_limit=vocab_limit, progress=progress)
    with (
        replaced(part.tokens_path) as tokens_path,
        replaced(part.documents_path) as documents_path,
        tokens_path.open("wb") as tokens_file,
        pa.ipc.new_stream(str(documents_path), DOCUMENT_SCHEMA) as rows,
    ):
        for batch in _batches(writer.texts()):
            writer.write(batch, tokens_file=tokens_file, rows=rows)
    record = writer.record(key=key)
    if not record.tokens:
        raise DataError(
            f"{len(sources)} sources hold no token ({record.files_skipped} files are not UTF-8 and were skipped); "
            "set data.sources to texts"
        )
    write_json(part.record_path, asdict(record))
    return record


class _PartWriter:
    """Counts while it tokenizes: what the completion record and the progress line need."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        sources: Sequence[AnySource],
        vocab_limit: int | None,
        progress: ReportProgress | None,
    ) -> None:
        self.tokenizer, self.sources, self.vocab_limit, self.progress = tokenizer, sources, vocab_limit, progress
        self.bytes_total = sum(source_bytes(source) for source in sources)
        self.bytes_done = self.files_skipped = self.texts_read = self.texts_without_tokens = 0
        self.documents = self.tokens = 0
        self.max_token_id = -1

    def texts(self) -> Iterator[RawDocument]:
        for index, source in enumerate(self.sources):
            yield from documents(source, index=index, on_skip=self._count_skipped)

    def _count_skipped(self, name: str) -> None:
        self.files_skipped += 1

    def write(self, batch: list[RawDocument], *, tokens_file: IO[bytes], rows: pa.RecordBatchStreamWriter) -> None:
        """Tokenizes a batch of texts and appends its tokens and its document rows."""
        encodings = self.tokenizer.encode_batch_fast([text.text for text in batch], add_special_tokens=False)
        table: list[tuple[int, str, int, int]] = []
        for text, encoding in zip(batch, encodings, strict=True):
            ids = np.array(encoding.ids, dtype=np.uint32)
            self.texts_read += 1
            self.texts_without_tokens += not len(ids)
            self._check_ids(ids, text=text)
            tokens_file.write(ids.tobytes())
            table += self._cut(text, length=len(ids))
        columns = zip(*table, strict=True) if table else ((),) * len(DOCUMENT_SCHEMA)
        arrays = [pa.array(column, kind.type) for column, kind in zip(columns, DOCUMENT_SCHEMA, strict=True)]
        rows.write_batch(pa.record_batch(arrays, schema=DOCUMENT_SCHEMA))
        self.documents += len(table)
        self.bytes_done += sum(len(text.text.encode()) for text in batch)
        if self.progress:
            self.progress(
                PackProgress("tokenize", self.documents, self.tokens, self.bytes_done, max(self.bytes_total, 1))
            )

    def _check_ids(self, ids: NDArray[np.uint32], *, text: RawDocument) -> None:
        self.tokens += len(ids)
        largest = int(ids.max()) if len(ids) else -1
        self.max_token_id = max(self.max_token_id, largest)
        if self.vocab_limit is not None and largest >= self.vocab_limit:
            raise DataError(
                f"token id {largest} in {text.name} is outside the model's vocabulary of {self.vocab_limit}; "
                "set data.tokenizer to the model's own, or raise model.config.vocab_size"
            )

    def _cut(self, text: RawDocument, *, length: int) -> list[tuple[int, str, int, int]]:
        """Rows of DOCUMENT_SCHEMA: documents of at most max_document_tokens, in order, without gap."""
        step = self.sources[text.source].max_document_tokens or max(length, 1)
        return [(text.source, text.name, first, min(step, length - first)) for first in range(0, length, step)]

    def record(self, *, key: str) -> TokenRecord:
        return TokenRecord(
            key=key,
            texts=self.texts_read,
            texts_without_tokens=self.texts_without_tokens,
            files_skipped=self.files_skipped,
            documents=self.documents,
            tokens=self.tokens,
            max_token_id=self.max_token_id,
            vocab_size=self.tokenizer.get_vocab_size(with_added_tokens=True),
            tokenizer_hash=tokenizer_hash(self.tokenizer),
        )


def _batches(texts: Iterator[RawDocument]) -> Iterator[list[RawDocument]]:
    """Batches that are bounded in documents and in characters; one text alone may be larger."""
    batch: list[RawDocument] = []
    characters = 0
    for text in texts:
        if batch and (len(batch) == BATCH_DOCUMENTS or characters + len(text.text) > BATCH_CHARACTERS):
            yield batch
            batch, characters = [], 0
        batch.append(text)
        characters += len(text.text)
    if batch:
        yield batch


class TokenReader:
    """All token parts, read by document. Close it, or use it in a `with`.

    `lengths` int64 [documents]; a document's id counts over all parts in order.
    """

    def __init__(self, parts: Sequence[TokenPart]) -> None:
        self._paths = [part.tokens_path for part in parts]
        lengths = [read_document_rows(part.documents_path)["length"].to_numpy() for part in parts]
        self.lengths: NDArray[np.int64] = np.concatenate(lengths)
        self._first_document = np.cumsum([0, *(len(part) for part in lengths)])
        self._offsets = np.concatenate([np.cumsum(part) - part for part in lengths])
        self._descriptors: list[int] = []

    def __enter__(self) -> "TokenReader":
        self._descriptors = [os.open(path, os.O_RDONLY) for path in self._paths]
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []

    def read_into(self, target: NDArray[np.uint32], *, document: int, start: int) -> None:
        """Fills `target` with the tokens of `document` from its token `start` on."""
        part = int(np.searchsorted(self._first_document, document, side="right")) - 1
        fill(
            self._descriptors[part],
            offset=4 * (int(self._offsets[document]) + start),
            target=target.view(np.uint8).data,
            path=self._paths[part],
        )


def read_document_rows(path: Path) -> pa.Table:
    """The table of DOCUMENT_SCHEMA in `path`. Raises DataError if it is missing or damaged."""
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_stream(source).read_all()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"document list {path} cannot be read ({error}); delete the data set and pack again") from error
