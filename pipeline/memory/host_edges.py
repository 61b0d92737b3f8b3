"""Embeddings and the last norm, where hidden states lie in host memory between layers.

They run on the device, a tile of tokens at a time, and write to host memory.
"""

from transformers import PreTrainedModel

from pipeline.memory.hidden_states import InHostMemory
from pipeline.memory.tiled_module import TiledModule
from pipeline.model.anatomy import backbone, embeddings, last_norms


def attach(model: PreTrainedModel, states: InHostMemory, *, tile_tokens: int) -> None:
    """Put an Edge around every embedding and norm of the backbone itself; one that is tiled already gets `states`."""
    parent = backbone(model)
    device = next(model.parameters()).device  # of a norm without weights, too
    for name in (*embeddings(parent), *last_norms(parent)):
        module = getattr(parent, name)
        if isinstance(module, TiledModule):
            module.states, module.device = states, device
            module.tile_tokens = min(module.tile_tokens, tile_tokens)
        else:
            setattr(parent, name, Edge(module, tile_tokens=tile_tokens, states=states, device=device))


class Edge(TiledModule):
    """An embedding, or a norm of any kind."""

    feature = "memory.sequence_chunks.hidden_states"
