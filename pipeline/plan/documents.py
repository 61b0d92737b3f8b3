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


def documents_of(plan: "JobPlan", packed: "Path | None" = None) -> DocumentMix:
    """Of the packed data set in that folder, if it is whole and tells; else one document per sample."""
    length, window = plan.seq_len, plan.model.window
    worst = DocumentMix(length**2, seen_keys([length], window), "one document per sample, the worst case")
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
