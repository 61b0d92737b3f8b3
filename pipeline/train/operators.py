"""DeepSpeed's operators that are compiled at their first use, on the machine they run on.

torch keeps others out of a build by a file, which a process that is killed leaves behind; whoever comes next waits for
ever. Here the processes of a node take turns under a lock that ends with its process, so a file found then is a
dead one's.
"""

import os
import platform
from pathlib import Path

from deepspeed.ops.op_builder import CPUAdamBuilder
from torch.utils.cpp_extension import _get_build_directory as folder_of

from pipeline.data.lock import one_after_another
from pipeline.errors import RunError

FOLDER = "TORCH_EXTENSIONS_DIR"
"""Where operators are kept. Ours by default, and one per host: they are compiled for the processor they are built on,
and a home folder serves hosts of several kinds."""

TORCHS_LOCK = "lock"


def default_folder() -> str:
    return str(Path.home() / ".cache" / "alst" / "operators" / platform.node())


def load_cpu_adam() -> None:
    """DeepSpeed's Adam on the host, compiled if this host has not yet: a minute. Raises RunError if it cannot be."""
    os.environ.setdefault(FOLDER, default_folder())
    try:
        folder = Path(folder_of(CPUAdamBuilder.NAME, verbose=False))
        with one_after_another(folder, "turn"):
            (folder / TORCHS_LOCK).unlink(missing_ok=True)
            CPUAdamBuilder().load()
    except (OSError, RuntimeError, ImportError) as error:
        raise RunError(
            f"DeepSpeed's Adam on the host cannot be compiled in {os.environ[FOLDER]}: {error}; it needs g++, ninja "
            f"and a folder to write to ({FOLDER} names another); the project's image has it built in; or keep the "
            "states on the GPU: zero.offload_optimizer: null"
        ) from error
