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


def corpus_in(folder: Path | None, *, root: Path, tell: Callable[[str], None]) -> Path:
    """The folder of the rows: the one that is named, or the bench's own, made of the standard library where it is not
    there yet. Raises UserError if the one named is no packed data set."""
    if folder is not None:
        if not (folder / "manifest.json").is_file():
            raise UserError(
                f"--data {folder}: must be a packed data set, and has no manifest.json; make one with `alst pack`, or "
                "leave --data out"
            )
        return folder.resolve()
    own = root / "corpus"
    if not (own / "manifest.json").is_file():
        tell(f"packing the standard library's sources into rows of {DOCUMENT_TOKENS:,} tokens, once")
        make_corpus(own)
    return own


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
