"""Slurm's own commands, asked with patience but not for ever; and what of this process's environment they are given."""

import os
import subprocess
from collections.abc import Mapping

from pipeline.errors import RunError, UserError
from pipeline.launch.entry import VERIFY_IMAGE

ANSWER_SECONDS = 60  # a controller under load takes some

PASSED_ON = ("HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "PATH", "LD_LIBRARY_PATH", "MODULEPATH")
"""Of the environment that submits: enough for a shell and its modules. All else stays, secrets first of all."""

PASSED_ON_BY_NAME = ("HF_HOME", "HF_HUB_CACHE", "ALST_RUNS", VERIFY_IMAGE)
"""Where things lie, and whether the image is read whole; the same for the one who submits and for the job."""

FOR_SBATCH = ("SLURM_CONF", "SBATCH_")
"""What sbatch itself reads: where Slurm is, and a person's own defaults, such as SBATCH_ACCOUNT."""

NOT_FOR_SBATCH = ("SBATCH_EXPORT", "SBATCH_GET_USER_ENV")
"""They would have their way over `--export=ALL`."""


def ask(
    *command: str, text: str | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """What a command says, with `text` on its stdin. Raises RunError if it does not answer."""
    try:
        return subprocess.run(
            command, input=text, env=environment, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise RunError(f"{command[0]}: no answer in {ANSWER_SECONDS} s; Slurm's controller may be down") from None


def answer(*command: str) -> str:
    """What a command prints. Raises UserError if Slurm does not answer."""
    done = ask(*command)
    if done.returncode:
        raise UserError(f"Slurm does not answer: {done.stderr.strip()}; is SLURM_CONF right, and its controller up?")
    return done.stdout


def submitting_environment() -> dict[str, str]:
    """In which sbatch is called. Jobs get all of it (`--export=ALL`).

    With a list of names there, or with none, Slurm adds what the user's login shell sets on the node, tokens included.
    """
    names = {*PASSED_ON, *PASSED_ON_BY_NAME}
    return {
        name: value
        for name, value in os.environ.items()
        if name in names or (name.startswith(FOR_SBATCH) and name not in NOT_FOR_SBATCH)
    }


def seconds_of(clock: str) -> int | None:
    """Of `1-02:03:04`, `02:03:04`, `03:04`; None for UNLIMITED and the like."""
    days, _, hours = clock.rpartition("-")
    parts = hours.split(":")
    if not all(part.isdigit() for part in (days or "0", *parts)):
        return None
    seconds = 0
    for part in parts:
        seconds = seconds * 60 + int(part)
    return int(days or 0) * 86400 + seconds
