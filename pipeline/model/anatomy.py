"""Where things are in a transformers decoder: its backbone, layers and head."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline.errors import RunError


def backbone(model: PreTrainedModel) -> nn.Module:
    """The decoder without its head."""
    found: nn.Module = model.get_decoder()
    return found


def lm_head(model: PreTrainedModel) -> nn.Linear:
    """The projection onto the vocabulary. Raises RunError if it is not one linear map."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise RunError(f"{type(model).__name__} has no linear output head; this model is not supported")
    return head


def decoder_layers(model: nn.Module) -> list[Any]:
    """In order; untyped, because their attributes are the architecture's. Raises RunError if there are none."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise RunError(f"{type(model).__name__} has no layers that transformers can checkpoint; it is not supported")
    return layers
