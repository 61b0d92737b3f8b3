"""The environment of a rank, as a table of (name, value, reason). The same table for local runs and for jobs."""

import os
from dataclasses import dataclass

from pipeline.plan.job import JobPlan
from pipeline.recipe.schema import Gpu


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
        return [*table, *_CPU_ONLY]
    table.append(
        Variable(
            "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1", "flash-attn-4 compiles each variant once, not once a job"
        )
    )
    if plan.recipe.train.deterministic:
        table.append(
            Variable("CUBLAS_WORKSPACE_CONFIG", ":4096:8", "cuBLAS sums in one order only with a workspace of its own")
        )
    if plan.recipe.memory.allocator.expandable_segments:
        # torch >= 2.9 reads the first name, older ones the second; the wrong one is ignored without a word.
        table += [
            Variable(name, "expandable_segments:True", "CUDA's caching allocator must not fragment (ALST §3.4)")
            for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
        ]
    return table


_CPU_ONLY = (
    Variable("DS_ACCELERATOR", "cpu", "DeepSpeed must not look for a GPU"),
    Variable("CUDA_VISIBLE_DEVICES", "", "a recipe for cpu trains on cpu, also where there is a GPU"),
    Variable("GLOO_SOCKET_IFNAME", "lo", "the ranks are on one machine, whose name may not resolve"),
)


def applied(table: list[Variable]) -> dict[str, str]:
    """This process's environment with the table over it."""
    return {**os.environ, **{variable.name: variable.value for variable in table}}
