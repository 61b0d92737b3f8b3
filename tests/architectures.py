"""Tiny configs of the architectures under test: what transformers needs to build each in milliseconds."""

from typing import Any

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **COMMON},
    "llama-tied": {"model_type": "llama", **COMMON, "tie_word_embeddings": True},
    "llama-one-kv-head": {"model_type": "llama", **COMMON, "num_key_value_heads": 1},
    "qwen3": {"model_type": "qwen3", **COMMON, "head_dim": 16},
}
