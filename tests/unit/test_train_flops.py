"""The model FLOPs behind a run's MFU are the planner's, for the model and the documents that are really there."""

from itertools import pairwise

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from pipeline.data.loader import PackedLoader
from pipeline.model.tiny import tiny_config
from pipeline.plan.flops import model_flops, seen_keys
from pipeline.plan.model_shape import APPROXIMATE, shape_of
from pipeline.plan.model_support import supported_models
from pipeline.train.flops import StepFlops
from tests.unit.data_support import packed

LENGTHS = [40, 3, 18, 21, 64, 5, 30]


def model_of(model_type: str) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**tiny_config(model_type)))


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mistral", "gpt_oss", "qwen3_moe"])
def test_a_step_is_counted_document_by_document(tmp_path, model_type, across):
    dataset = packed(tmp_path, LENGTHS, seq_len=64)
    loader = PackedLoader(
        dataset, sp_rank=0, sp=1, dp_rank=0, dp=1, grad_accumulation=2, steps=1, seed=0, cross_document_attention=across
    )
    model = model_of(model_type)
    batch, shape = loader.step(0), shape_of(model.config.to_dict())
    lengths = []
    for sample in (dataset.sample(number) for number in batch.samples):
        ends = sample.cu_seqlens.tolist()
        lengths += [ends[-1]] if across else [stop - start for start, stop in pairwise(ends)]
    assert len(lengths) > 2 or across
    expected = model_flops(
        shape,
        tokens=sum(lengths),
        sum_len_squared=seen_keys(lengths),
        sum_windowed=seen_keys(lengths, shape.window),
    )
    assert StepFlops.of(model).of_step(batch, loader) == expected
    whole = model_flops(shape, tokens=sum(lengths), sum_len_squared=seen_keys(lengths))
    assert (expected < whole) == (shape.window is not None)


def test_every_supported_model_has_a_shape_in_its_real_config():
    for model_type in (name for name, found in supported_models().items() if found.supported):
        config = CONFIG_MAPPING[model_type](**tiny_config(model_type))
        shape = shape_of(config.get_text_config().to_dict())
        assert 0 < shape.matmul_parameters <= shape.total_parameters, model_type


def test_parameters_are_within_a_twentieth_of_the_real_model_for_all_types_but_those_called_approximate():
    off = set()
    for model_type in (name for name, found in supported_models().items() if found.supported):
        model = model_of(model_type)
        real = sum(parameter.numel() for parameter in model.parameters())
        shape = shape_of(model.config.get_text_config().to_dict())
        off |= {model_type} if abs(shape.total_parameters / real - 1) > 0.05 else set()
    assert off == APPROXIMATE
