"""Whether a plan fits, and what binds: its bytes against those of the hardware."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.plan.hardware import Hardware, hardware_of
from pipeline.plan.host_memory import NodeBytes, host_bytes, scratch_bytes
from pipeline.plan.memory import GpuBytes, gpu_bytes

if TYPE_CHECKING:
    from pipeline.plan.job import JobPlan


@dataclass(frozen=True)
class Load:
    """What a plan takes of each memory, beside what there is."""

    gpu: GpuBytes
    host: NodeBytes
    scratch: NodeBytes
    hardware: Hardware

    @property
    def gpu_free_bytes(self) -> int:
        """Less than none where it does not fit. Without a GPU all is host memory."""
        return 0 if self.hardware.memory_bytes is None else self.hardware.memory_bytes - self.gpu.total

    @property
    def host_free_bytes(self) -> int:
        return self.hardware.host_memory_bytes - self.host.total

    @property
    def scratch_free_bytes(self) -> int:
        return self.hardware.scratch_bytes - self.scratch.total

    @property
    def free_bytes(self) -> tuple[int, int, int]:
        """Of GPU, host memory and scratch disk."""
        return self.gpu_free_bytes, self.host_free_bytes, self.scratch_free_bytes

    @property
    def missing_bytes(self) -> tuple[int, int, int]:
        gpu, host, scratch = (max(0, -free) for free in self.free_bytes)
        return gpu, host, scratch

    @property
    def fits(self) -> bool:
        return not any(self.missing_bytes)

    @property
    def binding(self) -> str:
        """The memory of which the largest part is taken: `gpu`, `host`, or `scratch`."""
        hardware = self.hardware
        taken = {
            "host": self.host.total / hardware.host_memory_bytes,
            "gpu": 0.0 if hardware.memory_bytes is None else self.gpu.total / hardware.memory_bytes,
            "scratch": self.scratch.total / hardware.scratch_bytes,
        }
        return max(taken, key=lambda name: taken[name])


def load_of(plan: "JobPlan") -> Load:
    return Load(gpu_bytes(plan), host_bytes(plan), scratch_bytes(plan), hardware_of(plan.recipe.hardware))
