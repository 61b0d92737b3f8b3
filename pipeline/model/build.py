"""The stock model of a recipe, with weights."""

from collections.abc import Collection
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from pipeline.errors import RecipeError
from pipeline.plan.model_shape import ModelShape
from pipeline.plan.model_support import require_exact, require_supported
from pipeline.recipe.schema import ModelRecipe

TEXT_DECODER_KEYS = {r"^language_model\.lm_head": "lm_head", r"^(model\.)?language_model\.(model\.)?": "model."}
"""What a checkpoint of more than text calls its decoder of text -> what it is called where it stands alone."""


def build_model(
    recipe: ModelRecipe, *, attention: str, seed: int, zero3: dict[str, Any] | None = None
) -> PreTrainedModel:
    """Random weights from `seed`, or pretrained ones, in the recipe's dtype. `attention` names the implementation.

    With `zero3`, DeepSpeed's configuration, every parameter is partitioned as it is made (`zero.Init`): no rank ever
    holds the whole model. Collective then. Raises RecipeError if transformers does not know the model, or cannot load
    all of it.
    """
    config = transformers_config(recipe)
    options = {"attn_implementation": attention, "dtype": getattr(torch, recipe.dtype)}
    # transformers partitions while it loads as long as this object lives; it holds it by a weak reference.
    partitioning = None if zero3 is None else HfDeepSpeedConfig(zero3)
    try:
        if recipe.init == "random":
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, **options)
        else:
            model, loading = AutoModelForCausalLM.from_pretrained(
                recipe.name_or_path,
                revision=recipe.revision,
                config=config,
                key_mapping=TEXT_DECODER_KEYS if "model_type" in recipe.config else None,
                output_loading_info=True,
                **options,
            )
            _require_all_weights(recipe, loading["missing_keys"])
    except (OSError, ValueError) as error:
        raise RecipeError(f"model.name_or_path = {recipe.name_or_path!r}: {error}") from error
    finally:
        del partitioning
    stock: PreTrainedModel = model
    return stock.train()


def transformers_config(recipe: ModelRecipe) -> Any:
    """The model's config with the recipe's overrides.

    Raises RecipeError if it is unknown, not at hand, or of a model that would not train exactly.
    """
    overrides = dict(recipe.config)
    if recipe.name_or_path is None:
        model_type = overrides.pop("model_type")
        if model_type not in CONFIG_MAPPING:
            raise RecipeError(f"model.config.model_type = {model_type!r}: transformers does not know it; correct it")
        config = CONFIG_MAPPING[model_type](**overrides)
    else:
        try:
            config = _stored_config(recipe, overrides)
        except (OSError, ValueError) as error:
            raise RecipeError(f"model.name_or_path = {recipe.name_or_path!r}: {error}") from error
    check_config(config)
    return config


def _stored_config(recipe: ModelRecipe, overrides: dict[str, Any]) -> Any:
    """The config of a folder or a hub model; that of its decoder of text alone, if the recipe asks for this type."""
    asked = overrides.pop("model_type", None)
    if asked is None:
        return AutoConfig.from_pretrained(recipe.name_or_path, revision=recipe.revision, **overrides)
    text = AutoConfig.from_pretrained(recipe.name_or_path, revision=recipe.revision).get_text_config()
    if text.model_type != asked:
        raise RecipeError(
            f"model.config.model_type = {asked!r}: must be {text.model_type!r}, which {recipe.name_or_path} holds; "
            "correct it, or leave it out"
        )
    return type(text).from_dict(text.to_dict(), **overrides)


def _require_all_weights(recipe: ModelRecipe, missing: Collection[str]) -> None:
    """Raises RecipeError if a parameter would begin with random numbers."""
    if missing:
        raise RecipeError(
            f"model.name_or_path = {recipe.name_or_path!r}: must hold all weights, and has none for {len(missing)} "
            f"parameters, e.g. {min(missing)}; name the model that they belong to, or set model.init: random"
        )


def check_shape(config: Any, shape: ModelShape) -> None:
    """Raises RecipeError if the plan took other sizes from config.json than transformers' own defaults give."""
    text = config.get_text_config()
    for name, planned in (
        ("hidden_size", shape.hidden_size),
        ("num_hidden_layers", shape.num_layers),
        ("num_attention_heads", shape.num_query_heads),
        ("num_key_value_heads", shape.num_kv_heads),
        ("head_dim", shape.head_dim),
        ("vocab_size", shape.vocab_size),
    ):
        real = getattr(text, name, None)
        if real is not None and real != planned:
            raise RecipeError(
                f"model.config.{name}: planned as {planned}, but transformers makes it {real}; "
                f"set model.config.{name}={real}"
            )


def check_config(config: Any) -> None:
    """Raises RecipeError if a model of this transformers config would not train exactly. Needs no weights."""
    require_supported(config.model_type)
    require_exact(config.to_dict())
