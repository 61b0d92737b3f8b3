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
    tied_embeddings: bool = False
    """The head shares the input embedding's weight."""
    mlp_matrices: int = 3
    """Of a dense MLP or an expert: gate, up and down; 2 without a gate."""
    query_key_norm: bool = False
    """Queries and keys are normalized."""
    num_experts: int = 0
    experts_per_token: int = 0
    """Routed ones."""
    shared_expert_size: int = 0
    """Intermediate size of what every token passes beside its experts."""
    expert_size: int = 0
    """Intermediate size of one expert."""
    num_expert_layers: int = 0
    window: int | None = None
    """Keys that a query of a windowed layer sees, itself among them."""
    num_window_layers: int = 0

    @property
    def query_size(self) -> int:
        return self.num_query_heads * self.head_dim

    @property
    def attention_parameters(self) -> int:
        """Of a layer."""
        return 2 * self.hidden_size * self.head_dim * (self.num_query_heads + self.num_kv_heads)

    @property
    def dense_mlp_parameters(self) -> int:
        """Of a layer without experts."""
        return self.mlp_matrices * self.hidden_size * self.intermediate_size

    def expert_parameters(self, experts: int) -> int:
        """Of a layer with this many experts: they, the router, and what every token passes beside them."""
        return (
            self.mlp_matrices * self.hidden_size * (experts * self.expert_size + self.shared_expert_size)
            + self.hidden_size * self.num_experts
        )

    @property
    def head_parameters(self) -> int:
        return self.hidden_size * self.vocab_size

    @property
    def mlp_parameters(self) -> int:
        """Of the largest MLP of a layer, all experts counted."""
        dense = self.dense_mlp_parameters if self.num_expert_layers < self.num_layers else 0
        return max(dense, self.expert_parameters(self.num_experts) if self.num_expert_layers else 0)

    @property
    def layer_parameters(self) -> int:
        """Of the largest layer."""
        return self.attention_parameters + self.mlp_parameters

    @property
    def matmul_parameters(self) -> int:
        """Parameters that multiply every token: without the input embedding, with the head; norms and biases left out.

        Of experts those that a token is sent to.
        """
        return self._parameters(self.experts_per_token) + self.head_parameters

    @property
    def total_parameters(self) -> int:
        """All of them, but norms and biases: less than a thousandth."""
        embeddings = self.head_parameters * (1 if self.tied_embeddings else 2)
        return self._parameters(self.num_experts) + embeddings

    def _parameters(self, experts: int) -> int:
        """Of all layers, with this many experts each."""
        dense = (self.num_layers - self.num_expert_layers) * self.dense_mlp_parameters
        routed = self.num_expert_layers * self.expert_parameters(experts) if self.num_expert_layers else 0
        return self.num_layers * self.attention_parameters + dense + routed


def model_shape(model: ModelRecipe) -> ModelShape:
    """The shape of the recipe's model.

    Raises RecipeError if its config.json is not at hand or lacks a size, or if the model would not train exactly.
    """
    config = model_config(model)
    if not isinstance(config.get("model_type"), str):
        raise RecipeError(f"model.config has no model_type; add it (found: {', '.join(sorted(config))})")
    require_supported(config["model_type"])
    require_exact(config)
    return shape_of(config)


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """The shape in a config, of a file or of transformers. Raises RecipeError if it lacks a size."""

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
        tied_embeddings=bool(config.get("tie_word_embeddings", config["model_type"] in TIED)),
        mlp_matrices=2 if config["model_type"] in UNGATED else 3,
        query_key_norm=config["model_type"] in NORMALIZED_QUERIES,
        **_experts(config),
        **_windows(config),
    )


UNGATED = {
    "apertus",
    "arcee",
    "codegen",
    "falcon",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gptj",
    "jais2",
    "nanochat",
    "nemotron",
    "opt",
    "persimmon",
    "phi",
    "starcoder2",
}
"""Model types whose MLP has no gate."""

APPROXIMATE = {
    *("afmoe", "aria_text", "ernie4_5_moe", "exaone_moe", "gemma4_text", "glm4_moe_lite", "gpt-sw3", "gpt2"),
    *("gpt_bigcode", "hrm_text", "hunyuan_v1_moe", "jetmoe", "laguna", "mimo_v2_flash", "minicpm3", "youtu"),
}
"""Model types whose config says more than is read here (latent attention, experts of several kinds, learned positions):
parameters that follow from the shape may be off by more than a twentieth."""

TIED = {"cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "gpt2", "starcoder2"}
"""Model types whose head is the input embedding unless their config says otherwise."""

NORMALIZED_QUERIES = {"qwen3", "qwen3_moe", "gemma3_text", "olmo2", "olmo3", "olmoe"}


def _experts(config: Mapping[str, Any]) -> dict[str, int]:
    """What a config says of experts, under the names that architectures have for it; nothing for a dense model."""

    def number(*names: str) -> int:
        found = (config[name] for name in names if isinstance(config.get(name), int))
        return next(found, 0)

    experts, layers = number("num_experts", "num_local_experts", "n_routed_experts"), number("num_hidden_layers")
    if experts < 2:
        return {}
    size = number("moe_intermediate_size", "intermediate_size")
    every, dense_first = number("decoder_sparse_step") or 1, number("first_k_dense_replace")
    dense = set(config.get("mlp_only_layers") or ())
    sparse = [i for i in range(layers) if (i + 1) % every == 0 and i >= dense_first and i not in dense]
    return {
        "num_experts": experts,
        "experts_per_token": number("num_experts_per_tok", "experts_per_token", "moe_top_k"),
        "expert_size": size,
        "shared_expert_size": number("shared_expert_intermediate_size", "shared_intermediate_size")
        or number("n_shared_experts") * size,
        "num_expert_layers": len(sparse),
    }


WINDOW_EVERY = {"gemma2": 2, "gemma3_text": 6, "cohere2": 4, "gpt_oss": 2}
"""Of so many layers the last sees all, where a config does not list its layers."""


def _windows(config: Mapping[str, Any]) -> dict[str, int]:
    """The window and how many layers have it; nothing where every layer sees all."""
    window, layers = config.get("sliding_window"), config.get("num_hidden_layers")
    if (
        not isinstance(window, int)
        or window < 1
        or not isinstance(layers, int)
        or config.get("use_sliding_window") is False
    ):
        return {}
    kinds, every = config.get("layer_types"), WINDOW_EVERY.get(config["model_type"])
    if kinds is not None:
        windowed = sum(kind == "sliding_attention" for kind in kinds)
    elif every is not None:
        windowed = layers - layers // every
    else:
        windowed = layers - int(config.get("max_window_layers") or 0)
    return {"window": window, "num_window_layers": windowed} if windowed > 0 else {}


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
