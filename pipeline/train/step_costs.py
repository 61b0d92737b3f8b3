"""What each step of a run will cost, by the documents it is made of: known before it begins."""

from collections.abc import Callable

from pipeline.data.loader import PackedLoader
from pipeline.plan.documents import DocumentMix, documents_of
from pipeline.plan.flops import seen_keys
from pipeline.plan.job import JobPlan
from pipeline.plan.step_cost import step_cost


def step_costs(plan: JobPlan, loader: PackedLoader) -> Callable[[int], float]:
    """Of a step, counted from 1, over the cost of one with the documents that the plan is for."""
    mean = step_cost(plan, documents_of(plan, loader.dataset.folder))

    def cost(step: int) -> float:
        return step_cost(plan, _documents(plan, loader, step)) / mean

    return cost


def _documents(plan: JobPlan, loader: PackedLoader, step: int) -> DocumentMix:
    """Of the samples that a step waits for: replicas meet in every layer, so the costliest of each micro-batch."""
    samples = loader.step(step - 1).samples
    costs = [_sum_len_squared(loader, sample) for sample in samples]
    slowest = [max(costs[first : first + loader.dp]) for first in range(0, len(costs), loader.dp)]
    full = round(sum(slowest) / len(slowest))
    # As in `documents_of`: exact where all documents are shorter or all longer than the window.
    windowed = min(full, seen_keys([plan.seq_len], plan.model.window))
    return DocumentMix(full, windowed, f"step {step}")


def _sum_len_squared(loader: PackedLoader, sample: int) -> int:
    """Over what attends to itself."""
    found = loader.dataset.sample(sample)
    return found.n_tokens**2 if loader.cross_document_attention else found.cost
