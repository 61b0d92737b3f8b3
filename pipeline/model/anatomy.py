"""Where things are in a transformers decoder: its backbone, layers, MLPs and head."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline.errors import RecipeError, RunError

MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "shared_mlp")
"""What architectures call the MLP of a layer, dense or of experts; a layer may have several side by side."""


def backbone(model: PreTrainedModel) -> nn.Module:
    """The decoder without its head. Raises RunError if the model does not tell the two apart."""
    found: nn.Module = model.get_decoder()
    if found is model or isinstance(found, nn.Linear):
        raise RunError(f"{type(model).__name__} does not tell its decoder from its head; this model is not supported")
    return found


def lm_head(model: PreTrainedModel) -> nn.Linear:
    """The projection onto the vocabulary. Raises RunError if it is not one linear map."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise RunError(f"{type(model).__name__} has no linear output head; this model is not supported")
    return head


def matmul_parameters(model: PreTrainedModel) -> int | None:
    """Parameters of the linear maps, the head among them; None where experts hold theirs otherwise.

    Counted also when ZeRO-3 has partitioned them.
    """
    parameters = (parameter for layer in decoder_layers(model) for parameter in layer.parameters())
    layers = {parameter for parameter in parameters if len(getattr(parameter, "ds_shape", parameter.shape)) > 1}
    linear = {module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    if not layers <= linear:
        return None
    return sum(getattr(weight, "ds_numel", weight.numel()) for weight in linear)


def decoder_layers(model: PreTrainedModel) -> list[Any]:
    """In order; untyped, because their attributes are the architecture's. Raises RunError if there are none."""
    layers = [module for module in backbone(model).modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise RunError(f"{type(model).__name__} has no layers that transformers can checkpoint; it is not supported")
    return layers


def norms(parent: nn.Module) -> list[str]:
    """The names of the RMSNorms among a module's own children: those of hidden states, not of queries and keys."""
    return [name for name, child in parent.named_children() if "RMSNorm" in type(child).__name__]


def embeddings(parent: nn.Module) -> list[str]:
    """The names of the embeddings among a module's own children."""
    return [name for name, child in parent.named_children() if isinstance(child, nn.Embedding)]


def last_norms(parent: nn.Module) -> list[str]:
    """The names of a backbone's own norms, of whatever kind: what hidden states pass behind its layers."""
    return [name for name, _ in parent.named_children() if "norm" in name or name.startswith("ln_")]


def mlps(layer: nn.Module) -> list[str]:
    """The names of a decoder layer's MLPs. Raises RecipeError if none of its children is known to be one."""
    found = [name for name, child in layer.named_children() if name in MLP_NAMES]
    if not found:
        children = ", ".join(name for name, _ in layer.named_children())
        raise RecipeError(
            f"memory.tiled_mlp: {type(layer).__name__} has no MLP of its own among {children}, must have one named "
            f"{', '.join(MLP_NAMES)}; set memory.tiled_mlp: null"
        )
    return found
