"""Which models train exactly: measured on tiny instances of each, against the stock model, loss and every gradient.

`alst models` shows the outcome, a committed table; planning and the job refuse what is not supported there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pipeline.attention.function import NAME as ALST_ATTENTION
from pipeline.attention.function import register
from pipeline.errors import AlstError, RecipeError, RunError
from pipeline.model.parity import (
    Difference,
    NothingBelowFloat64,
    Training,
    build_tiny,
    compare,
    train_attached,
    train_stock,
)
from pipeline.model.tiny import configurations
from pipeline.plan.model_support import MORE_THAN_TEXT, Support, require_exact

BOUND = 1e-9
"""Largest relative difference in float64; what is right is below 1e-13."""

IN_CHUNKS = "memory.sequence_chunks={chunk_tokens: 9, hidden_states: cpu, keys_values: cpu, keep_keys_values: false}"

MOST_PARAMETERS = 5_000_000
"""A tiny instance with more was not made small by the sizes that are known here."""


def model_types() -> list[str]:
    """Every causal language model that the installed transformers knows."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def probe(model_type: str) -> Support:
    """Measure whether tiny instances of a model type, in every configuration known here, train exactly.

    Raises RecipeError if transformers does not know the type.
    """
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise RecipeError(
            f"model_type = {model_type!r}: transformers {transformers.__version__} has no causal language model of "
            "this type; correct it"
        )
    with _quiet():
        reason = _first_trouble(model_type)
        no_chunks = None if reason else _first_trouble(model_type, features=(IN_CHUNKS,))
    return Support(reason is None, reason or "", transformers.__version__, no_chunks or "")


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers comments on many a tiny config."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def _first_trouble(model_type: str, features: tuple[str, ...] = ()) -> str | None:
    try:
        tiny = list(configurations(model_type))
    except Exception as error:  # any architecture's own code
        return f"no tiny config of it can be made: {_one_line(error)}"
    for name, config in tiny:
        trouble = _trouble(model_type, config, features)
        if trouble is not None:
            return trouble if name == model_type else f"{name}: {trouble}"
    return None


def _trouble(model_type: str, config: dict[str, Any], features: tuple[str, ...]) -> str | None:
    """Why a configuration does not train exactly. Whatever an architecture's own code raises is a reason, too."""
    try:
        _require_text_decoder(model_type, config)
        ours = _attached(model_type, config, features)
        stock = _stock(model_type, config)
    except AlstError as error:
        return _one_line(error)
    except Exception as error:
        return f"a tiny instance of it does not run: {_one_line(error)}"
    return _judged(compare(ours, stock))


def _stock(model_type: str, config: dict[str, Any]) -> Training:
    """Raises RunError if the stock model does not train twice alike."""
    trained = []
    for seed in (0, 1):
        model = build_tiny(model_type, config, attention="eager")
        torch.manual_seed(seed)
        trained.append(train_stock(model, mode=NothingBelowFloat64))
    if compare(*trained).gradient > 0:
        raise RunError("the stock model draws random numbers in training, and a recompute would draw others")
    return trained[0]


def _attached(model_type: str, config: dict[str, Any], features: tuple[str, ...]) -> Training:
    register()
    model = build_tiny(model_type, config, attention=ALST_ATTENTION)
    return train_attached(model, mode=NothingBelowFloat64, features=features)


def _judged(difference: Difference) -> str | None:
    if difference.not_zero:
        return f"a gradient that must be zero is not: {', '.join(difference.not_zero[:3])}"
    if not max(difference.loss, difference.gradient) <= BOUND:
        return "loss and gradients are not those of the stock model"
    return None


def _require_text_decoder(model_type: str, config: dict[str, Any]) -> None:
    """Raises AlstError for what is no decoder of text alone, or what its tiny config did not make small."""
    whole = CONFIG_MAPPING[model_type](**config)
    require_exact(whole.to_dict())
    if whole.is_encoder_decoder:
        raise RunError("an encoder and a decoder, not a decoder alone")
    text = whole.get_text_config()
    if text is not whole:
        raise RunError(MORE_THAN_TEXT + text.model_type)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(whole)
    if not model._supports_attention_backend:
        raise RunError("its attention cannot be replaced: it is not called through transformers' attention interface")
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > MOST_PARAMETERS:
        raise RunError(f"its sizes are not known here: a tiny config makes a model of {count:,} parameters")


def _one_line(error: Exception) -> str:
    """What was found; the remedy of an error of ours, after the semicolon, is for a recipe."""
    text = " ".join(str(error).split())
    return text.partition(";")[0] if isinstance(error, AlstError) else shorten(f"{type(error).__name__}: {text}", 200)
