"""The code of a run, copied into its folder, with the commit it came from."""

import shutil
import subprocess
import time
from pathlib import Path

from pipeline.errors import RunError
from pipeline.plan.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[2]


def commit() -> str:
    """`<hash>`, with `-dirty` when the working tree differs; `unknown` outside a checkout."""
    if not (ROOT / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def take_snapshot(run_dir: RunDir) -> None:
    """Copy the package and the configs to `code/`, and write commit.txt; other code of an earlier start is kept.

    Raises RunError if it cannot be written, and leaves no part of it.
    """
    now = commit()
    if run_dir.code.exists():
        before = run_dir.commit.read_text().strip()
        if before == now:
            return
        run_dir.code.rename(run_dir.path / f"code-until-{time.strftime('%Y%m%d-%H%M%S')}-{before}")
    try:
        for name in ("pipeline", "configs"):
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, run_dir.code / name, ignore=shutil.ignore_patterns("__pycache__"))
        run_dir.commit.write_text(now + "\n")
    except OSError as error:  # shutil's own among them, which tells of every file
        shutil.rmtree(run_dir.code, ignore_errors=True)
        cause = error.strerror or error.args[0][0][2]
        raise RunError(
            f"{run_dir.code}: the code cannot be copied there ({cause}); make room, and start again"
        ) from None
