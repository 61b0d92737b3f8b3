"""The peak of what a model's forward and backward really allocate on the CPU, with what a plan attaches.

Every allocation and release of torch's allocator is replayed from the profiler's record, so the peak is exact and the
same on every machine. Weights and optimizer states are there before and are not counted; gradients are added into
tensors that are there before.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from pipeline.attention.function import NAME, AttentionContext, register
from pipeline.attention.kernels.cpu import CpuKernel
from pipeline.attention.segments import segments_of
from pipeline.memory.apply import Attached, attach_features
from pipeline.model.build import build_model
from pipeline.parallel.mesh import Mesh
from pipeline.parallel.shard import Layout
from pipeline.plan.job import JobPlan

DOCUMENT = 64
"""Tokens. Short: the CPU kernel's block of scores, which the planner leaves out, is then small."""


@dataclass(frozen=True)
class Measured:
    peak_bytes: int
    attached: Attached


def measured(plan: JobPlan, *, document: int = DOCUMENT) -> Measured:
    """The peak of a second forward and backward of the plan's model, of one rank; for more there must be a group."""
    register()
    model = build_model(plan.recipe.model, attention=NAME, seed=0)
    attached = attach_features(model, plan)
    ids = torch.randint(plan.model.vocab_size, (1, plan.local_seq_len))
    bounds = torch.arange(0, plan.seq_len + 1, document, dtype=torch.int32)
    group = dist.group.WORLD if plan.sp > 1 else None
    mesh = Mesh(rank=0, world_size=plan.sp, sp=plan.sp, sp_group=group)
    layout = Layout(plan.seq_len, plan.sp, plan.chunk_tokens)
    context = AttentionContext(segments_of(bounds, device=torch.device("cpu")), mesh, CpuKernel(), layout)
    inputs = {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(plan.local_seq_len)[None]}

    def step() -> None:
        model(**inputs, attention_context=context).backward()

    return Measured(peak_bytes(step), attached)


def peak_bytes(step: Callable[[], None]) -> int:
    """The most that a second run of the step holds at once."""
    step()  # gradients are there from now on
    gc.collect()  # what was left before must not go while this is recorded
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = record.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


@contextmanager
def group_of_two() -> Iterator[None]:
    """Of this process alone: nothing is sent, and what is received has its size. gloo's threads let go of tensors when
    they come to it, so with gloo the peak would depend on the machine."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield
    finally:
        dist.destroy_process_group()
