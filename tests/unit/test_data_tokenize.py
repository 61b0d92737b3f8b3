"""Tokenizing: the tokenizer is the same everywhere, tokens and document lengths agree, a part is whole or absent."""

import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from pipeline.data import tokenize as module
from pipeline.data import tokenizer as tokenizer_module
from pipeline.data.sources import units
from pipeline.data.token_parts import TokenPart, TokenReader, TokenRecord, read_document_rows
from pipeline.data.tokenize import Encoder, tokenize
from pipeline.data.tokenizer import (
    END_OF_TEXT,
    load_tokenizer,
    save_tokenizer,
    tokenizer_hash,
    train_tokenizer,
    training_texts,
)
from pipeline.errors import DataError
from pipeline.recipe.schema import JsonlSource, TextSource, TrainTokenizer
from tests.unit.data_support import number_tokenizer, numbered_documents, write_corpus

SETTINGS = TrainTokenizer(vocab_size=400, sample_mib=1.0)


def code_source() -> TextSource:
    return TextSource(type="text", path="python:stdlib", glob="json/*.py")


def jsonl(path: Path, **settings: object) -> JsonlSource:
    return JsonlSource.model_validate({"type": "jsonl", "path": str(path), **settings})


def run(
    source: Any, folder: Path, *, separator_id: int | None = None, vocab_limit: int | None = None, **settings: Any
) -> TokenRecord:
    """The source's only unit, tokenized by numbers."""
    encoder = Encoder(load_tokenizer(number_tokenizer(folder / "numbers")), None, separator_id, vocab_limit)
    (unit,) = units([source])
    advance = settings.get("advance", lambda *_: None)
    tokenize(unit, source=source, encoder=encoder, part=TokenPart(folder), key="key", advance=advance)
    record = TokenPart(folder).record(key="key", unit=unit)
    assert record
    return record


def read(folder: Path) -> list[list[int]]:
    """All documents of the part in `folder`."""
    with TokenReader([TokenPart(folder)]) as reader:
        found = []
        for document, length in enumerate(reader.lengths):
            tokens, zero = np.empty(length, np.uint32), np.zeros(1, np.int64)
            reader.read_into(tokens, document=np.array([document]), start=zero, ends=np.array([length]))
            found.append(tokens.tolist())
    return found


def test_the_trained_tokenizer_is_the_same_in_every_process(tmp_path: Path) -> None:
    code = (
        "from pipeline.data.tokenizer import *; from pipeline.recipe.schema import *\n"
        "source = TextSource(type='text', path='python:stdlib', glob='json/*.py')\n"
        "settings = TrainTokenizer(vocab_size=400, sample_mib=1.0)\n"
        "print(tokenizer_hash(train_tokenizer([source], settings=settings)))"
    )
    command = [sys.executable, "-c", code]
    other = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"})
    assert other.stdout.strip() == tokenizer_hash(train_tokenizer([code_source()], settings=SETTINGS))


def test_the_training_sample_is_spread_over_all_sources(tmp_path: Path) -> None:
    sources = []
    for name in "ab":
        for number in range(50):
            path = tmp_path / name / f"{number:02}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"{name}{number:02}" * 100)
        sources.append(TextSource(type="text", path=str(tmp_path / name)))
    taken = [text[:3] for text in training_texts(sources, budget=3000)]
    assert len(taken) == 10
    assert [text[0] for text in taken].count("b") == 5
    assert max(text for text in taken if text[0] == "a") >= "a40"


def test_the_saved_tokenizer_is_a_hugging_face_one_that_encodes_identically(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = train_tokenizer([code_source()], settings=SETTINGS)
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    save_tokenizer(tokenizer, tmp_path / "tokenizer")  # replaces
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    text = f"def f(x):\n\treturn  'é 😀'{END_OF_TEXT} . , ok"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert loaded(text, add_special_tokens=False)["input_ids"] == ids
    assert loaded.decode(ids) == text
    assert loaded.eos_token == END_OF_TEXT
    assert loaded.eos_token_id == tokenizer.token_to_id(END_OF_TEXT)
    assert tokenizer_hash(load_tokenizer(str(tmp_path / "tokenizer"))) == tokenizer_hash(tokenizer)


def test_a_tokenizer_file_that_truncates_or_pads_does_neither_here(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(number_tokenizer(tmp_path) + "/tokenizer.json")
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).encode("1 2 3 4 5 6").ids == [1, 2, 3, 4, 5, 6]


def test_a_tokenizer_that_is_not_there_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"'\./nowhere' cannot be loaded.*set data.tokenizer"):
        load_tokenizer("./nowhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"cannot be loaded"):
        load_tokenizer(str(tmp_path))

    class NoHub:
        @staticmethod
        def from_pretrained(name: str, revision: str) -> Tokenizer:
            raise Exception("offline")

    monkeypatch.setattr(tokenizer_module, "Tokenizer", NoHub)
    with pytest.raises(DataError, match=r"'org/model' cannot be loaded: offline; set data.tokenizer"):
        load_tokenizer("org/model")


def test_tokens_and_lengths_on_disk_are_the_documents(tmp_path: Path) -> None:
    corpus = numbered_documents([3, 1, 40, 7])[::-1]
    record = run(jsonl(write_corpus(tmp_path / "c.jsonl", corpus)), tmp_path / "work")
    assert read(tmp_path / "work") == corpus
    assert (record.texts, record.documents, record.tokens) == (4, 4, 51)
    assert TokenPart(tmp_path / "work").record(key="key") == record
    assert TokenPart(tmp_path / "work").record(key="other inputs") is None


def test_long_texts_are_cut_into_documents_that_lose_nothing(tmp_path: Path) -> None:
    corpus = numbered_documents([10, 4, 9])
    record = run(jsonl(write_corpus(tmp_path / "c.jsonl", corpus), max_document_tokens=4), tmp_path / "work")
    found = read(tmp_path / "work")
    assert [len(document) for document in found] == [4, 4, 2, 4, 4, 4, 1]
    assert list(chain(*found)) == list(chain(*corpus))
    rows = read_document_rows(TokenPart(tmp_path / "work").documents_path).to_pydict()
    assert rows["first_token"] == [0, 4, 8, 0, 0, 4, 8]
    assert rows["name"] == ["c.jsonl:1"] * 3 + ["c.jsonl:2"] + ["c.jsonl:3"] * 3
    assert (record.texts, record.documents) == (3, 7)


def test_texts_without_tokens_are_counted_and_are_no_documents(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "  "}\n{"text": "5"}\n')
    record = run(jsonl(path), tmp_path / "work")
    assert (record.texts, record.texts_without_tokens, record.documents) == (2, 1, 1)


def test_batches_are_bounded_and_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = numbered_documents([5] * 20)
    source = jsonl(write_corpus(tmp_path / "c.jsonl", corpus))
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 3)
    reports: list[tuple[int, int, int]] = []
    run(source, tmp_path / "work", advance=lambda *done: reports.append(done))
    assert read(tmp_path / "work") == corpus
    assert [documents for documents, _, _ in reports] == [3, 3, 3, 3, 3, 3, 2]
    assert sum(tokens for _, tokens, _ in reports) == 100
    assert sum(size for _, _, size in reports) <= Path(source.path).stat().st_size


def test_a_token_id_outside_the_models_vocabulary_is_an_error_that_names_the_text(tmp_path: Path) -> None:
    source = jsonl(write_corpus(tmp_path / "c.jsonl", numbered_documents([5, 5])))
    with pytest.raises(DataError, match=r"token id 10 in c.jsonl:2 is outside the vocabulary of 10; set"):
        run(source, tmp_path / "work", vocab_limit=10)
    assert run(source, tmp_path / "work", vocab_limit=11).tokens == 10


def test_a_part_that_fails_midway_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_corpus(tmp_path / "c.jsonl", numbered_documents([5] * 10))
    path.write_text(path.read_text() + "not json\n")
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 2)
    with pytest.raises(DataError, match=r"line 11"):
        run(jsonl(path), tmp_path / "work")
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["numbers"]
