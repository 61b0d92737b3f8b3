"""The tokenizer: trained on the sources, or loaded; its definition's hash; a folder that transformers loads.

Beside the path of the data: `tokenize` encodes with it, and a packed data set holds a copy.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from shutil import rmtree

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipeline.data.source_documents import documents
from pipeline.data.source_tokens import is_tokenized
from pipeline.data.sources import units
from pipeline.errors import DataError
from pipeline.files import HOST, replaced, write_json
from pipeline.recipe.schema import Source, TrainTokenizer

END_OF_TEXT = "<|endoftext|>"
TRAINING_TEXT_CHARACTERS = 1 << 18  # of one text; a single huge one must not be the whole training sample


def train_tokenizer(sources: Sequence[Source], *, settings: TrainTokenizer) -> Tokenizer:
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


def training_texts(sources: Sequence[Source], *, budget: int) -> Iterator[str]:
    """About `budget` characters of text, every n-th document: the head of an alphabet is not a fair sample.

    Raises DataError if the sources hold no text.
    """
    work = [unit for unit in units(sources) if not is_tokenized(sources[unit.source])]
    share = min(1.0, budget / max(1, sum(unit.size for unit in work)))
    seen = taken = 0
    for unit in work:
        for document in documents(unit, source=sources[unit.source]):
            text = document.text[:TRAINING_TEXT_CHARACTERS]
            if text and taken <= seen * share:
                yield text
                taken += len(text)
            seen += len(document.text)


def load_tokenizer(name_or_path: str, *, revision: str | None = None) -> Tokenizer:
    """The tokenizer in a folder (its tokenizer.json), or on the hub. Raises DataError if there is none."""
    folder = Path(name_or_path).expanduser()
    looks_local = folder.exists() or folder.is_absolute() or name_or_path.startswith((".", "~"))
    try:
        if looks_local:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json" if folder.is_dir() else folder))
        else:
            tokenizer = Tokenizer.from_pretrained(name_or_path, revision=revision or "main")
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


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, chat_template: str | None = None) -> None:
    """Writes a folder that `AutoTokenizer.from_pretrained` loads, and replaces one that is there.

    Written here rather than by transformers, because a machine that packs need not have it.
    """
    config: dict[str, str | bool] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        config["eos_token"] = END_OF_TEXT
    if chat_template is not None:
        config["chat_template"] = chat_template
    temporary = folder.with_name(f".{folder.name}.{HOST}-{os.getpid()}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    with replaced(temporary / "tokenizer.json") as path:
        path.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    write_json(temporary / "tokenizer_config.json", config)
    if folder.exists():
        rmtree(folder)
    temporary.rename(folder)


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that is one. Raises DataError if it is not in the vocabulary."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise DataError(f"separator {token!r} is no token of the tokenizer; set data.separator to one that is, or null")
    return int(found)
