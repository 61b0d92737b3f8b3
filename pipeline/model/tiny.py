"""A tiny config of every model type: all sizes cut down, dropout off, and whatever the type can do switched on.

On these `support` measures whether a model type trains exactly.
"""

from collections.abc import Iterator
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from pipeline.plan.model_support import is_dropout

NUM_LAYERS = 3
WINDOW = 16
LAYER_TYPES = ("sliding_attention", "full_attention", "sliding_attention")

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "vocab_size": 97,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "sliding_window": WINDOW,
    # Blocks of experts; the first layer stays dense where a type has both.
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # Latent attention: keys and values have sizes of their own.
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    # What would not show at its default of one, or far from the values that occur.
    "logits_scaling": 3.0,
    "logit_scale": 0.3,
    "embedding_multiplier": 1.5,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.4,
    "final_logit_softcapping": 3.0,
    "attn_logit_softcapping": 3.0,
}
"""Taken by every config that has the name."""

LATENT = {"num_key_value_heads": 8, "head_dim": 16}

SPECIAL: dict[str, dict[str, Any]] = {
    "axk1": LATENT,
    "axk2": LATENT,
    "codegen": {"rotary_dim": 4},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "dots1": {"n_shared_experts": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": list(LAYER_TYPES)},
    "gemma4_text": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["full_attention"] * NUM_LAYERS},
    "helium": {"head_dim": 8},
    "hy_v4": LATENT,
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "minicpm3": LATENT,
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"]},
    "youtu": LATENT,
}
"""What a type needs instead, or as well, to be built, and to be what its published models are."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 1e4,
            }
        },
    ),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "mixtral-no-window": ("mixtral", {"sliding_window": None}),
    "phi3-no-window": ("phi3", {"sliding_window": None}),
    "starcoder2-no-window": ("starcoder2", {"sliding_window": None}),
    "gemma2-no-caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "deepseek_v3-no-q-lora": ("deepseek_v3", {"q_lora_rank": None}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True}),
}
"""Other ways to configure a type that change what is computed."""


def tiny_config(model_type: str, special: dict[str, Any] | None = None) -> dict[str, Any]:
    """Plain values for `CONFIG_MAPPING[model_type](**values)`."""
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    asked = SPECIAL.get(model_type, {}) | (special or {})
    values = {name: size for name, size in SIZES.items() if _takes(config_class, default, name)}
    values |= {name: 0.0 for name, value in default.to_dict().items() if is_dropout(name, value)}
    patterned = _takes(config_class, default, "layer_types") and "layer_types" not in asked
    if patterned and _has_windows(config_class, values | asked):
        values["layer_types"] = list(LAYER_TYPES)
    return values | asked


def configurations(model_type: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, tiny config) of the type as it is by default, then of its variants."""
    yield model_type, tiny_config(model_type)
    for name, (of_type, special) in VARIANTS.items():
        if of_type == model_type:
            yield name, tiny_config(model_type, special)


def _takes(config_class: type[PreTrainedConfig], default: PreTrainedConfig, name: str) -> bool:
    """Whether a config has a value of this name that can be set."""
    own = getattr(config_class, name, None)
    known = name in default.to_dict() or name in config_class.attribute_map
    return known and not (isinstance(own, property) and own.fset is None)


def _has_windows(config_class: type[PreTrainedConfig], values: dict[str, Any]) -> bool:
    """Whether layers differ in their window; then both kinds must be there, whatever the type's own pattern is."""
    return "sliding_attention" in (getattr(config_class(**values), "layer_types", None) or ())
