"""Configs of well-known models, so that planning needs neither a download nor the hub's cache.

Only what sizes, bytes and FLOPs follow from; used where neither a folder nor the cache has the model's own config.json.
A test holds the parameters that follow from each to those that were published with the model.
"""

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]


def _dense(
    model_type: str, hidden: int, intermediate: int, layers: int, heads: tuple[int, int], vocab: int, **others: Any
) -> Config:
    """`heads` are (query, KV); `others` as in config.json."""
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        **others,
    }


_LLAMA = {"max_position_embeddings": 131072, "head_dim": 128}
_QWEN3 = {"max_position_embeddings": 40960, "head_dim": 128}
_TIED = {"tie_word_embeddings": True}

_LLAMA_8B = _dense("llama", 4096, 14336, 32, (32, 8), 128256, **_LLAMA)
_LLAMA_70B = _dense("llama", 8192, 28672, 80, (64, 8), 128256, **_LLAMA)
_LLAMA_1B = _dense("llama", 2048, 8192, 16, (32, 8), 128256, **_LLAMA | _TIED | {"head_dim": 64})
_LLAMA_3B = _dense("llama", 3072, 8192, 28, (24, 8), 128256, **_LLAMA | _TIED)
_MISTRAL_7B = _dense("mistral", 4096, 14336, 32, (32, 8), 32768, max_position_embeddings=32768, sliding_window=None)
_QWEN2_7B = _dense("qwen2", 3584, 18944, 28, (28, 4), 152064, max_position_embeddings=32768)
_QWEN3_MOE = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "decoder_sparse_step": 1}
_GEMMA_1B = {
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
    "layer_types": [("full" if (layer + 1) % 6 == 0 else "sliding") + "_attention" for layer in range(26)],
}
_GPT_OSS = {
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
}

KNOWN_MODELS: Mapping[str, Config] = {
    "meta-llama/Llama-3.1-8B": _LLAMA_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_8B,
    "meta-llama/Llama-3.1-70B": _LLAMA_70B,
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA_70B,
    "meta-llama/Llama-3.3-70B-Instruct": _LLAMA_70B,
    "meta-llama/Llama-3.2-1B": _LLAMA_1B,
    "meta-llama/Llama-3.2-1B-Instruct": _LLAMA_1B,
    "meta-llama/Llama-3.2-3B": _LLAMA_3B,
    "meta-llama/Llama-3.2-3B-Instruct": _LLAMA_3B,
    "Qwen/Qwen2.5-7B": _QWEN2_7B,
    "Qwen/Qwen2.5-7B-Instruct": _QWEN2_7B,
    "Qwen/Qwen3-0.6B": _dense("qwen3", 1024, 3072, 28, (16, 8), 151936, **_QWEN3 | _TIED),
    "Qwen/Qwen3-1.7B": _dense("qwen3", 2048, 6144, 28, (16, 8), 151936, **_QWEN3 | _TIED),
    "Qwen/Qwen3-4B": _dense("qwen3", 2560, 9728, 36, (32, 8), 151936, **_QWEN3 | _TIED),
    "Qwen/Qwen3-8B": _dense("qwen3", 4096, 12288, 36, (32, 8), 151936, **_QWEN3),
    "Qwen/Qwen3-14B": _dense("qwen3", 5120, 17408, 40, (40, 8), 151936, **_QWEN3),
    "Qwen/Qwen3-32B": _dense("qwen3", 5120, 25600, 64, (64, 8), 151936, **_QWEN3),
    "Qwen/Qwen3-30B-A3B": _dense("qwen3_moe", 2048, 6144, 48, (32, 4), 151936, **_QWEN3 | _QWEN3_MOE),
    "mistralai/Mistral-7B-v0.3": _MISTRAL_7B,
    "mistralai/Mistral-7B-Instruct-v0.3": _MISTRAL_7B,
    "google/gemma-3-1b-it": _dense("gemma3_text", 1152, 6912, 26, (4, 1), 262144, **_GEMMA_1B | _TIED),
    "google/gemma-3-1b-pt": _dense("gemma3_text", 1152, 6912, 26, (4, 1), 262144, **_GEMMA_1B | _TIED),
    "openai/gpt-oss-20b": _dense("gpt_oss", 2880, 2880, 24, (64, 8), 201088, **_GPT_OSS),
}
