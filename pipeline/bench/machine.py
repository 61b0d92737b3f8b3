"""What the bench runs on, and what of it a result has to state. Asks nvidia-smi and /proc: no torch, no GPU touched."""

import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.plan.hardware import GIB
from pipeline.recipe.schema import Gpu

QUERY = "name,driver_version,memory.total"


@dataclass(frozen=True)
class Machine:
    """This machine."""

    gpu: Gpu
    """As a recipe names it."""
    gpu_name: str | None
    """As the driver does; None without one. So are the next two."""
    driver: str | None
    gpu_memory_mib: int | None
    gpus: int
    """0 without."""
    cpu: str
    cores: int
    """That this process may use."""
    host_memory_gib: float

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "gpu": self.gpu.value, "platform": platform.platform()}

    def overrides(self, processes: int) -> tuple[str, ...]:
        """Of a recipe's hardware, for one node of this; on a CPU with so many processes."""
        return (
            f"hardware.gpu={self.gpu.value}",
            f"hardware.gpus_per_node={self.gpus or processes}",
            "hardware.nodes=1",
            f"hardware.host_memory_gib={self.host_memory_gib:.1f}",
        )


def machine_here() -> Machine:
    """Raises UserError where there is a GPU that recipes have no name for."""
    rows = _nvidia_smi()
    name, driver, memory = rows[0] if rows else (None, None, None)
    return Machine(
        gpu=gpu_of(name, int(memory or 0)),
        gpu_name=name,
        driver=driver,
        gpu_memory_mib=None if memory is None else int(memory),
        gpus=len(rows),
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)),
        host_memory_gib=_total_memory_bytes() / GIB,
    )


def gpu_of(name: str | None, memory_mib: int) -> Gpu:
    """The recipe's name of a GPU, from the driver's: of several of one generation the one with the nearest memory."""
    if name is None:
        return Gpu.CPU
    known = [gpu for gpu in Gpu if gpu is not Gpu.CPU and gpu.value.partition("-")[0] in name.replace("NVIDIA ", "")]
    if not known:
        raise UserError(
            f"hardware.gpu: this machine has {name}, for which recipes have no name; name the nearest one, e.g. "
            f"hardware.gpu={Gpu.H100_80GB.value}, as an override"
        )
    return min(known, key=lambda gpu: abs(int(gpu.value.rpartition("-")[2].removesuffix("GB")) * 1000 - memory_mib))


def _nvidia_smi() -> list[tuple[str, str, str]]:
    """(name, driver, MiB) of each GPU; none where there is no driver."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return [(row[0], row[1], row[2]) for row in rows if len(row) == 3]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _total_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
