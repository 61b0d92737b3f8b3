"""Every supported architecture on one rank: loss and every gradient are those of the stock model, and bugs are seen."""

from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import CONFIG_MAPPING

from pipeline.attention.function import NAME as ALST_ATTENTION
from pipeline.attention.function import AttentionContext, alst_attention, register
from pipeline.attention.kernels import Scoring
from pipeline.attention.kernels.cpu import CpuKernel
from pipeline.attention.segments import segments_of
from pipeline.errors import RecipeError, RunError
from pipeline.memory import tiled_loss
from pipeline.memory.tiled_loss import LogitsTransform
from pipeline.model.build import check_config
from pipeline.model.parity import (
    BOUNDS,
    Difference,
    NothingBelowFloat64,
    build_tiny,
    compare,
    train_attached,
    train_stock,
)
from pipeline.model.support import BOUND, model_types, probe
from pipeline.model.tiny import WINDOW
from pipeline.parallel.mesh import Mesh
from pipeline.plan.model_support import supported_models
from tests.architectures import ARCHITECTURES, MAINSTREAM

OTHERS = [pytest.param(name, marks=pytest.mark.full) for name in ARCHITECTURES if name not in MAINSTREAM]

NAMED_IN_THE_ISSUE = (
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "mistral",
    "mixtral",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt_oss",
    "gpt_neox",
    "olmo2",
    "granite",
)


KEPT = "memory.activation_checkpoint.keep_attention=true"
GROUPS = "memory.activation_checkpoint.layers_per_group=2"  # of three layers


IN_CHUNKS = (
    "memory.sequence_chunks={chunk_tokens: 9, hidden_states: gpu, keys_values: gpu, keep_keys_values: false}",
    GROUPS,
)
ON_HOST = (
    "memory.sequence_chunks={chunk_tokens: 14, hidden_states: cpu, keys_values: cpu, keep_keys_values: true}",
    KEPT,
)
FEATURES = {"each layer": (), "kept attention, groups": (KEPT, GROUPS), "chunks, groups": IN_CHUNKS, "on host": ON_HOST}
NOT_IN_CHUNKS = [name for name, support in supported_models().items() if support.no_chunks]


def difference(name: str, *, mode=NothingBelowFloat64, kernel=None, features=()) -> Difference:
    config = ARCHITECTURES[name]
    model_type = config.pop("model_type")
    register()
    stock = train_stock(build_tiny(model_type, config, attention="eager"), mode=mode)
    model = build_tiny(model_type, config, attention=ALST_ATTENTION)
    ours = train_attached(model, mode=mode, kernel=kernel, features=features)
    return compare(ours, stock)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("name", [*MAINSTREAM, *OTHERS])
def test_loss_and_every_gradient_are_those_of_the_stock_model(name, features):
    if name in NOT_IN_CHUNKS and FEATURES[features] in (IN_CHUNKS, ON_HOST):
        pytest.skip(supported_models()[name].no_chunks)
    found = difference(name, features=FEATURES[features])
    assert found.loss <= BOUND, found
    assert found.gradient <= BOUND, found
    assert found.not_zero == (), found


@pytest.mark.parametrize("name", NAMED_IN_THE_ISSUE)
def test_the_stock_model_as_it_is_agrees_within_its_own_float32(name):
    """Norms, router gates and eager softmax of the stock code run in float32 even here: 6e-8 per operation."""
    found = difference(name, mode=nullcontext)
    assert found.loss <= 1e-7, found
    assert found.gradient <= 1e-6, found


# Bugs, planted: (where it must be seen, what is broken)


class BrokenKernel(CpuKernel):
    """The CPU kernel with something changed on its way in, forward and backward alike."""

    def forward(self, q, k, v, sinks, segments, scoring):
        return super().forward(q, k, v, *self.broken(sinks, segments, scoring))

    def backward(self, dout, q, k, v, sinks, out, lse, segments, scoring):
        return super().backward(
            dout,
            q,
            k,
            v,
            *self.broken(sinks, segments, scoring)[:1],
            out,
            lse,
            *self.broken(sinks, segments, scoring)[1:],
        )

    def broken(self, sinks, segments, scoring):
        raise NotImplementedError


class WindowOneTooLong(BrokenKernel):
    def broken(self, sinks, segments, scoring):
        return sinks, segments, replace(scoring, window=scoring.window and scoring.window + 1)


class NoWindow(BrokenKernel):
    def broken(self, sinks, segments, scoring):
        return sinks, segments, replace(scoring, window=None)


class NoSoftcap(BrokenKernel):
    def broken(self, sinks, segments, scoring):
        return sinks, segments, replace(scoring, softcap=None)


class UsualScale(BrokenKernel):
    def broken(self, sinks, segments, scoring):
        return sinks, segments, replace(scoring, scale=ARCHITECTURES["granite"]["hidden_size"] ** -0.5)


class SinksOfOtherHeads(BrokenKernel):
    def broken(self, sinks, segments, scoring):
        return None if sinks is None else sinks.roll(1), segments, scoring


class NoSinks(BrokenKernel):
    def broken(self, sinks, segments, scoring):
        return None, segments, scoring


class OneDocument(BrokenKernel):
    def broken(self, sinks, segments, scoring):
        whole = segments_of(torch.tensor((0, BOUNDS[-1]), dtype=torch.int32), device=torch.device("cpu"))
        return sinks, whole, scoring


class BoundaryOneLate(BrokenKernel):
    def broken(self, sinks, segments, scoring):
        late = torch.tensor((0, BOUNDS[1] + 1, *BOUNDS[3:]), dtype=torch.int32)
        return sinks, segments_of(late, device=torch.device("cpu")), scoring


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("mistral", WindowOneTooLong),
        ("gpt_oss", WindowOneTooLong),
        ("qwen2-window", NoWindow),
        ("gemma3_text", NoWindow),
        ("gemma2", NoSoftcap),
        ("granite", UsualScale),
        ("gpt_oss", SinksOfOtherHeads),
        ("gpt_oss", NoSinks),
        ("llama", OneDocument),
        ("deepseek_v3", BoundaryOneLate),
    ],
)
def test_a_broken_kernel_is_seen(name, kernel):
    assert difference(name, kernel=kernel()).gradient > 1e3 * BOUND


@pytest.mark.parametrize("name", ["granite", "cohere", "cohere2", "gemma2"])
def test_logits_that_are_not_scaled_or_capped_are_seen(name, monkeypatch):
    monkeypatch.setattr(tiled_loss, "logits_transform", lambda model: LogitsTransform())
    assert difference(name).gradient > 1e3 * BOUND


def test_tiny_configs_can_show_such_bugs():
    """Windows are shorter than documents, scales are not one, caps are near the values that occur."""
    assert max(stop - start for start, stop in pairwise(BOUNDS)) > WINDOW + 1
    for name in ARCHITECTURES:
        config = ARCHITECTURES[name]
        for scale in ("logits_scaling", "logit_scale", "attention_multiplier", "embedding_multiplier"):
            assert config.get(scale) != 1.0, (name, scale)


def test_layers_whose_attention_does_not_come_to_our_function_are_refused():
    config = ARCHITECTURES["llama"]
    model = build_tiny(config.pop("model_type"), config, attention="eager")
    with pytest.raises(RunError, match="0 calls of attention that can be replaced in 3 layers"):
        train_attached(model, mode=nullcontext)


# What a layer may tell its attention


class Attention(torch.nn.Module):
    """Stands for a layer's attention module."""


def attend(**changed):
    query = torch.randn(1, 4, BOUNDS[-1], 8)
    segments = segments_of(torch.tensor(BOUNDS, dtype=torch.int32), device=torch.device("cpu"))
    context = AttentionContext(segments, Mesh(rank=0, world_size=1, sp=1, sp_group=None), CpuKernel())
    told = {"query": query, "key": query, "value": query, "attention_mask": None, "attention_context": context}
    module = changed.pop("module", Attention())
    return alst_attention(module, **told | changed)


def test_harmless_keywords_pass():
    out, weights = attend(position_ids=torch.zeros(1, 3), use_cache=False, position_bias=None, is_causal=True)
    assert out.shape == (1, BOUNDS[-1], 4, 8)
    assert weights is None


@pytest.mark.parametrize(
    ("changed", "error", "told"),
    [
        ({"attention_context": None}, RunError, "Attention lost attention_context"),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, RunError, "Attention built an attention mask"),
        ({"dropout": 0.1}, RecipeError, r"attention dropout = 0.1: must be 0; set model.config.attention_dropout=0.0"),
        ({"is_causal": False}, RunError, "Attention attends to what follows"),
        ({"key": torch.randn(1, 4, 7, 8)}, RunError, f"Attention has 7 keys for {BOUNDS[-1]} queries"),
        ({name: torch.randn(2, 4, 9, 8) for name in ("query", "key", "value")}, RunError, "2 sequences in a batch"),
        ({"position_bias": torch.ones(1)}, RunError, "Attention tells its attention position_bias, which is not known"),
        ({"indices": torch.ones(1), "head_mask": 1}, RunError, "tells its attention head_mask, indices"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_would_change_attention_unnoticed_is_refused_by_name(changed, error, told):
    with pytest.raises(error, match=told):
        attend(**changed)


def test_a_module_that_says_it_is_not_causal_is_refused():
    module = Attention()
    module.is_causal = False
    with pytest.raises(RunError, match="Attention attends to what follows"):
        attend(module=module)


# The table


SAMPLE = (
    "llama",
    "phi3",
    "bart",
    "bert",
    "falcon",
    "gemma3",
    "gemma3n_text",
    "lfm2",
    "llama4_text",
    "nemotron",
    "opt",
    "phimoe",
    "qwen3_next",
)


@pytest.mark.parametrize(
    "model_type",
    [*SAMPLE, *(pytest.param(name, marks=pytest.mark.full) for name in model_types() if name not in SAMPLE)],
)
def test_the_committed_table_says_what_is_measured(model_type):
    assert supported_models()[model_type] == probe(model_type)


def test_every_model_type_of_transformers_is_in_the_table():
    assert sorted(supported_models()) == model_types()


def test_every_refusal_has_a_reason_and_nothing_else_has():
    assert [name for name, support in supported_models().items() if support.supported == bool(support.reason)] == []


def test_a_model_type_that_transformers_does_not_know_cannot_be_measured():
    with pytest.raises(RecipeError, match=r"'lama'.*correct it"):
        probe("lama")


# What the job asks of the real config, before weights load


def config_of(model_type: str, **values):
    config = ARCHITECTURES[model_type] | values
    return CONFIG_MAPPING[config.pop("model_type")](**config)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma2", "qwen2-window"])
def test_a_config_that_trains_exactly_passes(name):
    check_config(config_of(name))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (("llama", {"attention_dropout": 0.1}), "attention_dropout = 0.1: must be 0"),
        (("gpt2", {"resid_pdrop": 0.1}), "resid_pdrop = 0.1: must be 0"),
        (("mixtral", {"router_jitter_noise": 0.01}), "router_jitter_noise = 0.01: must be 0"),
        (("mixtral", {"output_router_logits": True}), "output_router_logits = True: must be false"),
        (("gemma4_text", {"hidden_size_per_layer_input": 8}), "hidden_size_per_layer_input = 8: must be 0"),
        (
            ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
            "rope type 'dynamic'",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_config_that_would_train_otherwise_is_refused(config, told):
    name, values = config
    with pytest.raises(RecipeError, match=told):
        check_config(config_of(name, **values))


def test_a_type_that_is_not_supported_is_refused_before_weights_load():
    with pytest.raises(RecipeError, match=r"'nemotron': would not train exactly: .*lost attention_context"):
        check_config(CONFIG_MAPPING["nemotron"]())


def test_scoring_has_no_field_that_the_broken_kernels_do_not_break():
    assert set(Scoring.__dataclass_fields__) == {"scale", "window", "softcap"}
