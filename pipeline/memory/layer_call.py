"""What whatever runs a decoder layer again has to know of its call."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pipeline.errors import RunError

CHANGED_BETWEEN_LAYERS = (
    "the model changes hidden states between its layers, which layers_per_group would undo; "
    "set memory.activation_checkpoint.layers_per_group: 1"
)


def same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both hold the same values because they are the same bytes: hooks of ZeRO-3 make new tensors of them."""
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one._version == other._version


def refuse_gradients_of_others(keywords: Mapping[str, Any], others: Sequence[Any]) -> None:
    """Raises RunError if anything but hidden states would get a gradient: it would be lost."""
    for name, value in (*enumerate(others), *keywords.items()):
        if isinstance(value, torch.Tensor) and value.requires_grad:
            raise RunError(f"the layer's argument {name} needs a gradient of its own; this model is not supported")
