"""Which models train exactly, and why the others do not: a measured table and a few rules, without torch.

The table is written by `alst models --write`, from what `pipeline.model.support` measures on a tiny instance.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.errors import RecipeError

TABLE = Path(__file__).with_name("supported_models.json")

EXACT_LAYERS = {"full_attention", "sliding_attention", "attention"}

ROPE_OF_THE_BATCH = {"dynamic", "longrope", "su"}
"""Rotary embeddings whose frequencies depend on the longest position in a batch."""


MORE_THAN_TEXT = "a model of more than text, whose decoder of text alone is "


@dataclass(frozen=True)
class Support:
    """Whether a model type trains exactly, and if not, why."""

    supported: bool
    reason: str
    transformers: str
    """The version this was measured with."""
    no_chunks: str = ""
    """Why its layers cannot run a chunk of the sequence at a time; empty if they can."""


@cache
def supported_models() -> dict[str, Support]:
    """The committed table, by model type."""
    return {name: Support(**row) for name, row in json.loads(TABLE.read_text(encoding="utf-8")).items()}


def write_table(models: Mapping[str, Support]) -> None:
    """Replace the committed table."""
    rows = {name: asdict(models[name]) for name in sorted(models)}
    TABLE.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    supported_models.cache_clear()


def require_supported(model_type: str) -> None:
    """Raises RecipeError if the table does not say that this model type trains exactly."""
    known = supported_models()
    found = known.get(model_type)
    if found is None:
        near = difflib.get_close_matches(model_type, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise RecipeError(
            f"model_type = {model_type!r}: not tested; {hint}run `alst models --probe {model_type}`, "
            "or choose one that `alst models` lists"
        )
    if not found.supported:
        decoder = known.get(found.reason.removeprefix(MORE_THAN_TEXT))
        remedy = "choose a model that `alst models` lists as supported"
        if decoder is not None and decoder.supported:
            remedy = f"set model.config.model_type={found.reason.removeprefix(MORE_THAN_TEXT)} to train that alone"
        raise RecipeError(f"model_type = {model_type!r}: would not train exactly: {found.reason}; {remedy}")


def require_chunks(model_type: str) -> None:
    """Raises RecipeError if the layers of this model type, which trains exactly, cannot run in chunks."""
    reason = supported_models()[model_type].no_chunks
    if reason:
        raise RecipeError(
            f"memory.sequence_chunks: must be null for model_type {model_type!r}: {reason}; "
            "set memory.sequence_chunks: null"
        )


COLLECTIONS: Mapping[str, type] = {
    "layer_types": list,
    "mlp_only_layers": list,
    "rope_scaling": dict,
    "rope_parameters": dict,
}
"""What is no number or text in a config, and is read here."""


def require_exact(config: Mapping[str, Any]) -> None:
    """Raises RecipeError for the first thing in a model's config that would train other than the stock model does."""
    trouble = next(_troubles(config), None)
    if trouble is not None:
        raise RecipeError(trouble)


def _troubles(config: Mapping[str, Any]) -> Iterator[str]:
    for name, expected in COLLECTIONS.items():
        if config.get(name) is not None and not isinstance(config[name], expected):
            yield f"model.config.{name} = {config[name]!r}: must be a {expected.__name__}; correct it, or leave it out"
    for name, value in config.items():
        if is_dropout(name, value) and value > 0:
            yield f"model.config.{name} = {value}: must be 0, nothing random survives a recompute; set it to 0.0"
    strange = sorted({str(kind) for kind in config.get("layer_types") or ()} - EXACT_LAYERS)
    if strange:
        yield (
            f"model.config.layer_types has {', '.join(strange)}: all must be full or sliding attention; "
            "choose a model of attention alone"
        )
    for name in ("output_router_logits", "use_bidirectional_attention"):
        if config.get(name):
            yield f"model.config.{name} = {config[name]}: must be false; set it to false"
    if config.get("num_kv_shared_layers"):
        yield (
            f"model.config.num_kv_shared_layers = {config['num_kv_shared_layers']}: must be 0, a recomputed layer "
            "cannot reach another's keys; choose a model without"
        )
    if config.get("hidden_size_per_layer_input"):
        yield (
            f"model.config.hidden_size_per_layer_input = {config['hidden_size_per_layer_input']}: must be 0, an input "
            "of a layer other than hidden states gets no gradient; choose a model without"
        )
    if config.get("quantization_config"):
        yield "model.config.quantization_config: quantized weights do not train; choose the weights before quantization"
    for kind in sorted(_rope_types(config) & ROPE_OF_THE_BATCH):
        yield (
            f"model.config: rope type {kind!r} takes its frequencies from the longest position in a batch, on which "
            "ranks and packed documents differ; use one of default, linear, llama3, yarn"
        )


def is_dropout(name: str, value: Any) -> bool:
    """Whether a config's value is the strength of something random in training."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and bool(re.search(r"drop|jitter", name)) and not re.search(r"classifier|summary", name)


def _rope_types(config: Mapping[str, Any]) -> set[str]:
    """Of new and old configs, per layer type or for all layers."""
    found = set()
    for name in ("rope_parameters", "rope_scaling"):
        told = config.get(name) or {}
        for parameters in (told, *(value for value in told.values() if isinstance(value, Mapping))):
            found |= {str(parameters[key]) for key in ("rope_type", "type") if parameters.get(key)}
    return found
