"""The stock model of a recipe, with weights."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipeline.errors import RecipeError
from pipeline.recipe.schema import ModelRecipe


def build_model(recipe: ModelRecipe, *, attention: str, seed: int) -> PreTrainedModel:
    """Random weights from `seed`, or pretrained ones, in the recipe's dtype. `attention` names the implementation.

    Raises RecipeError if transformers does not know the model, or cannot load it.
    """
    config = transformers_config(recipe)
    dtype = getattr(torch, recipe.dtype)
    if recipe.init == "random":
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    else:
        try:
            model = AutoModelForCausalLM.from_pretrained(
                recipe.name_or_path,
                revision=recipe.revision,
                config=config,
                attn_implementation=attention,
                dtype=dtype,
            )
        except (OSError, ValueError) as error:
            raise RecipeError(f"model.name_or_path = {recipe.name_or_path!r}: {error}") from error
    stock: PreTrainedModel = model
    return stock.train()


def transformers_config(recipe: ModelRecipe) -> Any:
    """The model's config with the recipe's overrides. Raises RecipeError if it is unknown or not at hand."""
    overrides = dict(recipe.config)
    if recipe.name_or_path is None:
        model_type = overrides.pop("model_type")
        if model_type not in CONFIG_MAPPING:
            raise RecipeError(f"model.config.model_type = {model_type!r}: transformers does not know it; correct it")
        return CONFIG_MAPPING[model_type](**overrides)
    try:
        return AutoConfig.from_pretrained(recipe.name_or_path, revision=recipe.revision, **overrides)
    except (OSError, ValueError) as error:
        raise RecipeError(f"model.name_or_path = {recipe.name_or_path!r}: {error}") from error
