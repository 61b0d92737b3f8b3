"""What an image says of itself, as lines of Apptainer's labels: read before a job is submitted into it."""

import sys
from importlib.metadata import PackageNotFoundError, version

ATTENTION = {"torch": "torch", "flash_attention_2": "flash-attn", "flash_attention_3": "flash-attn-3"}
ATTENTION |= {"flash_attention_4": "flash-attn-4"}


def attention_backends() -> list[str]:
    """`flash_attention_2=2.8.3` of each that is installed."""
    found = []
    for backend, package in ATTENTION.items():
        try:
            found.append(f"{backend}={version(package)}")
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    print(f"alst.python {sys.version_info.major}.{sys.version_info.minor}")
    print(f"alst.submitit {version('submitit')}")
    print(f"alst.attention {' '.join(attention_backends())}")
