"""Documents of every kind of source: the same rows say the same wherever they lie, and only what counts counts."""

import gzip
import json
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from pipeline.data import rows as rows_module
from pipeline.data import sources as sources_module
from pipeline.data.batch import IGNORE_INDEX, batch_of
from pipeline.data.chat import ChatTemplate
from pipeline.data.loss_runs import clipped, count_labels, joined, mask_of_runs, runs_of_mask
from pipeline.data.pack import pack
from pipeline.data.packed_dataset import PackedDataset
from pipeline.data.source_documents import RawDocument, documents
from pipeline.data.source_tokens import tokenized_documents
from pipeline.data.sources import units
from pipeline.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from pipeline.errors import DataError
from pipeline.recipe.schema import Source, TextSource, TrainTokenizer
from tests.unit.data_support import number_tokenizer, recipe_of

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [
    {"role": "user", "content": "Say yes."},
    {"role": "assistant", "content": " yes "},
    {"role": "user", "content": "assistant"},
    {"role": "assistant", "content": "assistant"},
]
ROLES = {"user": "messages.role.user", "assistant": "messages.role.assistant"}
TOKENS = [[5, 6, 7], [], [8], [9, 10, 11, 12]]


def source_of(kind: str, path: Path | str, **settings: Any) -> Any:
    return TypeAdapter(Source).validate_python({"type": kind, "path": str(path), **settings})


def read(source: Any, **settings: Any) -> list[Any]:
    return [found for unit in units([source]) for found in documents(unit, source=source, **settings)]


def read_tokens(source: Any) -> list[tuple[str, list[int], list[list[int]] | None]]:
    """Name, tokens and loss runs of every document."""
    return [
        (name.as_py(), found.input_ids[start:stop].tolist(), None if runs is None else runs.tolist())
        for unit in units([source])
        for found in tokenized_documents(unit, source=source)
        for name, (start, stop), runs in zip(
            found.names, pairwise(found.offsets), found.loss_runs or [None] * len(found.names), strict=True
        )
    ]


def write_rows(folder: Path, kind: str, rows: dict[str, list[Any]], *, name: str = "a") -> Path:
    """The rows as a file, or for huggingface as a folder, of that kind."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(
        json.dumps(dict(zip(rows, values, strict=True))) + "\n" for values in zip(*rows.values(), strict=True)
    )
    match kind:
        case "jsonl":
            path = folder / f"{name}.jsonl"
            path.write_text(lines)
        case "jsonl.gz":
            path = folder / f"{name}.jsonl.gz"
            path.write_bytes(gzip.compress(lines.encode()))
        case "jsonl.zst":
            path = folder / f"{name}.jsonl.zst"
            path.write_bytes(pa.compress(lines.encode(), "zstd", asbytes=True))
        case "parquet":
            path = folder / f"{name}.parquet"
            pq.write_table(pa.table(rows), path, row_group_size=2)
        case _:
            datasets = pytest.importorskip("datasets")
            path = folder / name
            datasets.Dataset.from_dict(rows).save_to_disk(str(path))
    return path


KINDS = ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "huggingface"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_rows_are_the_same_documents_wherever_they_lie(tmp_path: Path, kind: str) -> None:
    path = write_rows(tmp_path, kind, {"body": ["A", "", "é\n"], "other": [1, 2, 3]})
    found = read(source_of(kind.split(".")[0], path, columns={"text": "body"}))
    assert [document.text for document in found] == ["A", "", "é\n"]
    assert [document.name.rpartition(":")[2] for document in found] == ["1", "2", "3"]
    with pytest.raises(DataError, match=r"has no column 'text' but \['body', 'other'\]; set data.sources"):
        read(source_of(kind.split(".")[0], path))


@pytest.mark.parametrize("kind", KINDS)
def test_token_ids_are_taken_as_they_are_with_what_counts(tmp_path: Path, kind: str) -> None:
    masks = [[0, 1, 1], [], [0], [1, 0, 0, 1]]
    labels = [[t if m else -100 for t, m in zip(*row, strict=True)] for row in zip(TOKENS, masks, strict=True)]
    path = write_rows(tmp_path, kind, {"ids": TOKENS, "labels": labels, "mask": masks})
    kind = kind.split(".")[0]
    for what in ({"labels": "labels"}, {"loss_mask": "mask"}):
        names, tokens, runs = zip(
            *read_tokens(source_of(kind, path, columns={"input_ids": "ids", **what})), strict=True
        )
        assert [name.rpartition(":")[2] for name in names] == ["1", "2", "3", "4"]
        assert list(tokens) == TOKENS
        assert list(runs) == [[[1, 3]], [], [], [[0, 1], [3, 4]]]
    every = read_tokens(source_of(kind, path, columns={"input_ids": "ids"}))
    assert [(tokens, runs) for _, tokens, runs in every] == [(tokens, None) for tokens in TOKENS]


@pytest.mark.parametrize("dtype", ["uint16", "int32", "uint32", "int64"])
def test_tokens_of_arrow_files_are_packed_without_being_copied_first(tmp_path: Path, dtype: str) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"x": datasets.Value("string"), "ids": datasets.List(datasets.Value(dtype))})
    rows = {"x": ["a"] * 400, "ids": [list(range(10 * row + 1, 10 * row + 1 + row % 11)) for row in range(400)]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "in"), num_shards=3)
    recipe = recipe_of(
        [source_of("huggingface", tmp_path / "in", columns={"input_ids": "ids"})], tokenizer=None, seq_len=64
    )
    pack(recipe, tmp_path / "out", stage="tokenize")
    copied = sum(path.stat().st_size for path in (tmp_path / "out" / ".alst-pack").glob("*.u32"))
    assert copied == (0 if dtype in ("int32", "uint32") else 4 * sum(map(len, rows["ids"])))
    manifest = pack(recipe, tmp_path / "out")
    assert (manifest.tokenizer_hash, manifest.vocab_size) == (None, None)
    assert sorted(tokens_of(PackedDataset.open(tmp_path / "out"))) == sorted(
        token for ids in rows["ids"] for token in ids
    )


def tokens_of(dataset: PackedDataset) -> list[int]:
    """All tokens, without padding."""
    samples = range(dataset.samples)
    return [t for s in samples for t in dataset.read_tokens(s, 0, dataset.sample(s).n_tokens, verify=True).tolist()]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"ids": [1, 2], "mask": [1]}, r"line 1 has 1 values in column 'mask' and 2 tokens"),
        ({"ids": [1, 2], "mask": [1, -1]}, r"line 1 has -1 in its loss mask at token 1; it must be 0 or 1"),
        ({"ids": [1, 2], "mask": "11"}, r"line 1 has no list of integers in column 'mask'"),
        ({"ids": [1.5], "mask": [1]}, r"line 1 has no list of integers in column 'ids'"),
        ({"ids": None, "mask": [1]}, r"line 1 has no list of integers in column 'ids'"),
        ({"ids": [2**70], "mask": [1]}, r"line 1 has no list of integers in column 'ids'"),
    ],
)
def test_tokens_or_masks_that_do_not_fit_are_errors_that_name_file_and_row(
    tmp_path: Path, row: dict[str, Any], says: str
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=f"a.jsonl {says}"):
        read_tokens(source_of("jsonl", tmp_path / "a.jsonl", columns={"input_ids": "ids", "loss_mask": "mask"}))


def test_shifted_labels_are_an_error_that_says_so(tmp_path: Path) -> None:
    path = write_rows(tmp_path, "parquet", {"ids": [[1, 2, 3]], "labels": [[2, 3, -100]]})
    with pytest.raises(DataError, match=r"a.parquet row 1 has the label 2 at token 0, which is 1; .*shift labels back"):
        read_tokens(source_of("parquet", path, columns={"input_ids": "ids", "labels": "labels"}))


@pytest.mark.parametrize(("ids", "told"), [([-4, 3], "-4"), ([3, 1 << 32], str(1 << 32)), ([3, 50], "50")])
def test_token_ids_outside_the_vocabulary_are_errors_that_name_the_row(
    tmp_path: Path, ids: list[int], told: str
) -> None:
    path = write_rows(tmp_path, "jsonl", {"ids": [[1, 2], ids]})
    source = source_of("jsonl", path, columns={"input_ids": "ids"})
    with pytest.raises(DataError, match=rf"token id {told} in a.jsonl:2 is .*repair"):
        pack(recipe_of([source], tokenizer=None, seq_len=8, vocab_size=50), tmp_path / "out")


@pytest.mark.parametrize("dtype", ["int32", "uint32"])
@pytest.mark.parametrize("ids", [[3, -4], [3, 50]])
def test_token_ids_that_stay_in_their_file_are_checked_too(tmp_path: Path, ids: list[int], dtype: str) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"ids": datasets.List(datasets.Value(dtype))})
    rows = {"ids": [[1, 2], [token % 2**32 if dtype == "uint32" else token for token in ids], [3] * 9]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "in"))
    source = source_of("huggingface", tmp_path / "in", columns={"input_ids": "ids"})
    for limit in (50, None) if ids[1] < 0 else (50,):
        with pytest.raises(DataError, match=rf"token id {ids[1]} in data-00000-of-00001.arrow:2 is .*repair"):
            pack(recipe_of([source], tokenizer=None, seq_len=4, vocab_size=limit), tmp_path / f"out-{limit}")
    if ids[1] > 0:
        assert pack(recipe_of([source], tokenizer=None, seq_len=4, vocab_size=51), tmp_path / "out").max_token_id == 50


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "parquet", "huggingface"])
def test_a_truncated_source_is_an_error_that_names_it(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    path = write_rows(tmp_path, kind, {"text": [rng.bytes(400).hex() for _ in range(50)]})
    file = next(path.glob("*.arrow")) if path.is_dir() else path
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    with pytest.raises(DataError, match=rf"{file.name} cannot be read: .*damaged"):
        read(source_of(kind.split(".")[0], path))


def test_a_split_of_a_saved_data_set_is_chosen_by_name(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train_sft", "test_sft")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "chats"))
    found = read(source_of("huggingface", tmp_path / "chats", split="test_sft"))
    assert [document.text for document in found] == ["test_sft"]
    for split in (None, "train"):
        with pytest.raises(DataError, match=r"has the splits .*'train_sft'.* set data.sources\[\].split to one"):
            read(source_of("huggingface", tmp_path / "chats", split=split))


def test_a_data_set_on_the_hub_is_read_from_the_librarys_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    path = write_rows(tmp_path, "jsonl", {"text": ["A", "B"]})
    load = datasets.load_dataset
    asked: list[Any] = []

    def from_file(*args: Any, **settings: Any) -> Any:
        asked.append((*args, settings["split"], settings["revision"]))
        return load("json", data_files=str(path), split=settings["split"], cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", from_file)
    found = read(source_of("huggingface", "org/some-texts", name="en", split="train", revision="abc"))
    assert [document.text for document in found] == ["A", "B"]
    assert asked == [("org/some-texts", "en", "train", "abc")]  # once, though asked for files several times
    with pytest.raises(DataError, match=r"split 'train\[:5\]' is a slice"):
        read(source_of("huggingface", "org/some-texts", split="train[:5]"))


def test_a_data_set_that_is_not_on_the_hub_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"'org/nothing' cannot be loaded: no route to the hub; set data.sources"):
        read(source_of("huggingface", "org/nothing"))


@pytest.mark.parametrize("unit_bytes", [1, 7, 20, 64, 1000])
def test_a_large_file_of_lines_is_divided_and_every_line_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit_bytes: int
) -> None:
    texts = [str(number) * (number % 9) for number in range(40)]
    path = write_rows(tmp_path, "jsonl", {"text": texts})
    monkeypatch.setattr(sources_module, "UNIT_BYTES", unit_bytes)
    source = source_of("jsonl", path)
    assert len(units([source])) == -(-path.stat().st_size // unit_bytes)
    assert [document.text for document in read(source)] == texts


def test_text_files_are_gathered_into_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, size in enumerate([4, 4, 50, 3, 3, 3]):
        (tmp_path / f"{number}.txt").write_text("x" * size)
    monkeypatch.setattr(sources_module, "UNIT_BYTES", 9)
    found = units([source_of("text", tmp_path)])
    assert [[file.size for file in unit.files] for unit in found] == [[4, 4], [50], [3, 3, 3]]


# Chats


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A byte-level tokenizer with a chat template, as a folder."""
    folder = tmp_path_factory.mktemp("chat") / "tokenizer"
    source = TextSource(type="text", path="python:stdlib", glob="json/*.py")
    tokenizer = train_tokenizer([source], settings=TrainTokenizer(vocab_size=400, sample_mib=1.0))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    save_tokenizer(tokenizer, folder, chat_template=CHAT_TEMPLATE)
    return str(folder)


def test_of_a_chat_the_assistants_words_count_and_the_token_that_ends_its_turn(chat_tokenizer: str) -> None:
    text, counted = ChatTemplate(chat_tokenizer).render(CHAT, where="here")
    assert text.startswith("<|im_start|>user\nSay yes.<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>")
    assert [text[start:stop] for start, stop in counted] == ["yes<|im_end|>", "assistant<|im_end|>"]


@pytest.mark.parametrize(
    ("columns", "roles", "content"),
    [
        ({"messages": [CHAT]}, ROLES, None),
        (
            {
                "conversations": [
                    [{"from": "gpt" if m["role"] == "assistant" else "human", "value": m["content"]} for m in CHAT]
                ]
            },
            {"user": "conversations.from.human", "assistant": "conversations.from.gpt"},
            "value",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "huggingface"])
def test_chats_become_samples_in_which_only_the_assistant_is_learned(
    tmp_path: Path, chat_tokenizer: str, kind: str, columns: dict[str, Any], roles: dict[str, str], content: str | None
) -> None:
    path = write_rows(tmp_path, kind, columns)
    source = source_of(kind, path, roles=roles, columns={"content": content})
    manifest = pack(recipe_of([source], tokenizer=chat_tokenizer, seq_len=256), tmp_path / "out")
    dataset, tokenizer = PackedDataset.open(tmp_path / "out"), load_tokenizer(chat_tokenizer)
    batch = batch_of(dataset, 0)
    learned = batch.labels[batch.labels != IGNORE_INDEX].tolist()
    assert tokenizer.decode(learned, skip_special_tokens=False) == "yes<|im_end|>assistant<|im_end|>"
    assert manifest.valid_tokens == batch.n_valid == len(learned)
    transformers = pytest.importorskip("transformers")
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    assert saved.apply_chat_template(CHAT, tokenize=False) == tokenizer.decode(
        dataset.read_tokens(0, 0, dataset.sample(0).n_tokens).tolist(), skip_special_tokens=False
    )


def test_a_question_and_an_answer_in_two_columns_are_a_chat(tmp_path: Path, chat_tokenizer: str) -> None:
    path = write_rows(tmp_path, "parquet", {"q": ["Say yes."], "a": ["yes"]})
    source = source_of("parquet", path, roles={"user": "q", "assistant": "a"})
    (found,) = read(source, chat=ChatTemplate(chat_tokenizer))
    assert isinstance(found, RawDocument) and found.counted
    assert [found.text[start:stop] for start, stop in found.counted] == ["yes<|im_end|>"]


def test_chats_that_cannot_be_told_apart_are_errors_that_name_the_row(tmp_path: Path, chat_tokenizer: str) -> None:
    chat = ChatTemplate(chat_tokenizer)
    for messages, says in (
        ([{"role": "tool", "content": "x"}], r"has the role 'tool' in message 1, and .* names \['assistant', 'user'\]"),
        ([{"role": "user", "content": None}], r"has a NoneType in 'content' of message 1"),
        ([], r"has list in column 'messages'; it must be a list of messages"),
        ("hello", r"has str in column 'messages'"),
    ):
        (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
        with pytest.raises(DataError, match=f"a.jsonl line 1 {says}"):
            read(source_of("jsonl", tmp_path / "a.jsonl", roles=ROLES), chat=chat)


def test_a_template_that_changes_contents_or_refuses_is_an_error(tmp_path: Path, chat_tokenizer: str) -> None:
    chat = ChatTemplate(chat_tokenizer)
    chat._tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(DataError, match=r"row 7: the chat template does not write the contents as they are"):
        chat.render(CHAT, where="row 7")
    chat._tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"row 8: the chat template refuses it: roles must alternate"):
        chat.render(CHAT, where="row 8")
    with pytest.raises(DataError, match=r"has no chat template.* set data.tokenizer"):
        ChatTemplate(number_tokenizer(tmp_path / "numbers"))


# Runs of tokens that count


MASKS = st.lists(st.booleans(), min_size=1, max_size=40)


@given(masks=st.lists(MASKS, min_size=1, max_size=5), data=st.data())
@settings(max_examples=200, deadline=None)
def test_runs_say_what_masks_say(masks: list[list[bool]], data: st.DataObject) -> None:
    flat = np.concatenate([np.array(mask) for mask in masks])
    ends = np.cumsum([0, *map(len, masks)])
    runs = joined([runs_of_mask(np.array(mask)) for mask in masks], offsets=ends[:-1])
    assert runs.tolist() == runs_of_mask(flat).tolist()
    start = data.draw(st.integers(0, len(flat)))
    stop = data.draw(st.integers(start, len(flat)))
    assert mask_of_runs(runs, start=start, stop=stop).tolist() == flat[start:stop].tolist()
    assert clipped(runs, start=start, stop=stop).tolist() == runs_of_mask(flat[start:stop]).tolist()
    assert count_labels(runs, cu_seqlens=ends) == sum(sum(flat[first + 1 : last]) for first, last in pairwise(ends))


@given(data=st.data(), seq_len=st.sampled_from([4, 8, 24]), most=st.integers(3, 40) | st.none())
@settings(max_examples=25, deadline=None)
def test_labels_of_all_shards_are_the_tokens_that_count(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, seq_len: int, most: int | None
) -> None:
    masks = data.draw(st.lists(MASKS, min_size=1, max_size=8))
    folder, ids = tmp_path_factory.mktemp("masks"), iter(range(1, 10_000))
    corpus = [[next(ids) for _ in mask] for mask in masks]
    path = write_rows(folder, "jsonl", {"ids": corpus, "mask": [[int(m) for m in mask] for mask in masks]})
    columns = {"input_ids": "ids", "loss_mask": "mask"}
    source = source_of("jsonl", path, columns=columns, max_document_tokens=most)
    manifest = pack(recipe_of([source], tokenizer=None, seq_len=seq_len), folder / "out")
    counts = {t: m for doc, mask in zip(corpus, masks, strict=True) for t, m in zip(doc, mask, strict=True)}
    dataset, seen, valid = PackedDataset.open(folder / "out"), [], 0
    for sample in range(dataset.samples):
        shards = [batch_of(dataset, sample, sp_rank=rank, sp=4) for rank in range(4)]
        labels = [label for shard in shards for label in shard.labels[0].tolist()]
        tokens = [token for shard in shards for token in shard.input_ids[0].tolist()]
        firsts = set(dataset.sample(sample).cu_seqlens[:-1].tolist())
        for at, token in enumerate(tokens):
            if at and at not in firsts and token:
                assert labels[at - 1] == (token if counts[token] else IGNORE_INDEX)
        n_tokens = dataset.sample(sample).n_tokens
        assert set(labels[n_tokens - 1 :]) == {IGNORE_INDEX}
        valid += sum(label != IGNORE_INDEX for label in labels)
        seen += tokens[:n_tokens]
    assert sorted(seen) == sorted(counts)
    assert manifest.valid_tokens == valid


# A packed data set as a source


def test_a_packed_data_set_is_packed_again_at_another_length_with_what_counts(tmp_path: Path) -> None:
    corpus = [[10 * row + column for column in range(1, row % 7 + 2)] for row in range(30)]
    masks = [[token % 2 for token in document] for document in corpus]
    path = write_rows(tmp_path, "jsonl", {"ids": corpus, "mask": masks})
    source = source_of("jsonl", path, columns={"input_ids": "ids", "loss_mask": "mask"})
    first = pack(recipe_of([source], tokenizer=None, seq_len=64), tmp_path / "first")
    again = recipe_of([source_of("packed", tmp_path / "first")], tokenizer=None, seq_len=32)
    second = pack(again, tmp_path / "second")
    assert (second.tokens, second.valid_tokens, second.documents) == (first.tokens, first.valid_tokens, 30)
    assert sorted(tokens_of(PackedDataset.open(tmp_path / "second"))) == sorted(chain(*corpus))
    part = tmp_path / "first" / first.parts[0].name
    damaged = bytearray(part.read_bytes())
    damaged[int(PackedDataset.open(tmp_path / "first").index.payload_offset[0])] ^= 1
    part.write_bytes(damaged)
    with pytest.raises(DataError, match=r"sample 0 in .*data-00000.* is not what was written.*copy the file again"):
        pack(again, tmp_path / "third")


def test_tokens_of_different_tokenizers_are_not_mixed(tmp_path: Path) -> None:
    made = {}
    for name, size in (("a", 500), ("b", 600)):
        path = write_rows(tmp_path / name, "jsonl", {"text": ["1 2 3", "4"]})
        made[name] = number_tokenizer(tmp_path / name / "numbers", vocab_size=size)
        pack(recipe_of([source_of("jsonl", path)], tokenizer=made[name], seq_len=8), tmp_path / name / "out")
    sources = [source_of("packed", tmp_path / name / "out") for name in made]
    with pytest.raises(DataError, match=r"tokens of different tokenizers cannot be mixed .*a/out: .*b/out: "):
        pack(recipe_of(sources, tokenizer=None, seq_len=8), tmp_path / "mixed")
    with pytest.raises(DataError, match=r"cannot be mixed .*data.tokenizer: "):
        pack(recipe_of(sources[:1], tokenizer=made["b"], seq_len=8), tmp_path / "mixed")
    assert pack(recipe_of(sources[:1], tokenizer=made["a"], seq_len=8), tmp_path / "mixed").tokens == 4


def test_rows_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first row is there before the rest of the file is decoded."""
    monkeypatch.setattr(rows_module, "PARQUET_ROWS", 2)
    path = write_rows(tmp_path, "parquet", {"text": [str(number) for number in range(100)]})
    (unit,) = units([source := source_of("parquet", path)])
    found: Iterator[Any] = documents(unit, source=source)
    assert next(found).text == "0"
    decoded = pa.total_allocated_bytes()
    assert len(list(found)) == 99
    assert decoded < 1 << 20
