"""What the ranks of a cluster find out together: where they are, what they see, how fast they reach each other."""

import os
import statistics
import time

import torch
import torch.distributed as dist

from pipeline.errors import RunError
from pipeline.files import write_json
from pipeline.plan.job import JobPlan
from pipeline.plan.run_dir import RunDir
from pipeline.recipe.schema import Gpu
from pipeline.train.engine import init_distributed

GPU_BYTES = 256 * 2**20  # large enough that bandwidth counts, not latency
CPU_BYTES = 4 * 2**20
WARM_UP, REPEATS = 2, 5


def check_cluster(plan: JobPlan, run_dir: RunDir) -> None:
    """Collective over all ranks; rank 0 writes check.json. Raises RunError if the sum is wrong."""
    on_gpu = plan.recipe.hardware.gpu is not Gpu.CPU
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    init_distributed(plan)
    seconds = [_all_reduce_seconds(device, GPU_BYTES if on_gpu else CPU_BYTES) for _ in range(WARM_UP + REPEATS)]
    mine = {"rank": dist.get_rank(), "node": os.environ.get("SLURMD_NODENAME", ""), "device": _device_name(device)}
    ranks: list[dict[str, object]] = [{}] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    if dist.get_rank() == 0:
        size = GPU_BYTES if on_gpu else CPU_BYTES
        median = statistics.median(seconds[WARM_UP:])
        world = dist.get_world_size()
        found = {
            "backend": dist.get_backend(),
            "ranks": [rank["rank"] for rank in ranks],
            "nodes": [rank["node"] for rank in ranks],
            "devices": [rank["device"] for rank in ranks],
            "bytes": size,
            "seconds": median,
            # Each rank sends and receives 2 (n - 1) / n of the bytes in a ring, so this compares across world sizes.
            "bus_bytes_per_second": 2 * (world - 1) / world * size / median,
        }
        write_json(run_dir.cluster_check, found)
    dist.barrier()


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


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}"
