"""What a node has: vendor figures by GPU, and how much of them a step gets. The recipe's `hardware` stands over them.

Memory is what the driver reports. Rates are one way, in bytes per second: half of a two-way figure.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.plan import fitted
from pipeline.recipe.schema import Gpu, HardwareRecipe, ModelRecipe

GIB = 2**30
MIB = 2**20
GB = 10**9

Kernel = Literal["cpu", "flash_attention_2", "flash_attention_3", "flash_attention_4"]


@dataclass(frozen=True)
class Hardware:
    """A node with its GPUs, as vendors state it. None is what is not known, on a CPU."""

    memory_bytes: int | None
    """Of one GPU."""
    peak_flops: float | None
    """Dense bf16, FLOP/s."""
    memory_rate: float
    """Of the GPU's memory."""
    gpu_link_rate: float
    """NVLink, per GPU."""
    host_link_rate: float
    """Between host memory and one GPU."""
    host_memory_bytes: int
    """Of a usual node; vendors leave the choice to the buyer."""
    fabric_rate: float
    """Between nodes: the adapter beside each GPU."""
    disk_rate: float = 2 * GB
    """Written by a node to shared storage. An assumption: no vendor states it."""
    scratch_bytes: int = 8 * 3840 * GB
    """Of a node's own disks: eight NVMe of 3.84 TB, as in DGX A100 (80 GB), H100, H200 and B200."""
    scratch_rate: float = 10 * GB
    """Written and read there. An assumption: eight such disks do more, one of them a third."""


HARDWARE: Mapping[Gpu, Hardware] = {
    # No agreed peak: neither seconds nor MFU. 16 GiB is a laptop's, and any disk is as fast as this.
    Gpu.CPU: Hardware(
        None, None, 50 * GB, 10 * GB, 10 * GB, 16 * GIB, 1 * GB, scratch_bytes=16 * GB, scratch_rate=GB / 100
    ),
    # NVIDIA A100 data sheet: 312 TFLOPS, 1,555 and 2,039 GB/s, NVLink 600 GB/s two-way, PCIe 4.0 x16; HDR 200 Gb/s;
    # DGX A100: 1 TB (40 GB), 2 TB (80 GB).
    Gpu.A100_40GB: Hardware(40960 * MIB, 312e12, 1555 * GB, 300 * GB, 32 * GB, 931 * GIB, 25 * GB),
    Gpu.A100_80GB: Hardware(81920 * MIB, 312e12, 2039 * GB, 300 * GB, 32 * GB, 1862 * GIB, 25 * GB),
    # H100 SXM data sheet: 989 TFLOPS, 3.35 TB/s, NVLink 900 GB/s two-way, PCIe 5.0 x16; NDR 400 Gb/s. The host memory
    # is that of the nodes of the ALST paper, 1.9 TB.
    Gpu.H100_80GB: Hardware(81559 * MIB, 989e12, 3350 * GB, 450 * GB, 64 * GB, 1769 * GIB, 50 * GB),
    # GH200 data sheet: 990 TFLOPS, 4 TB/s, NVLink-C2C 900 GB/s two-way to 480 GB of LPDDR5X; one GPU a node.
    Gpu.GH200_96GB: Hardware(97871 * MIB, 990e12, 4000 * GB, 450 * GB, 450 * GB, 447 * GIB, 50 * GB),
    # H200 SXM data sheet: as H100, 4.8 TB/s; DGX H200: 2 TB.
    Gpu.H200_141GB: Hardware(143771 * MIB, 989e12, 4800 * GB, 450 * GB, 64 * GB, 1862 * GIB, 50 * GB),
    # HGX B200 data sheet: 2.25 PFLOPS dense, 7.7 TB/s, NVLink 1.8 TB/s two-way, PCIe 5.0 x16; DGX B200: 2 TB.
    Gpu.B200_192GB: Hardware(183359 * MIB, 2250e12, 7700 * GB, 900 * GB, 64 * GB, 1862 * GIB, 50 * GB),
}


def hardware_of(recipe: HardwareRecipe) -> Hardware:
    """The profile of the recipe's GPU, with what the recipe says instead."""
    profile = HARDWARE[recipe.gpu]
    host, fabric = recipe.host_memory_gib, recipe.fabric_gigabytes_per_second
    disk, scratch_rate = recipe.disk_gigabytes_per_second, recipe.scratch_gigabytes_per_second
    return replace(
        profile,
        host_memory_bytes=profile.host_memory_bytes if host is None else int(host * GIB),
        fabric_rate=profile.fabric_rate if fabric is None else fabric * GB,
        disk_rate=profile.disk_rate if disk is None else disk * GB,
        scratch_bytes=profile.scratch_bytes if recipe.scratch_gib is None else int(recipe.scratch_gib * GIB),
        scratch_rate=profile.scratch_rate if scratch_rate is None else scratch_rate * GB,
    )


@dataclass(frozen=True)
class Efficiency:
    """The part of a vendor's figure that a step gets. `plan/fitted.py` has what was fitted."""

    matmul: float
    """Of the bf16 peak, in large matmuls."""
    attention_forward: float
    """Of the bf16 peak, causal, head dim 128, long documents."""
    attention_backward: float
    links: float = 0.75
    """Of NVLink, fabric and host link, in large pinned or device buffers: NCCL's and CUDA's usual share."""
    memory: float = 0.8
    """Of the GPU's memory rate, in elementwise kernels."""


_ATTENTION: Mapping[Kernel, Mapping[str, tuple[float, float | None]]] = {
    # (forward, backward). flash-attn 2 and 3: the figures of their papers (2307.08691, 2407.08608), causal, head dim
    # 128, 16K tokens; on H100 the backward of flash-attn 2 is fitted. flash-attn 4: its
    # authors' on B200. torch runs flash-attn 2's algorithm.
    "flash_attention_2": {"A100": (0.60, 0.55), "H100": (0.38, None), "B200": (0.20, 0.16)},
    "flash_attention_3": {"H100": (0.62, 0.50)},
    "flash_attention_4": {"H100": (0.60, 0.48), "B200": (0.65, 0.45)},
}
_MATMUL = {"A100": 0.75, "H100": 0.60, "B200": 0.60}
"""Of the peak that cuBLAS reaches at the sizes of a layer, power limit included; common knowledge, not fitted."""

_GENERATION = {
    Gpu.A100_40GB: "A100",
    Gpu.A100_80GB: "A100",
    Gpu.H100_80GB: "H100",
    Gpu.GH200_96GB: "H100",
    Gpu.H200_141GB: "H100",
    Gpu.B200_192GB: "B200",
}


def kernel_of(model: ModelRecipe, gpu: Gpu) -> Kernel:
    """Which kernel's bytes and speed are planned; for `auto` those of flash-attn 2, which torch itself brings: what
    the job finds is at least as fast, and takes no more memory."""
    if gpu is Gpu.CPU:
        return "cpu"
    match model.attention:
        case "flash_attention_3" | "flash_attention_4":
            return model.attention
        case _:
            return "flash_attention_2"


def efficiency_of(model: ModelRecipe, gpu: Gpu) -> Efficiency:
    """Not for a CPU, of which no peak is known."""
    generation = _GENERATION[gpu]
    by_generation = _ATTENTION[kernel_of(model, gpu)]
    forward, backward = by_generation.get(generation, _ATTENTION["flash_attention_2"][generation])
    return Efficiency(_MATMUL[generation], forward, backward or fitted.constants.attention_backward)
