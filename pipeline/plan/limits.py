"""Whether a plan fits, and what binds: its bytes against those of the hardware."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.plan.hardware import Hardware, hardware_of
from pipeline.plan.host_memory import NodeBytes, host_bytes
from pipeline.plan.memory import GpuBytes, gpu_bytes

if TYPE_CHECKING:
    from pipeline.plan.job import JobPlan


@dataclass(frozen=True)
class Load:
    """What a plan takes of each memory, beside what there is."""

    gpu: GpuBytes
    host: NodeBytes
    hardware: Hardware

    @property
    def gpu_free_bytes(self) -> int:
        """Less than none where it does not fit. Without a GPU all is host memory."""
        return 0 if self.hardware.memory_bytes is None else self.hardware.memory_bytes - self.gpu.total

    @property
    def host_free_bytes(self) -> int:
        return self.hardware.host_memory_bytes - self.host.total

    @property
    def fits(self) -> bool:
        return self.gpu_free_bytes >= 0 and self.host_free_bytes >= 0

    @property
    def binding(self) -> str:
        """The memory of which the larger part is taken: `gpu` or `host`."""
        host = self.host.total / self.hardware.host_memory_bytes
        gpu = 0.0 if self.hardware.memory_bytes is None else self.gpu.total / self.hardware.memory_bytes
        return "gpu" if gpu > host else "host"


def load_of(plan: "JobPlan") -> Load:
    return Load(gpu_bytes(plan), host_bytes(plan), hardware_of(plan.recipe.hardware))
