"""What a packed data set says of itself. Written last: a folder with a manifest is whole, one without is not."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pipeline.data.files import read_json
from pipeline.errors import DataError
from pipeline.files import write_json
from pipeline.plan.job import PACKED_FORMAT_VERSION

FORMAT_VERSION = PACKED_FORMAT_VERSION
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class PartFile:
    """One Arrow file of the data set."""

    name: str
    samples: int
    size_bytes: int
    frame_checksum: str
    """xxh3 (hex) of its bytes that are no tokens."""
    max_token_id: int


@dataclass(frozen=True)
class PackingInputs:
    """What decides every byte of a packed data set; equal inputs are the same data set."""

    sources: tuple[str, ...]
    """`sources.fingerprint` of each, in the recipe's order."""
    tokenizer: str | None
    """`sha256:…` of a loaded tokenizer and its chat template, or how one is trained on the sources; None is none."""
    separator: str | None
    seq_len: int
    packing: dict[str, Any]
    """The recipe's section."""
    seed: int
    planner_version: int


@dataclass(frozen=True)
class Manifest:
    """Counts, origin and files of a packed data set. Lengths are in tokens."""

    format_version: int
    seq_len: int
    samples: int
    texts: int
    """Read from the sources."""
    texts_without_tokens: int
    files_skipped: int
    """Not UTF-8, and passed over as the recipe says."""
    documents: int
    """That were taken: texts, after `max_document_tokens` cut the long ones, each as often as weights say."""
    documents_read: int
    """Texts, after `max_document_tokens` cut the long ones; rows of documents.arrow."""
    tokens_read: int
    """Of all documents that were read."""
    tokens_in: int
    """Of all documents that were taken."""
    tokens_dropped: int
    dropped: dict[str, int]
    """Tokens by the reason why they were dropped."""
    tokens: int
    """Of all samples, without padding; tokens_in - tokens_dropped."""
    valid_tokens: int
    """Labels that count in one epoch."""
    documents_cut: int
    """Documents that packing split over samples."""
    unfilled_fraction: float
    """Of samples times seq_len, the part that is padding."""
    vocab_size: int | None
    """Of the tokenizer; None where the sources were tokenized already."""
    max_token_id: int
    tokenizer_hash: str | None
    inputs: PackingInputs
    contents: tuple[str, ...]
    """`sources.content_hash` of every unit."""
    versions: dict[str, str]
    """Of the libraries that packed."""
    parts: tuple[PartFile, ...]
    index_sha256: str
    complete: bool
    sum_len_squared: int | None = None
    """Over the documents of all samples: what attention costs; None in a data set packed before it was counted."""


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Declares the data set in `folder` whole."""
    write_json(folder / MANIFEST_NAME, asdict(manifest))


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest in `folder`, or None where none is. Raises DataError if it is damaged or of another format."""
    path = folder / MANIFEST_NAME
    value = read_json(path)
    if value is None:
        return None
    if value.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {value.get('format_version')}, and this version reads {FORMAT_VERSION}; "
            "pack the sources again into another folder"
        )
    try:
        manifest = _parse(value)
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); delete the data set and pack again") from error
    if not manifest.complete:
        raise DataError(f"{path} says the data set is not complete; run `alst pack` again")
    return manifest


def _parse(value: dict[str, Any]) -> Manifest:
    known = {field.name for field in fields(Manifest)}
    if unknown := set(value) - known:
        raise TypeError(f"unknown keys {sorted(unknown)}")
    inputs = {**value["inputs"], "sources": tuple(value["inputs"]["sources"])}
    parts = tuple(PartFile(**part) for part in value["parts"])
    contents = tuple(value["contents"])
    return Manifest(**{**value, "inputs": PackingInputs(**inputs), "parts": parts, "contents": contents})
