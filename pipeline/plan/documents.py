"""Which documents a step is planned for: those of the packed data set when there is one, else the worst case."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.plan.flops import seen_keys

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.plan.job import JobPlan


@dataclass(frozen=True)
class DocumentMix:
    """A sample on average."""

    sum_len_squared: int
    """Over its documents; what attention costs."""
    sum_windowed: int
    """`flops.seen_keys` with the model's window."""
    told: str
    """Where this comes from."""


def _worst_case(plan: "JobPlan") -> DocumentMix:
    """One document per sample, or documents as long as the recipe lets them be."""
    data, length, window = plan.recipe.data, plan.seq_len, plan.model.window
    cut = [source.max_document_tokens or length for source in data.sources]
    longest = min(data.packing.longest_document_tokens or length, max(cut))
    if longest >= length or data.cross_document_attention:
        return DocumentMix(length**2, seen_keys([length], window), "one document per sample, the worst case")
    lengths = [longest] * (length // longest) + ([length % longest] if length % longest else [])
    return DocumentMix(
        sum(tokens**2 for tokens in lengths),
        seen_keys(lengths, window),
        f"documents of {longest:,} tokens, the longest that the recipe allows",
    )


def documents_of(plan: "JobPlan", packed: "Path | None" = None) -> DocumentMix:
    """Of the packed data set in that folder, if it is whole and tells; else the longest that the recipe allows."""
    length, window = plan.seq_len, plan.model.window
    worst = _worst_case(plan)
    if packed is None or plan.recipe.data.cross_document_attention:
        return worst
    try:
        manifest = json.loads((packed / "manifest.json").read_text(encoding="utf-8"))
        found = round(manifest["sum_len_squared"] / manifest["samples"])
    except (OSError, ValueError, KeyError, TypeError):
        return worst
    # The average document bounds what a window leaves: exact where all are shorter or all longer than it.
    windowed = found if window is None else min(found, seen_keys([length], window))
    return DocumentMix(found, windowed, f"the packed data set {packed.name}")
