"""Slurm's own commands, asked with patience but not for ever."""

import subprocess

from pipeline.errors import RunError

ANSWER_SECONDS = 60  # a controller under load takes some


def ask(*command: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """What a command says, with `text` on its stdin. Raises RunError if it does not answer."""
    try:
        return subprocess.run(command, input=text, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise RunError(f"{command[0]}: no answer in {ANSWER_SECONDS} s; Slurm's controller may be down") from None
