"""Whether a plan can go on from a checkpoint: looked at before anything of the run changes, and again by its ranks."""

from pipeline.errors import UserError
from pipeline.plan.checkpoint_dir import Checkpoint
from pipeline.plan.job import JobPlan


def check_resumable(checkpoint: Checkpoint, plan: JobPlan) -> None:
    """Raises UserError if the plan is for other data, another order of it, or states of another kind."""
    _check_same_data(checkpoint, plan)
    _check_same_layout(checkpoint, plan)
    if of_other_ranks(checkpoint, plan) and plan.recipe.optimizer.name == "sgd":
        raise UserError(
            f"{checkpoint.path} was saved by {checkpoint.record.world_size} ranks, the plan says {plan.world_size}: "
            "DeepSpeed converts the moments of adamw only, and optimizer.name is sgd; use as many ranks, or export the "
            "weights and start a new run"
        )


def of_other_ranks(checkpoint: Checkpoint, plan: JobPlan) -> bool:
    """Whether its partitions are for another number of ranks. Stage 0 has none: its one file suits any number."""
    return checkpoint.record.world_size != plan.world_size and plan.recipe.zero.stage != 0


def _check_same_data(checkpoint: Checkpoint, plan: JobPlan) -> None:
    record = checkpoint.record
    if (record.packing_key, record.sample_order) != (plan.packing_key, plan.sample_order):
        raise UserError(
            f"{checkpoint.path} was trained on packed data {record.packing_key} ({record.sample_order}), the plan says "
            f"{plan.packing_key} ({plan.sample_order}): its place in the data means nothing there; set data.* and "
            "evaluation.samples as they were, or start a new run"
        )


def _check_same_layout(checkpoint: Checkpoint, plan: JobPlan) -> None:
    saved, stage = checkpoint.record.zero_stage, plan.recipe.zero.stage
    if saved != stage and {saved, stage} != {1, 2}:
        raise UserError(
            f"{checkpoint.path} was saved at zero.stage {saved}, the plan says {stage}: DeepSpeed writes other "
            f"files there (1 and 2 share theirs); set zero.stage={saved}, or export the weights and start a new run"
        )
