"""What is in a packed data set, for people and for programs: counts, document lengths, fill, checksums."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

from pipeline.data.documents import documents_within
from pipeline.data.packed_dataset import DOCUMENTS_NAME, TOKENIZER_NAME, PackedDataset
from pipeline.data.token_parts import read_document_rows
from pipeline.data.tokenizer import load_tokenizer
from pipeline.errors import DataError

SHOWN_TOKENS = 24  # of each document, in `beginnings`

_FROM_MANIFEST = (
    "format_version",
    "seq_len",
    "samples",
    "texts",
    "texts_without_tokens",
    "files_skipped",
    "documents",
    "documents_read",
    "tokens_read",
    "tokens_in",
    "tokens_dropped",
    "dropped",
    "tokens",
    "valid_tokens",
    "documents_cut",
    "unfilled_fraction",
    "vocab_size",
    "max_token_id",
    "tokenizer_hash",
    "versions",
)


def describe(folder: Path, *, verify: bool = True) -> dict[str, Any]:
    """The data set in `folder` as flat JSON values; lengths in tokens. `verify` reads all of it.

    `checksums_ok` is null without `verify`. Raises DataError if `folder` is no complete data set.
    """
    dataset = PackedDataset.open(folder)
    manifest = dataset.manifest
    lengths = read_document_rows(folder / DOCUMENTS_NAME)["length"].to_numpy()
    damaged = dataset.damaged_samples() if verify else ()
    damaged_parts = dataset.damaged_parts() if verify else ()
    return {
        **{name: getattr(manifest, name) for name in _FROM_MANIFEST},
        "loss_fraction": manifest.valid_tokens / manifest.tokens,
        "parts": len(manifest.parts),
        "size_bytes": sum(part.size_bytes for part in manifest.parts),
        **_spread("document_tokens", lengths),
        **_spread("sample_documents", np.diff(dataset.index.cu_offsets) - 1),
        **_spread("sample_cost", dataset.index.cost),
        "checksums_ok": not (damaged or damaged_parts) if verify else None,
        "damaged_samples": list(damaged),
        "damaged_parts": list(damaged_parts),
    }


def _spread(name: str, values: NDArray[Any]) -> dict[str, float | int]:
    return {
        f"{name}_min": int(values.min()),
        f"{name}_mean": float(values.mean()),
        f"{name}_median": float(np.median(values)),
        f"{name}_max": int(values.max()),
    }


def print_description(description: dict[str, Any], *, console: Console | None = None) -> None:
    """Prints what `describe` returned as a table."""
    d = description
    checks = {
        None: "not read",
        True: "all right",
        False: f"WRONG in samples {d['damaged_samples']} and files {d['damaged_parts']}",
    }
    rows = {
        "samples": f"{d['samples']:,} of {d['seq_len']:,} tokens",
        "on disk": f"{d['size_bytes'] / 2**20:,.1f} MiB in {d['parts']:,} files",
        "tokens": f"{d['tokens']:,} of {d['tokens_in']:,} in; {d['tokens_dropped']:,} dropped{_reasons(d['dropped'])}",
        "read": f"{d['tokens_read']:,} tokens in {d['documents_read']:,} documents, before weights",
        "padding": f"{d['unfilled_fraction']:.2%}",
        "labels that count": f"{d['valid_tokens']:,} ({d['loss_fraction']:.2%} of tokens)",
        "documents": f"{d['documents']:,} out of {d['texts']:,} texts; {d['documents_cut']:,} split over samples",
        "passed over": f"{d['files_skipped']:,} files not UTF-8, {d['texts_without_tokens']:,} texts without tokens",
        "tokens per document": _spread_text(d, "document_tokens"),
        "documents per sample": _spread_text(d, "sample_documents"),
        "sum of squared lengths": _spread_text(d, "sample_cost"),
        "tokenizer": _tokenizer_text(d),
        "checksums": checks[d["checksums_ok"]],
    }
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, text in rows.items():
        table.add_row(name, text)
    (console or Console()).print(table)


def _reasons(dropped: dict[str, int]) -> str:
    told = ", ".join(f"{name.replace('_', ' ')} {tokens:,}" for name, tokens in dropped.items() if tokens)
    return f" ({told})" if told else ""


def _tokenizer_text(description: dict[str, Any]) -> str:
    largest = f"largest id used {description['max_token_id']:,}"
    if description["tokenizer_hash"] is None:
        return f"none, the sources were tokenized already; {largest}"
    return f"{description['vocab_size']:,} entries, {largest}, {description['tokenizer_hash'][:12]}"


def _spread_text(description: dict[str, Any], name: str) -> str:
    low, mean, median, high = (description[f"{name}_{what}"] for what in ("min", "mean", "median", "max"))
    return f"{low:,} to {high:,}; median {median:,.0f}, mean {mean:,.0f}"


def beginnings(folder: Path, *, sample: int) -> dict[str, Any]:
    """How each document of a sample begins, as flat JSON values; only the beginnings are read.

    Raises DataError if `folder` is no complete data set or has no such sample.
    """
    dataset = PackedDataset.open(folder)
    if not 0 <= sample < dataset.samples:
        raise DataError(f"sample {sample} is not in {folder}; it has samples 0 to {dataset.samples - 1}")
    known, tokenizer = dataset.sample(sample), _tokenizer(folder)
    documents = []
    for placed in documents_within(dataset, sample, start=0, stop=known.n_tokens):
        tokens = dataset.read_tokens(sample, placed.start, min(placed.stop, placed.start + SHOWN_TOKENS)).tolist()
        shown = tokenizer.decode(tokens, skip_special_tokens=False) if tokenizer else " ".join(map(str, tokens))
        size = {"start": placed.start, "tokens": placed.stop - placed.start}
        documents.append({"document": placed.document, "name": placed.name, **size, "begins": shown})
    return {"sample": sample, "n_tokens": known.n_tokens, "n_valid": known.n_valid, "documents": documents}


def _tokenizer(folder: Path) -> Tokenizer | None:
    path = folder / TOKENIZER_NAME
    return load_tokenizer(str(path)) if path.exists() else None


def print_beginnings(found: dict[str, Any], *, console: Console | None = None) -> None:
    """Prints what `beginnings` returned as a table."""
    table = Table("document", "name", "from", "tokens", "begins", box=None, pad_edge=False)
    for row in found["documents"]:
        text = Text(row["begins"].replace("\n", "⏎"), no_wrap=True, overflow="ellipsis")
        table.add_row(str(row["document"]), row["name"], f"{row['start']:,}", f"{row['tokens']:,}", text)
    console = console or Console()
    title = f"sample {found['sample']}: {found['n_tokens']:,} tokens, {found['n_valid']:,} labels count"
    console.print(title, highlight=False)
    console.print(table)
