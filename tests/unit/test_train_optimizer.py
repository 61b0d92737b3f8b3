"""Which parameters weight decay applies to, for every architecture."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from pipeline.train.optimizer import parameter_groups
from tests.architectures import ARCHITECTURES, MAINSTREAM


def model_of(name: str) -> torch.nn.Module:
    config = dict(ARCHITECTURES[name])
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[config.pop("model_type")](**config))


def decayed(model: torch.nn.Module, *, on: str) -> set[str]:
    """Names of the parameters that decay."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, weight_decay=0.1, on=on)
    assert sorted(names[p] for group in groups for p in group["params"]) == sorted(names.values())
    return {names[p] for group in groups for p in group["params"] if group["weight_decay"] == 0.1}


@pytest.mark.parametrize("name", MAINSTREAM)
def test_no_norm_bias_sink_or_embedding_decays_and_every_projection_does(name):
    model = model_of(name)
    found = decayed(model, on="matrices")
    spared = {name for name, _ in model.named_parameters()} - found
    for word in ("norm", "bias", "ln_", "sinks", "embed_tokens", "embed_in", "wte", "wpe"):
        assert not [name for name in found if word in name]
    projections = ("proj.weight", "_proj", "c_attn.weight", "query_key_value.weight", "dense.weight")
    assert [name for name in found if name.endswith(projections)]
    assert not [name for name in spared if name.endswith(projections)]


def test_a_head_of_its_own_decays_and_one_that_shares_the_embedding_does_not():
    assert "lm_head.weight" in decayed(model_of("llama"), on="matrices")
    assert "model.embed_tokens.weight" not in decayed(model_of("llama-tied"), on="matrices")


def test_biases_that_experts_stack_are_biases():
    model = model_of("gpt_oss")
    stacked = {name for name, p in model.named_parameters() if name.endswith("bias") and p.dim() > 1}
    assert stacked
    assert not stacked & decayed(model, on="matrices")


def test_everything_decays_in_one_group_if_asked():
    model = model_of("llama-biases")
    assert decayed(model, on="all") == {name for name, _ in model.named_parameters()}
    assert len(parameter_groups(model, weight_decay=0.1, on="all")) == 1


def test_a_partitioned_parameter_is_judged_by_its_whole_shape():
    """As ZeRO-3 leaves it: nothing of it here, its shape beside it."""
    model = model_of("llama")
    whole = decayed(model, on="matrices")
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert decayed(model, on="matrices") == whole
