"""The environment of a rank, as a table of (name, value, reason). The same table for local runs and for jobs."""

import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from pipeline.plan.job import JobPlan
from pipeline.recipe.schema import Gpu

EXACT_PINNED_BLOCKS = "pinned_max_round_threshold_mb:64,pinned_max_cached_size_mb:64"
"""torch would give a block of 33 GiB 64. Those that keep their size must not be cached: up to 2.13 torch may hand one
out to a larger request (pytorch/pytorch#192722)."""

EXACT_PINNED_BLOCKS_SINCE = (2, 13)
"""2.12 does not know these keys, and torch refuses to start CUDA with a key that it does not know."""


@dataclass(frozen=True)
class Variable:
    name: str
    value: str
    reason: str


def environment(plan: JobPlan, *, cpus_per_rank: int) -> list[Variable]:
    """What every rank of the job gets, over the user's own environment."""
    table = [
        Variable(
            "OMP_NUM_THREADS", str(cpus_per_rank), "each rank its share of the cores; one thread starves CPU Adam"
        ),
        Variable("TOKENIZERS_PARALLELISM", "false", "ranks do not tokenize; forked threads would warn"),
        Variable(
            "PYTHONWARNINGS",
            "ignore::FutureWarning:torch.distributed.c10d_logger",
            "DeepSpeed calls collectives by names that torch 2.13 is renaming, at every step",
        ),
        Variable("PYTHONUNBUFFERED", "1", "a rank's log holds what it printed before it died"),
    ]
    if plan.recipe.hardware.gpu is Gpu.CPU:
        return [*table, *_CPU_ONLY, *(_ONE_MACHINE if plan.nodes == 1 else ())]
    table.append(
        Variable(
            "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1", "flash-attn-4 compiles each variant once, not once a job"
        )
    )
    if plan.recipe.train.deterministic:
        table.append(
            Variable("CUBLAS_WORKSPACE_CONFIG", ":4096:8", "cuBLAS sums in one order only with a workspace of its own")
        )
    said, reasons = [], []
    if plan.recipe.memory.allocator.expandable_segments:
        said.append("expandable_segments:True")
        reasons.append("CUDA's caching allocator must not fragment (ALST §3.4)")
    if _torch_here() >= EXACT_PINNED_BLOCKS_SINCE:
        said.append(EXACT_PINNED_BLOCKS)
        reasons.append("large page-locked blocks are not rounded up to powers of two")
    if said:
        table.append(Variable("PYTORCH_ALLOC_CONF", ",".join(said), "; ".join(reasons)))
    return table


def _torch_here() -> tuple[int, int]:
    """Of this machine; where there is none, on a login node, that of the nodes is taken for new enough."""
    try:
        major, minor = version("torch").split(".")[:2]
    except PackageNotFoundError:
        return EXACT_PINNED_BLOCKS_SINCE
    return int(major), int(minor)


_CPU_ONLY = (
    Variable("DS_ACCELERATOR", "cpu", "DeepSpeed must not look for a GPU"),
    Variable("CUDA_VISIBLE_DEVICES", "", "a recipe for cpu trains on cpu, also where there is a GPU"),
)

_ONE_MACHINE = (Variable("GLOO_SOCKET_IFNAME", "lo", "the ranks are on one machine, whose name may not resolve"),)


def applied(table: list[Variable]) -> dict[str, str]:
    """This process's environment with the table over it."""
    return {**os.environ, **{variable.name: variable.value for variable in table}}
