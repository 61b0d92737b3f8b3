"""The only place that starts DeepSpeed.

DeepSpeed is told nothing of sequence parallelism: it sees world_size data-parallel ranks. ZeRO then partitions over
all of them, and every stage divides gradients by world_size, which `loss_scale` undoes, alone.
"""

import logging
from datetime import timedelta
from typing import Any

import deepspeed
from transformers import PreTrainedModel

from pipeline.memory.apply import Attached
from pipeline.plan.job import JobPlan
from pipeline.recipe.schema import Gpu, Recipe
from pipeline.train.optimizer import create_optimizer


def init_distributed(plan: JobPlan, *, timeout: timedelta | None = None) -> None:
    """Start the process group of this rank, from torch's environment variables; None is torch's own timeout."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if plan.recipe.hardware.gpu is Gpu.CPU:
        # An all-reduce for inference on one host, which training never calls: without it no compiler is needed, and
        # the first start is not a minute longer. The table is DeepSpeed's own record of which operators can be built.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "gloo" if plan.recipe.hardware.gpu is Gpu.CPU else "nccl"
    deepspeed.init_distributed(dist_backend=backend, **({} if timeout is None else {"timeout": timeout}))


def create_engine(model: PreTrainedModel, plan: JobPlan, attached: Attached, *, load_universal: bool = False) -> Any:
    """The DeepSpeed engine around a model with its features attached.

    `load_universal`: what it will load is a universal checkpoint, of another number of ranks.
    """
    if plan.recipe.zero.stage == 3 and attached.gathered_whole:
        deepspeed.utils.set_z3_leaf_modules(model, list(attached.gathered_whole))
    config = deepspeed_config(plan) | {"checkpoint": {"load_universal": load_universal}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=create_optimizer(model, plan), config=config)
    return engine


def loss_scale(plan: JobPlan, valid_tokens: int) -> float:
    """The factor on a rank's loss sum that makes the step's gradient that of the mean over `valid_tokens`.

    `valid_tokens` are all labels that count in the step, over every rank and micro-batch: known from the data.
    DeepSpeed averages gradients over world_size ranks and divides by the accumulation steps; both are undone here and
    nowhere else.
    """
    return plan.world_size * plan.recipe.train.grad_accumulation / max(valid_tokens, 1)


def _bfloat16_states(recipe: Recipe) -> dict[str, bool]:
    """Master weights, gradients and moments in bfloat16: 8 bytes per parameter instead of 16."""
    on = recipe.optimizer.states_dtype == "bfloat16"
    return {"bf16_master_weights_and_grads": on, "bf16_optimizer_states": on}


def _sum_dtype(recipe: Recipe) -> str | None:
    """In which gradients of several micro-batches are summed: as wide as the optimizer's states. Stage 0 of DeepSpeed
    knows no other dtype than the model's."""
    if recipe.zero.stage == 0:
        return None
    return "bf16" if recipe.optimizer.states_dtype == "bfloat16" else "fp32"


def zero3_config(plan: JobPlan) -> dict[str, Any] | None:
    """What partitions the model while it is built; None below stage 3."""
    return deepspeed_config(plan) if plan.recipe.zero.stage == 3 else None


def deepspeed_config(plan: JobPlan) -> dict[str, Any]:
    """The plan in DeepSpeed's words."""
    recipe = plan.recipe
    zero: dict[str, Any] = {"stage": recipe.zero.stage, "reduce_scatter": recipe.zero.reduce_scatter}
    if recipe.zero.offload_optimizer:
        zero["offload_optimizer"] = {"device": recipe.zero.offload_optimizer, "pin_memory": True}
    if recipe.zero.offload_parameters:
        zero["offload_param"] = {"device": recipe.zero.offload_parameters, "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": recipe.train.micro_batch,
        "gradient_accumulation_steps": recipe.train.grad_accumulation,
        "gradient_clipping": recipe.train.grad_clip or 0.0,
        "zero_optimization": zero,
        # An update whose gradients are not finite is left out; in float32 stages 1 to 3 do so by themselves.
        "bf16": {"enabled": recipe.model.dtype == "bfloat16", "check_grad_overflow": True} | _bfloat16_states(recipe),
        "data_types": {"grad_accum_dtype": _sum_dtype(recipe)},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
