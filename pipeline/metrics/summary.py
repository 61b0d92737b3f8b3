"""The last words of a run: what was trained, how fast, where everything lies, what to try next."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from pipeline.errors import RunError
from pipeline.metrics.console import gib, print_table
from pipeline.metrics.rows import METRICS_FILE, read_steps


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A finished run in a dozen numbers."""

    name: str
    samples: int
    fill_fraction: float
    """Real tokens over the length of all samples."""
    steps: int
    first_loss: float | None
    """None when the loss was not finite."""
    last_loss: float | None
    eval_losses: tuple[float, ...]
    """On held-out samples, in the order found; empty without evaluation."""
    tokens_per_second: float
    """Median over the steps, without the first."""
    peak_rss_bytes: int
    """Of the largest process."""
    paths: Mapping[str, str]
    """What lies where, in the order of printing."""
    next_steps: tuple[str, ...]


def summarize(
    run_dir: Path,
    *,
    samples: int,
    fill_fraction: float,
    paths: Mapping[str, str] | None = None,
    next_steps: Sequence[str] = (),
) -> Summary:
    """Sum up the run's metrics.jsonl; samples and fill come from the packed data set's manifest."""
    rows = read_steps(run_dir / METRICS_FILE)
    if not rows:
        raise RunError(f"{run_dir / METRICS_FILE} holds no step; the run ended before its first step was done")
    return Summary(
        name=run_dir.name,
        samples=samples,
        fill_fraction=fill_fraction,
        steps=rows[-1]["step"],
        first_loss=rows[0]["loss"],
        last_loss=rows[-1]["loss"],
        eval_losses=tuple(row["eval_loss"] for row in rows if row.get("eval_loss") is not None),
        tokens_per_second=statistics.median(row["tokens_per_second"] for row in rows[1:] or rows),
        peak_rss_bytes=max(row["peak_host_rss_bytes"] for row in rows),
        paths=dict(paths or {}),
        next_steps=tuple(next_steps),
    )


def print_summary(summary: Summary, *, stream: TextIO | None = None) -> None:
    """Print the numbers, then the paths, then what to try next."""
    rows = [
        ("samples", f"{summary.samples:,} ({summary.fill_fraction:.1%} filled)"),
        ("steps", f"{summary.steps:,}"),
        ("loss", f"{_loss(summary.first_loss)} -> {_loss(summary.last_loss)}"),
        *[("held-out loss", f"{losses[0]:.3f} -> {losses[-1]:.3f}") for losses in [summary.eval_losses] if losses],
        ("tokens/s", f"{summary.tokens_per_second:,.0f} (median)"),
        ("peak RSS", f"{gib(summary.peak_rss_bytes)} (largest process)"),
    ]
    rows += list(summary.paths.items())
    rows += [("next" if index == 0 else "", text) for index, text in enumerate(summary.next_steps)]
    print_table(summary.name, rows, stream=stream)


def _loss(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.3f}"
