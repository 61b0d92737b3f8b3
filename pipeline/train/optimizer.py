"""The optimizer of a recipe, and which parameters its weight decay applies to."""

from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from torch import nn

from pipeline.plan.job import JobPlan
from pipeline.train.operators import load_cpu_adam


def create_optimizer(model: nn.Module, plan: JobPlan) -> torch.optim.Optimizer:
    """As the recipe asks; AdamW runs on the host, in DeepSpeed's own kernel, if its states are offloaded."""
    recipe = plan.recipe.optimizer
    groups = parameter_groups(model, weight_decay=recipe.weight_decay, on=recipe.weight_decay_on)
    if recipe.name == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr)
    options: dict[str, Any] = {"lr": recipe.lr, "betas": recipe.betas, "eps": recipe.eps}
    if plan.recipe.zero.offload_optimizer == "cpu":
        load_cpu_adam()
        on_host: torch.optim.Optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(
            groups, adamw_mode=True, fp32_optimizer_states=recipe.states_dtype == "float32", **options
        )
        return on_host
    return torch.optim.AdamW(groups, **options)


def parameter_groups(model: nn.Module, *, weight_decay: float, on: str) -> list[dict[str, Any]]:
    """Parameters that decay, then those that do not; a group that would be empty is left out.

    `on` is `matrices` or `all`. Holds under ZeRO-3 as well, which keeps each parameter's shape beside it.
    """
    matrices = set(_matrices(model))
    decayed = [p for p in model.parameters() if on == "all" or p in matrices]
    spared = [p for p in model.parameters() if on != "all" and p not in matrices]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _matrices(model: nn.Module) -> Iterator[nn.Parameter]:
    """Weights of linear maps, experts' among them; no norm, no bias (experts' biases are stacked to two dims), no
    embedding, also where the head shares its weight."""
    modules = (getattr(module, "stock", module) for module in model.modules())  # an embedding may be inside a tiled one
    embeddings = {p for module in modules if isinstance(module, nn.Embedding) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        dims = len(getattr(parameter, "ds_shape", parameter.shape))
        if dims > 1 and not name.endswith("bias") and parameter not in embeddings:
            yield parameter
