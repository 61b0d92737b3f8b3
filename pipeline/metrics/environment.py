"""What a run found around it: versions, and the variables that change what it does. Never a secret."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.metrics.store import redact
from pipeline.plan.cluster import SECRET_NAME

PACKAGES = ("torch", "transformers", "deepspeed", "flash-attn", "flash-attn-4", "liger-kernel", "mlflow", "numpy")
TOLD = re.compile(r"^((ALST|CUDA|DS|FLASH|GLOO|HF|MASTER|MKL|MLFLOW|NCCL|OMP|PYTORCH|SLURM|TORCH|FI_EFA)_|PYTHON)")
"""Names that begin so may be told; what a shell holds besides is nobody's business."""


def environment_found() -> dict[str, Any]:
    """`{"python": …, "packages": {…}, "variables": {…}}`, without what is named like a secret or is in their file."""
    secret = _names_of_secrets()
    names = sorted(
        name for name in os.environ if TOLD.match(name) and not SECRET_NAME.search(name) and name not in secret
    )
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "variables": {name: redact(os.environ[name]) for name in names},
    }


def _names_of_secrets() -> set[str]:
    """The variables that this process has from the file of secrets, if it can still be read."""
    if (path := os.environ.get("ALST_SECRETS")) is None:
        return set()
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return {line.partition("=")[0] for line in lines}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
