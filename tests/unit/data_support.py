"""What the tests of `pipeline.data` share: corpora whose every token is known, and recipes around them."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

from pipeline.data.pack import pack
from pipeline.data.packed_dataset import PackedDataset
from pipeline.recipe.schema import DataRecipe, JsonlSource, ModelRecipe, PackingRecipe, Recipe


def number_tokenizer(folder: Path, *, vocab_size: int = 5000) -> str:
    """A tokenizer for which the text "3 17" is the tokens 3 and 17; returns the folder's path."""
    tokenizer = Tokenizer(models.WordLevel({str(number): number for number in range(vocab_size)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def numbered_documents(lengths: list[int]) -> list[list[int]]:
    """Documents of these lengths in which every token of the corpus is another number, from 1 on."""
    first, corpus = 1, []
    for length in lengths:
        corpus.append(list(range(first, first + length)))
        first += length
    return corpus


def write_corpus(path: Path, corpus: list[list[int]]) -> Path:
    """The documents as JSON lines for `number_tokenizer`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": " ".join(map(str, doc))}) + "\n" for doc in corpus))
    return path


def recipe_of(sources: Any, *, tokenizer: Any, seq_len: int, vocab_size: int | None = None, **settings: Any) -> Recipe:
    """A recipe with the two sections that packing reads; `settings` are keys of `data`, or of `data.packing`."""
    packing = {
        "shortest_document_tokens": 1, "longest_document_tokens": None, "length_weights": (), "unfilled_last": "keep"
    }  # fmt: skip
    packing |= {name: settings.pop(name) for name in list(settings) if name in packing}
    data = {
        "tokenizer_revision": None, "separator": None, "seed": 0, "cross_document_attention": False,
        "order": "shuffled", "prefetch": 1, "verify_checksums": True,
    } | settings  # fmt: skip
    config = {"model_type": "llama"} | ({} if vocab_size is None else {"vocab_size": vocab_size})
    model = ModelRecipe(
        name_or_path=None, revision=None, init="random", config=config, dtype="float32", attention="auto"
    )
    made = DataRecipe(
        sources=tuple(sources), tokenizer=tokenizer, seq_len=seq_len, packing=PackingRecipe(**packing), **data
    )
    return Recipe.model_construct(name="test", data=made, model=model)


def corpus_recipe(folder: Path, corpus: list[list[int]], *, seq_len: int, **settings: Any) -> Recipe:
    """A recipe for `corpus`, which is written below `folder` with its tokenizer."""
    source = JsonlSource(type="jsonl", path=str(write_corpus(folder / "corpus.jsonl", corpus)))
    tokenizer = number_tokenizer(folder / "numbers")
    return recipe_of([source], tokenizer=tokenizer, seq_len=seq_len, **settings)


def packed(folder: Path, lengths: list[int], *, seq_len: int, **settings: Any) -> PackedDataset:
    """`numbered_documents(lengths)`, packed below `folder` and opened."""
    recipe = corpus_recipe(folder, numbered_documents(lengths), seq_len=seq_len, **settings)
    pack(recipe, folder / "packed")
    return PackedDataset.open(folder / "packed")


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
