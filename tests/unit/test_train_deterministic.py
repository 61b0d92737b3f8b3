"""What `train.deterministic` and `train.seed` reach."""

import pytest
import torch

from pipeline.attention.kernels.choice import candidates_for
from pipeline.attention.kernels.interface import Capabilities
from pipeline.attention.kernels.presence import Presence
from pipeline.errors import UserError
from pipeline.model.build import build_model, transformers_config
from pipeline.plan.environment import environment
from pipeline.plan.job import plan_job
from pipeline.recipe.load import load
from pipeline.train.main import attention_needs

ON_GPU = ["hardware={gpu: H100-80GB, gpus_per_node: 8}", "parallel.sp=1"]
HOPPER = (9, 0)


def variables(*overrides: str) -> dict[str, str]:
    plan = plan_job(load("tiny", overrides=list(overrides)))
    return {variable.name: variable.value for variable in environment(plan, cpus_per_rank=1)}


def test_cublas_gets_its_workspace_before_the_process_starts():
    assert variables(*ON_GPU, "train.deterministic=true")["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert "CUBLAS_WORKSPACE_CONFIG" not in variables(*ON_GPU)


def kernel(name: str, *, deterministic_max_head_dim: int) -> Presence:
    return Presence(
        name,
        Capabilities(
            dtypes=(torch.float32,),
            head_dims=None,
            window=True,
            softcap_max_head_dim=256,
            deterministic_max_head_dim=deterministic_max_head_dim,
            max_elements=None,
        ),
        "made up",
    )


def test_a_kernel_whose_backward_is_not_deterministic_is_passed_over_or_refused():
    found = [kernel("flash_attention_3", deterministic_max_head_dim=0)]
    found.append(kernel("flash_attention_2", deterministic_max_head_dim=256))
    for on, first in ((False, "flash_attention_3"), (True, "flash_attention_2")):
        plan = plan_job(load("tiny", overrides=[*ON_GPU, f"train.deterministic={str(on).lower()}"]))
        needs = attention_needs(plan, transformers_config(plan.recipe.model))
        candidates, _ = candidates_for("auto", HOPPER, found, needs)
        assert candidates[0] == first
    with pytest.raises(UserError, match="lacks a deterministic backward at head dim 16"):
        candidates_for("flash_attention_3", HOPPER, found, needs)


def test_random_weights_follow_from_the_seed_alone():
    recipe = load("tiny").model

    def weights(seed: int) -> torch.Tensor:
        torch.rand(seed + 3)  # whatever was drawn before
        return torch.cat([p.flatten() for p in build_model(recipe, attention="eager", seed=seed).parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
