"""An image's own test: everything in it imports, and torch loads its own libraries, not the system's.

python check.py cpu|cuda
"""

import importlib
import re
import sys
from pathlib import Path

from labels import attention_backends

PYTHON = Path(sys.prefix)
IMPORTS = ("torch", "transformers", "accelerate", "datasets", "deepspeed", "mlflow", "matplotlib", "numpy", "psutil")
IMPORTS += ("pyarrow", "pydantic", "rich", "submitit", "tokenizers", "typer", "xxhash", "yaml")
CUDA_IMPORTS = ("flash_attn", "flash_attn_interface", "flash_attn.cute", "liger_kernel", "triton")
OPERATORS = {"cpu": ("cpu_adam", "deepspeed_shm_comm"), "cuda": ("cpu_adam", "fused_adam")}
OWN = re.compile(r"lib(cudnn|cublas|cudart|nccl|nvrtc|torch|c10|gomp)[^/]*\.so")
"""Libraries that torch brings. Found elsewhere first, they are of another version, and fail late or not at all."""


def main(kind: str) -> None:
    for name in IMPORTS + (CUDA_IMPORTS if kind == "cuda" else ()):
        importlib.import_module(name)
    if kind == "cuda":
        load_cudnn()
    print(f"python {sys.version.split()[0]}")
    print(f"attention: {', '.join(attention_backends())}")
    check_operators(kind)
    check_libraries()


def load_cudnn() -> None:
    """torch loads cuDNN when it is first asked for."""
    import torch

    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")


def check_operators(kind: str) -> None:
    """DeepSpeed's operators are there and load without a compiler."""
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    for name in OPERATORS[kind]:
        if not installed_ops.get(name):
            sys.exit(f"deepspeed: {name} was not built into this image; its jobs would each compile it")
        if kind == "cpu":
            ALL_OPS[name].load()
        print(f"deepspeed: {name} is built in")


def check_libraries() -> None:
    """What this process has mapped by now."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = {Path(line.split(maxsplit=5)[5]) for line in lines if "/" in line}
    loaded = sorted(path for path in mapped if OWN.match(path.name))
    for path in loaded:
        print(f"loaded {path}")
    if strangers := [str(path) for path in loaded if not path.is_relative_to(PYTHON)]:
        sys.exit(f"{', '.join(strangers)}: shadows the one that torch brings; remove it from the image")


if __name__ == "__main__":
    main(sys.argv[1])
