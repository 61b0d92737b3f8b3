"""Models as a job builds them, from folders as Hugging Face writes them."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from pipeline.errors import RecipeError
from pipeline.model.build import build_model, transformers_config
from pipeline.model.tiny import tiny_config
from pipeline.plan.model_shape import model_shape
from pipeline.recipe.load import load
from pipeline.recipe.schema import ModelRecipe

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "vision_use_head": False,
}


def recipe_of(folder, *overrides: str) -> ModelRecipe:
    asked = ["model.config={}", "model.init=pretrained", f"model.name_or_path={folder}", *overrides]
    return load(
        "base",
        overrides=[*asked, "model.dtype=float32", "data={sources: [{type: text, path: x}], tokenizer: x}", "name=x"],
    ).model


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    """A checkpoint of text and images, and its model. Published ones have no cap on their logits."""
    folder = tmp_path_factory.mktemp("gemma3")
    text = tiny_config("gemma3_text") | {"final_logit_softcapping": None}
    config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=5)
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    return folder, model


def test_a_checkpoint_of_more_than_text_is_refused_with_the_type_of_its_decoder(gemma3):
    with pytest.raises(
        RecipeError, match=r"'gemma3': would not train exactly.*set model.config.model_type=gemma3_text"
    ):
        model_shape(recipe_of(gemma3[0]))


def test_its_decoder_of_text_alone_is_planned_and_built_with_its_weights(gemma3):
    folder, whole = gemma3
    recipe = recipe_of(folder, "model.config.model_type=gemma3_text")
    assert model_shape(recipe).model_type == "gemma3_text"
    decoder = build_model(recipe, attention="sdpa", seed=0).eval()
    tokens = torch.randint(6, 90, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(decoder(input_ids=tokens).logits, whole(input_ids=tokens).logits)


def test_overrides_reach_the_decoder_of_text(gemma3):
    recipe = recipe_of(gemma3[0], "model.config.model_type=gemma3_text", "model.config.rms_norm_eps=0.01")
    assert transformers_config(recipe).rms_norm_eps == 0.01


def test_another_type_than_the_checkpoint_holds_is_refused(gemma3):
    with pytest.raises(RecipeError, match="model_type = 'llama': must be 'gemma3_text'"):
        transformers_config(recipe_of(gemma3[0], "model.config.model_type=llama"))


def test_a_checkpoint_without_some_weights_is_refused_rather_than_filled_with_random_numbers(tmp_path):
    config = CONFIG_MAPPING["llama"](**tiny_config("llama"))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"], weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"must hold all weights, and has none for 2 parameters, e.g. lm_head.weight"):
        build_model(recipe_of(tmp_path), attention="sdpa", seed=0)


def test_tied_weights_that_are_stored_once_are_all_there(tmp_path):
    config = CONFIG_MAPPING["llama"](**tiny_config("llama"), tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = build_model(recipe_of(tmp_path), attention="sdpa", seed=0)
    assert model.lm_head.weight is model.model.embed_tokens.weight
