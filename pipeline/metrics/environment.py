"""What a run found around it: versions, and the variables that change what it does. Never a secret."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pipeline.metrics.store import redact
from pipeline.plan.cluster import SECRET_NAME

PACKAGES = ("torch", "transformers", "deepspeed", "flash-attn", "flash-attn-4", "liger-kernel", "mlflow", "numpy")
TOLD = re.compile(r"^(ALST|CUDA|DS|FLASH|GLOO|HF|MASTER|MKL|MLFLOW|NCCL|OMP|PYTORCH|PYTHON|SLURM|TORCH|FI_EFA)_?")
"""Names that begin so may be told; what a shell holds besides is nobody's business."""


def environment_found() -> dict[str, Any]:
    """`{"python": …, "packages": {…}, "variables": {…}}`; a variable named like a secret is left out."""
    names = sorted(name for name in os.environ if TOLD.match(name) and not SECRET_NAME.search(name))
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "variables": {name: redact(os.environ[name]) for name in names},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
