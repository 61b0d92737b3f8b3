"""Planning of well-known models where there is neither a hub nor its cache."""

import pytest

from pipeline.errors import RecipeError
from pipeline.plan.job import plan_job
from pipeline.plan.known_models import KNOWN_MODELS
from pipeline.plan.model_shape import ModelShape, model_shape, sizes_are_from_table
from pipeline.recipe.load import CONFIGS, load
from pipeline.recipe.schema import ModelRecipe

PUBLISHED = {
    # Parameters in billions, as the model cards say them.
    "meta-llama/Llama-3.1-8B": 8.03,
    "meta-llama/Llama-3.1-70B": 70.6,
    "meta-llama/Llama-3.2-1B": 1.24,
    "meta-llama/Llama-3.2-3B": 3.21,
    "Qwen/Qwen2.5-7B": 7.62,
    "Qwen/Qwen3-0.6B": 0.6,
    "Qwen/Qwen3-1.7B": 1.7,
    "Qwen/Qwen3-4B": 4.0,
    "Qwen/Qwen3-8B": 8.2,
    "Qwen/Qwen3-14B": 14.8,
    "Qwen/Qwen3-32B": 32.8,
    "Qwen/Qwen3-30B-A3B": 30.5,
    "mistralai/Mistral-7B-v0.3": 7.25,
    "google/gemma-3-1b-it": 1.0,
    "openai/gpt-oss-20b": 20.9,
}


@pytest.fixture(autouse=True)
def _no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)


def recipe_of(name: str) -> ModelRecipe:
    return load("llama8b", overrides=[f"model.name_or_path='{name}'"]).model


def shape_of(name: str) -> ModelShape:
    return model_shape(recipe_of(name))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_sizes_of_a_known_model_make_the_parameters_that_were_published(name):
    assert shape_of(name).total_parameters == pytest.approx(PUBLISHED[name] * 1e9, rel=0.03)


def test_every_known_model_has_the_sizes_of_one_whose_parameters_were_checked():
    checked = {shape_of(name) for name in PUBLISHED}
    assert {shape_of(name) for name in KNOWN_MODELS} == checked


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_every_known_model_can_be_planned_and_is_told_to_be_from_the_table(name):
    assert shape_of(name).num_layers > 0
    assert sizes_are_from_table(recipe_of(name))


@pytest.mark.parametrize("name", ["llama8b", "llama70b", "qwen3-32b"])
def test_a_recipe_of_a_known_model_is_planned_without_a_hub(name):
    plan = plan_job(load(name))
    assert plan.sp == plan.world_size
    assert plan.seq_len % (256 * plan.sp) == 0


def test_a_config_of_ones_own_comes_before_the_table(tmp_path):
    hub = tmp_path / "hub" / "models--Qwen--Qwen3-8B"
    (hub / "snapshots" / "abc").mkdir(parents=True)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("abc")
    text = '{"model_type": "qwen3", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 5, '
    (hub / "snapshots" / "abc" / "config.json").write_text(text + '"intermediate_size": 8, "vocab_size": 10}')
    assert shape_of("Qwen/Qwen3-8B").num_layers == 5
    assert not sizes_are_from_table(recipe_of("Qwen/Qwen3-8B"))


def test_an_unknown_model_is_refused_with_a_way_to_get_its_config():
    with pytest.raises(RecipeError) as caught:
        shape_of("meta-llama/Llama-3.1-8B-instruct")
    assert "did you mean 'meta-llama/Llama-3.1-8B-Instruct'?" in str(caught.value)
    assert "hf download meta-llama/Llama-3.1-8B-instruct config.json" in str(caught.value)


RECIPES = sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "base"])
def test_every_recipe_is_planned_offline_and_says_in_its_head_what_it_is_for(recipe, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    planned = plan_job(load(recipe))
    assert planned.seq_len >= planned.sp and planned.dp * planned.sp == planned.world_size
    assert (CONFIGS / f"{recipe}.yaml").read_text().startswith("# ")
