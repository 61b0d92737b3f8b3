"""How fast ranks reach each other: a few all-reduces before anything depends on it."""

import statistics
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pipeline.errors import RunError

GPU_BYTES = 256 * 2**20  # large enough that bandwidth counts, not latency
CPU_BYTES = 4 * 2**20
WARM_UP, REPEATS = 2, 5


@dataclass(frozen=True)
class Fabric:
    """An all-reduce over all ranks."""

    bytes: int
    seconds: float
    """Median of this rank's."""

    @property
    def bus_bytes_per_second(self) -> float:
        """Each rank sends and receives 2 (n - 1) / n of the bytes in a ring, so this compares across world sizes."""
        world = dist.get_world_size()
        return 2 * (world - 1) / world * self.bytes / self.seconds


def measure(device: torch.device) -> Fabric:
    """Collective over all ranks. Raises RunError if a sum is wrong."""
    size = GPU_BYTES if device.type == "cuda" else CPU_BYTES
    seconds = [_all_reduce_seconds(device, size) for _ in range(WARM_UP + REPEATS)]
    return Fabric(size, statistics.median(seconds[WARM_UP:]))


def check_fabric(device: torch.device, *, least_bytes_per_second: float | None) -> float | None:
    """The bus bandwidth of the slowest rank, in bytes per second; None where there is one rank alone. Collective.

    Raises RunError, on every rank, if a sum is wrong, or if the bandwidth is less than asked for.
    """
    if dist.get_world_size() == 1:
        return None
    slowest = torch.tensor([measure(device).bus_bytes_per_second], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MIN)
    found = float(slowest)
    if least_bytes_per_second is not None and found < least_bytes_per_second:
        raise RunError(
            f"the bus bandwidth of an all-reduce is {found / 1e9:.2f} GB/s, and "
            f"train.least_bus_gigabytes_per_second = {least_bytes_per_second / 1e9:g}: try pairs of the nodes with "
            "`alst cluster check`, exclude the slow one, then `alst resume`"
        )
    return found


def _all_reduce_seconds(device: torch.device, size: int) -> float:
    ones = torch.ones(size // 4, device=device)
    started = time.perf_counter()
    dist.all_reduce(ones)
    total = ones[0].item()  # waits for the collective
    seconds = time.perf_counter() - started
    if total != dist.get_world_size() or bool((ones != total).any()):
        raise RunError(
            f"all-reduce of ones over {dist.get_world_size()} ranks gave {total}; the fabric is not in order"
        )
    return seconds
