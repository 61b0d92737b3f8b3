"""What is in a packed data set, for people and for programs: counts, document lengths, fill, checksums."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from pipeline.data.packed_dataset import DOCUMENTS_NAME, PackedDataset
from pipeline.data.tokenize import read_document_rows

_FROM_MANIFEST = (
    "format_version",
    "seq_len",
    "samples",
    "texts",
    "texts_without_tokens",
    "files_skipped",
    "documents",
    "tokens_in",
    "tokens_dropped",
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
    return {
        **{name: getattr(manifest, name) for name in _FROM_MANIFEST},
        "loss_fraction": manifest.valid_tokens / manifest.tokens,
        "parts": len(manifest.parts),
        "size_bytes": sum(part.size_bytes for part in manifest.parts),
        **_spread("document_tokens", lengths),
        **_spread("sample_documents", np.diff(dataset.index.cu_offsets) - 1),
        **_spread("sample_cost", dataset.index.cost),
        "checksums_ok": not damaged if verify else None,
        "damaged_samples": list(damaged),
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
    checks = {None: "not read", True: "all right", False: f"WRONG in samples {d['damaged_samples']}"}
    rows = {
        "samples": f"{d['samples']:,} of {d['seq_len']:,} tokens",
        "on disk": f"{d['size_bytes'] / 2**20:,.1f} MiB in {d['parts']:,} files",
        "tokens": f"{d['tokens']:,} of {d['tokens_in']:,} read; {d['tokens_dropped']:,} dropped",
        "padding": f"{d['unfilled_fraction']:.2%}",
        "labels that count": f"{d['valid_tokens']:,} ({d['loss_fraction']:.2%} of tokens)",
        "documents": f"{d['documents']:,} out of {d['texts']:,} texts; {d['documents_cut']:,} split over samples",
        "passed over": f"{d['files_skipped']:,} files not UTF-8, {d['texts_without_tokens']:,} texts without tokens",
        "tokens per document": _spread_text(d, "document_tokens"),
        "documents per sample": _spread_text(d, "sample_documents"),
        "sum of squared lengths": _spread_text(d, "sample_cost"),
        "tokenizer": f"{d['vocab_size']:,} entries, largest id used {d['max_token_id']:,}, {d['tokenizer_hash'][:12]}",
        "checksums": checks[d["checksums_ok"]],
    }
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, text in rows.items():
        table.add_row(name, text)
    (console or Console()).print(table)


def _spread_text(description: dict[str, Any], name: str) -> str:
    low, mean, median, high = (description[f"{name}_{what}"] for what in ("min", "mean", "median", "max"))
    return f"{low:,} to {high:,}; median {median:,.0f}, mean {mean:,.0f}"
