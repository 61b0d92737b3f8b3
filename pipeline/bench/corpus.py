"""What the runs train on: real text, tokenized once, as rows of 16,384 tokens that become documents of any sample."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import RunError, UserError

DOCUMENT_TOKENS = 16384
"""Of a row. Samples of a length search are made of such documents: what attention costs then does not grow with them,
and bytes do not depend on it."""

TOKENS = 2**20
"""Longer samples take the rows again."""


def corpus_in(named: Path | None, *, root: Path) -> Path:
    """The folder of the rows: the one that is named, or the bench's own. Raises UserError if the one named is none."""
    if named is None:
        return root / "corpus"
    if not _is_packed(named):
        raise UserError(
            f"--data {named}: must be a packed data set, and has no manifest.json; make one with `alst pack`, or "
            "leave --data out"
        )
    return named.resolve()


def ensure_corpus(folder: Path, *, tell: Callable[[str], None]) -> None:
    """Make the bench's own rows where they are not there yet."""
    if not _is_packed(folder):
        tell(f"packing the standard library's sources into rows of {DOCUMENT_TOKENS:,} tokens, once")
        make_corpus(folder)


def _is_packed(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()


def make_corpus(folder: Path, *, tokens: int = TOKENS, glob: str = "**/*.py") -> None:
    """Rows from the standard library's sources, by `alst pack`. Raises RunError if that fails."""
    overrides = [
        "data.sources.0.max_document_tokens=null",
        f"data.sources.0.tokens={tokens}",
        f"data.sources.0.glob='{glob}'",
        f"data.seq_len={DOCUMENT_TOKENS}",
        "data.packing.unfilled_last=drop",
        "train.self_check=null",
    ]
    command = [sys.executable, "-P", "-m", "pipeline.cli", "pack", "tiny", "--output", str(folder), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"{folder}: packing failed:\n{(done.stdout + done.stderr)[-2000:]}")
