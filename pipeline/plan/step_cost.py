"""What steps of a plan cost beside each other, by their documents: attention's part grows with the sum of len²."""

from pipeline.plan.documents import DocumentMix
from pipeline.plan.flops import model_flops
from pipeline.plan.job import JobPlan
from pipeline.plan.time import step_seconds


def step_cost(plan: JobPlan, documents: DocumentMix) -> float:
    """Of a step with such documents: seconds by the plan, FLOPs where it foresees none. Only ratios mean anything."""
    seconds = step_seconds(plan, documents)
    if seconds is not None:
        return seconds.total
    samples = plan.samples_per_step
    return model_flops(
        plan.model,
        tokens=plan.tokens_per_step,
        sum_len_squared=samples * documents.sum_len_squared,
        sum_windowed=samples * documents.sum_windowed,
    )
