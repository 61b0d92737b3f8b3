"""What the ranks of a cluster find out together: where they are, what they see, how fast they reach each other."""

import os

import torch
import torch.distributed as dist

from pipeline.files import write_json
from pipeline.plan.job import JobPlan
from pipeline.plan.run_dir import RunDir
from pipeline.recipe.schema import Gpu
from pipeline.train.engine import init_distributed
from pipeline.train.fabric import measure


def check_cluster(plan: JobPlan, run_dir: RunDir) -> None:
    """Collective over all ranks; rank 0 writes check.json. Raises RunError if the sum is wrong."""
    on_gpu = plan.recipe.hardware.gpu is not Gpu.CPU
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    init_distributed(plan)
    fabric = measure(device)
    mine = {"rank": dist.get_rank(), "node": os.environ.get("SLURMD_NODENAME", ""), "device": _device_name(device)}
    ranks: list[dict[str, object]] = [{}] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    if dist.get_rank() == 0:
        found = {
            "backend": dist.get_backend(),
            "ranks": [rank["rank"] for rank in ranks],
            "nodes": [rank["node"] for rank in ranks],
            "devices": [rank["device"] for rank in ranks],
            "bytes": fabric.bytes,
            "seconds": fabric.seconds,
            "bus_bytes_per_second": fabric.bus_bytes_per_second,
        }
        write_json(run_dir.cluster_check, found)
    dist.barrier()


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}"
