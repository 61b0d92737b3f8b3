"""The sizes of a model, from its config.json alone: no weights, no transformers."""

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import RecipeError
from pipeline.plan.hub_cache import hub_cache, snapshot_of
from pipeline.plan.known_models import KNOWN_MODELS, Config
from pipeline.plan.model_support import require_exact, require_supported
from pipeline.recipe.schema import ModelRecipe


@dataclass(frozen=True)
class ModelShape:
    """A decoder's sizes. Counts are per model; sizes are in elements."""

    model_type: str
    hidden_size: int
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int | None

    @property
    def matmul_parameters(self) -> int:
        """Parameters that multiply every token: without the input embedding, with the head; norms and biases left out.

        For gated dense MLPs (llama, qwen, gemma); the job counts the real model's, and shows no MFU for experts.
        """
        attention = 2 * self.hidden_size * self.head_dim * (self.num_query_heads + self.num_kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        return self.num_layers * (attention + mlp) + self.hidden_size * self.vocab_size


def model_shape(model: ModelRecipe) -> ModelShape:
    """The shape of the recipe's model.

    Raises RecipeError if its config.json is not at hand or lacks a size, or if the model would not train exactly.
    """
    config = model_config(model)
    if not isinstance(config.get("model_type"), str):
        raise RecipeError(f"model.config has no model_type; add it (found: {', '.join(sorted(config))})")
    require_supported(config["model_type"])
    require_exact(config)

    def size(*names: str, default: int | None = None) -> int:
        for name in names:
            if config.get(name) is not None:
                value = config[name]
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise RecipeError(f"model.config.{name} = {value!r}: must be a whole number > 0; correct it")
                return value
        if default is None:
            raise RecipeError(f"model.config has no {names[0]}; add it (found: {', '.join(sorted(config))})")
        return default

    heads = size("num_attention_heads", "n_head")
    hidden = size("hidden_size", "n_embd")
    kv_heads = size("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise RecipeError(
            f"model.config.num_key_value_heads = {kv_heads}: must divide num_attention_heads = {heads}; "
            f"use one of {divisors(heads)}"
        )
    if config.get("head_dim") is None and hidden % heads:
        raise RecipeError(
            f"model.config.hidden_size = {hidden}: must be a multiple of num_attention_heads = {heads}; "
            f"use {max(1, hidden // heads) * heads}, or give head_dim"
        )
    limit = config.get("max_position_embeddings")
    return ModelShape(
        model_type=config["model_type"],
        hidden_size=hidden,
        num_layers=size("num_hidden_layers", "n_layer"),
        num_query_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=size("head_dim", default=hidden // heads),
        intermediate_size=size("intermediate_size", "n_inner", default=4 * hidden),
        vocab_size=size("vocab_size"),
        max_position_embeddings=limit if isinstance(limit, int) else None,
    )


def model_config(model: ModelRecipe) -> dict[str, Any]:
    """The model's config.json (none if it is described in the recipe) under the recipe's overrides."""
    if model.name_or_path is None:
        return dict(model.config)
    path = _config_file(model.name_or_path, model.revision)
    if path is None:
        return {**_known_config(model.name_or_path), **model.config}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"model.name_or_path = {model.name_or_path!r}: {path}: {error}; give a model folder"
        ) from None
    text = stored.get("text_config", {}) if isinstance(stored, Mapping) else None
    if not isinstance(text, Mapping):
        raise RecipeError(
            f"model.name_or_path = {model.name_or_path!r}: {path} is not a model's config; give a model folder"
        )
    # The outer model_type says what transformers will build.
    outer = {name: stored[name] for name in ("model_type",) if name in stored}
    return {**stored, **text, **outer, **model.config}


def sizes_are_from_table(model: ModelRecipe) -> bool:
    """Whether this machine has no config.json of the model, so that its sizes are those of `known_models`."""
    return model.name_or_path is not None and _config_file(model.name_or_path, model.revision) is None


def _config_file(name_or_path: str, revision: str | None) -> Path | None:
    """config.json of a model folder, or of a hub model that this machine's cache holds; None if it has neither."""
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder / "config.json"
    snapshot = snapshot_of(hub_cache(os.environ), "model", name_or_path, revision)
    return snapshot / "config.json" if snapshot is not None and (snapshot / "config.json").is_file() else None


def _known_config(name: str) -> Config:
    """Raises RecipeError for a model that the table has not."""
    if name in KNOWN_MODELS:
        return KNOWN_MODELS[name]
    near = difflib.get_close_matches(name, KNOWN_MODELS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise RecipeError(
        f"model.name_or_path = {name!r}: neither a folder with config.json nor in the Hugging Face cache, nor among "
        f"the models whose sizes are known here; {hint}correct the name, or fetch its config.json where there is "
        f"internet: hf download {name} config.json"
    )


def divisors(number: int) -> list[int]:
    """All divisors, in order."""
    return [d for d in range(1, number + 1) if number % d == 0]
