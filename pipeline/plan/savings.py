"""What each memory feature of a plan saves: the same plan without it."""

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.plan.advice import changed
from pipeline.plan.hardware import GIB
from pipeline.plan.job import JobPlan, plan_job
from pipeline.plan.limits import Load, load_of
from pipeline.recipe.schema import ResolvedChunks

CHECKPOINT = "memory.activation_checkpoint"
CHUNKS = "memory.sequence_chunks"
_ON_DEVICE = f"{CHECKPOINT}={{offload: null, offload_dtype: null, resident_groups: 0, disk_groups: 0}}"


@dataclass(frozen=True)
class Saving:
    """A feature that is on, and how many bytes more there would be without it; less than none where it costs some."""

    feature: str
    gpu_bytes: int
    """Of a rank; on a CPU of its tensors."""
    host_bytes: int
    """Of a node."""


def savings(plan: JobPlan) -> tuple[Saving, ...]:
    """One for each feature of `memory` that is on."""
    now = load_of(plan)
    found = []
    for feature, overrides in _without(plan):
        without = _load_with(plan, overrides)
        found.append(Saving(feature, without.gpu.total - now.gpu.total, without.host.total - now.host.total))
    return tuple(found)


def _without(plan: JobPlan) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(feature, what turns it off)."""
    memory = plan.recipe.memory
    for name in ("tiled_loss", "tiled_mlp", "tiled_norm"):
        if getattr(memory, name) is not None:
            yield name, (f"memory.{name}=null",)
    checkpoint = memory.activation_checkpoint
    if checkpoint is None:
        return
    off = ("memory.sequence_chunks=null",) if memory.sequence_chunks is not None else ()
    yield "activation_checkpoint", (*off, "memory.activation_checkpoint=null")
    if memory.sequence_chunks is not None:
        yield from _without_chunks(memory.sequence_chunks.resolved)
    found, chunks = checkpoint.resolved, memory.sequence_chunks
    there = () if chunks is None else (f"{CHUNKS}.hidden_states=gpu",)
    if checkpoint.offload is not None:
        yield f"offload to {checkpoint.offload}", (*there, _ON_DEVICE)
    if found.disk_groups:
        yield "disk_groups", (f"{CHECKPOINT}.disk_groups=0",)
    if found.resident_groups:
        yield "resident_groups", (f"{CHECKPOINT}.resident_groups=0",)
    if found.layers_per_group > 1:
        yield "layers_per_group", (f"{CHECKPOINT}.layers_per_group=1",)
    if found.keep_attention:
        yield "keep_attention", (f"{CHECKPOINT}.keep_attention=false",)
    if checkpoint.offload_dtype is not None:
        yield "offload_dtype", (f"{CHECKPOINT}.offload_dtype=null",)


def _without_chunks(found: ResolvedChunks) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield "sequence_chunks", (f"{CHUNKS}=null",)
    if found.hidden_states == "cpu":
        yield "hidden_states on cpu", (f"{CHUNKS}.hidden_states=gpu",)
    if found.keys_values == "cpu":
        yield "keys_values on cpu", (f"{CHUNKS}.keys_values=gpu",)
    if found.keep_keys_values:
        yield "keep_keys_values", (f"{CHUNKS}.keep_keys_values=false",)


def _load_with(plan: JobPlan, overrides: tuple[str, ...]) -> Load:
    return load_of(plan_job(changed(plan.recipe, overrides), shape=plan.model))


def savings_lines(plan: JobPlan, *, peak_bytes: int) -> Iterator[str]:
    """What was planned for a rank beside the peak that was measured, then what each feature saves by the plan.

    Without a GPU a rank's tensors are in its process too: there is one number of each.
    """
    load = load_of(plan)
    on_cpu = load.hardware.memory_bytes is None
    ranks = plan.recipe.hardware.gpus_per_node
    planned = (load.host.total - load.host.by_name["system"]) / ranks if on_cpu else load.gpu.allocated
    what = "resident in a process" if on_cpu else "allocated on a GPU"
    yield f"memory: {_gib(planned)} GiB planned {what}, {_gib(peak_bytes)} measured at the peak of the largest"
    titles = ["a process"] if on_cpu else ["a GPU", "host, a node"]
    yield _columns("GiB more without it, by the plan", titles)
    for saving in savings(plan):
        sizes = [saving.host_bytes / ranks] if on_cpu else [saving.gpu_bytes, saving.host_bytes]
        yield _columns(saving.feature, [_more(size) for size in sizes])
    if on_cpu and plan.recipe.memory.activation_checkpoint and plan.recipe.memory.activation_checkpoint.offload:
        yield "  (an offload frees a GPU; without one it only copies within the same memory)"


def _columns(name: str, cells: list[str]) -> str:
    return f"  {name:<34}" + "".join(f"{cell:>14}" for cell in cells)


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}"


def _more(size: float) -> str:
    return f"{size / GIB:+,.2f}" if abs(size) >= GIB / 200 else "-"
