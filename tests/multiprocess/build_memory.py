"""How much memory a rank takes to build a model, partitioned and whole. Worker of `test_build_memory`.

`python -m tests.multiprocess.build_memory FOLDER` on every rank; FOLDER/rank<N>.json.
"""

import gc
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.model.build import build_model
from pipeline.plan.job import JobPlan, plan_job
from pipeline.recipe.load import load
from pipeline.train.engine import init_distributed, zero3_config

SIZES = {
    "vocab_size": 2048,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
MOST_SHARD_BYTES = 40_000_000


def plan_of(ranks: int, *, weights: Path | None) -> JobPlan:
    """Random weights, or those in `weights`; ZeRO-3."""
    sizes = [f"model.config.{name}={value}" for name, value in SIZES.items()]
    asked = sizes if weights is None else [*sizes, "model.init=pretrained", f"model.name_or_path={weights}"]
    return plan_job(load("tiny", overrides=[*asked, f"hardware.gpus_per_node={ranks}", "zero.stage=3"]))


def model_bytes() -> int:
    """Of all parameters, in float32."""
    hidden, mlp, vocab = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["vocab_size"]
    layer = 4 * hidden * hidden + 3 * hidden * mlp + 2 * hidden
    return 4 * (SIZES["num_hidden_layers"] * layer + 2 * vocab * hidden + hidden)


def largest_module_bytes() -> int:
    """An MLP: what is gathered at once while it is initialized."""
    return 4 * 3 * SIZES["hidden_size"] * SIZES["intermediate_size"]


def memory_bytes() -> int:
    """Of this process alone: without pages of files, which the kernel takes back when it needs them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))


@contextmanager
def growth_into(found: dict[str, int], name: str) -> Iterator[None]:
    """The most that memory grows inside the block, looked at every two milliseconds."""
    gc.collect()
    before, most, over = memory_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.002):
            most = max(most, memory_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        found[name] = max(most, memory_bytes()) - before


def built(plan: JobPlan, *, partitioned: bool = True) -> dict[str, int]:
    """What building the plan's model takes at most, and what this rank holds of its parameters afterwards."""
    found: dict[str, int] = {}
    with growth_into(found, "growth"):
        zero3 = zero3_config(plan) if partitioned else None
        model = build_model(plan.recipe.model, attention="sdpa", seed=0, zero3=zero3)
    return found | {"held": sum(getattr(p, "ds_tensor", p).nbytes for p in model.parameters())}


def main(folder: Path) -> None:
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    random = plan_of(ranks, weights=None)
    init_distributed(random)
    weights = folder / "weights"
    if rank == 0:
        stock = build_model(random.recipe.model, attention="sdpa", seed=0)
        stock.save_pretrained(weights, max_shard_size=MOST_SHARD_BYTES)
        del stock
    dist.barrier()
    for zero3 in (zero3_config(random), None):  # what stays for good, such as imports, is taken here
        build_model(load("tiny").model, attention="sdpa", seed=0, zero3=zero3)
    pretrained = plan_of(ranks, weights=weights)
    found = {"random": built(random), "pretrained": built(pretrained), "whole": built(random, partitioned=False)}
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
