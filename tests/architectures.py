"""Tiny configs of every supported architecture, and of the ways to configure one that change what it computes."""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from pipeline.model.tiny import VARIANTS, tiny_config
from pipeline.plan.model_support import supported_models


class _Architectures(Mapping[str, dict[str, Any]]):
    """Configs by name: a model type, or one of its variants (`llama-tied`). Made when asked for."""

    def __getitem__(self, name: str) -> dict[str, Any]:
        return dict(_config(name))

    def __iter__(self) -> Iterator[str]:
        supported = [model_type for model_type, support in supported_models().items() if support.supported]
        variants = [name for name, (model_type, _) in VARIANTS.items() if model_type in supported]
        return iter(sorted([*supported, *variants]))

    def __len__(self) -> int:
        return len(list(iter(self)))


@cache
def _config(name: str) -> dict[str, Any]:
    model_type, special = VARIANTS.get(name, (name, {}))
    return {"model_type": model_type, **tiny_config(model_type, special)}


ARCHITECTURES = _Architectures()

MAINSTREAM = (
    "cohere",
    "cohere2",
    "deepseek_v3",
    "deepseek_v3-no-q-lora",
    "exaone4",
    "gemma2",
    "gemma2-no-caps",
    "gemma3_text",
    "glm4",
    "glm4_moe",
    "gpt2",
    "gpt_neox",
    "gpt_neox-sequential",
    "gpt_oss",
    "granite",
    "granitemoe",
    "llama",
    "llama-biases",
    "llama-one-kv-head",
    "llama-tied",
    "llama-yarn",
    "ministral3",
    "mistral",
    "mistral-no-window",
    "mixtral",
    "mixtral-no-window",
    "olmo2",
    "olmo3",
    "olmoe",
    "phi",
    "phi3",
    "phi3-no-window",
    "qwen2",
    "qwen2-window",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
    "starcoder2",
)
"""Tested by `make test`; the others by `make test-full`."""
