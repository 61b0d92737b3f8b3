"""Sizes, parameters and FLOPs of dense models, experts and windows, against real models and against plain counting."""

import json

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from pipeline.model.tiny import tiny_config
from pipeline.plan.documents import documents_of
from pipeline.plan.flops import model_flops, seen_keys
from pipeline.plan.job import plan_job
from pipeline.plan.model_shape import shape_of
from pipeline.recipe.load import load

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "qwen3_moe", "mixtral", "gpt_oss", "olmoe"]


def real_config(model_type: str) -> PreTrainedConfig:
    return CONFIG_MAPPING[model_type](**tiny_config(model_type))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_parameters_of_a_shape_are_those_of_the_real_model(model_type):
    config = real_config(model_type)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    real = sum(parameter.numel() for name, parameter in model.named_parameters() if parameter.dim() > 1)
    biases = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and name.endswith("bias"))
    assert shape_of(config.to_dict()).total_parameters == real - biases


def test_of_experts_only_those_a_token_is_sent_to_multiply_it():
    config = CONFIG_MAPPING["qwen3_moe"](
        hidden_size=8, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=4, vocab_size=10,
        num_experts=16, num_experts_per_tok=2, moe_intermediate_size=5, mlp_only_layers=[1], intermediate_size=7,
    )  # fmt: skip
    shape = shape_of(config.to_dict())
    attention, head = 8 * 4 * (2 + 1 + 1 + 2), 8 * 10
    assert shape.matmul_parameters == 3 * attention + 2 * (3 * 8 * 5 * 2 + 8 * 16) + 3 * 8 * 7 + head
    assert shape.total_parameters == 3 * attention + 2 * (3 * 8 * 5 * 16 + 8 * 16) + 3 * 8 * 7 + 2 * head


@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize("lengths", [[1], [8], [3, 5, 13]])
def test_keys_seen_are_counted_query_by_query(lengths, window):
    seen = sum(min(position + 1, window or length) for length in lengths for position in range(length))
    diagonal = sum(min(length, window or length) for length in lengths)
    assert seen_keys(lengths, window) == 2 * seen - diagonal


def test_windowed_layers_cost_their_window_and_the_others_all():
    config = real_config("gemma3_text")
    shape = shape_of(config.to_dict())
    assert (shape.window, shape.num_window_layers, shape.num_layers) == (16, 2, 3)
    flops = model_flops(shape, tokens=100, sum_len_squared=100**2, sum_windowed=seen_keys([100], 16))
    full, windowed = 100**2, 2 * 100 * 16 - 16**2
    attention = 3 * 2 * (full + 2 * windowed) * shape.query_size
    assert flops == 6 * shape.matmul_parameters * 100 + attention


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "gpt_oss", "mistral"])
def test_windows_are_found_also_where_a_config_does_not_list_its_layers(model_type):
    told = CONFIG_MAPPING[model_type](num_hidden_layers=12, sliding_window=64).to_dict()
    brief = {name: value for name, value in told.items() if name != "layer_types"}
    assert shape_of(brief).num_window_layers == shape_of(told).num_window_layers > 0


def test_a_packed_data_set_says_which_documents_there_are(tmp_path):
    plan = plan_job(load("tiny"))
    assert documents_of(plan, tmp_path).sum_len_squared == 4 * 8192**2, "its documents are cut at 8,192 tokens"
    (tmp_path / "manifest.json").write_text(json.dumps({"sum_len_squared": 3000, "samples": 2}))
    found = documents_of(plan, tmp_path)
    assert (found.sum_len_squared, tmp_path.name in found.told) == (1500, True)
    (tmp_path / "manifest.json").write_text(json.dumps({"sum_len_squared": None, "samples": 2}))
    assert "the recipe allows" in documents_of(plan, tmp_path).told
