"""RMSNorms a tile of tokens at a time: the float32 copies of the hidden states exist for one tile only.

A stock RMSNorm of transformers computes in float32 and keeps its copies for backward, where five more are made: with
tiled MLP and loss, that is what binds the length of a sequence on a GPU (docs/planner.md).
"""

from transformers import PreTrainedModel

from pipeline.memory.hidden_states import OnDevice
from pipeline.memory.tiled_module import TiledModule
from pipeline.model.anatomy import backbone, decoder_layers, norms


def attach(model: PreTrainedModel, *, tile_tokens: int, states: OnDevice | None = None) -> None:
    """Put a TiledNorm around every RMSNorm of hidden states; parameter names stay as they were. Other norms stay.

    `states` are those between layers, which the last norm reads.
    """
    for parent in (*decoder_layers(model), backbone(model)):
        between = states if parent is backbone(model) else None
        for name in norms(parent):
            setattr(parent, name, TiledNorm(getattr(parent, name), tile_tokens=tile_tokens, states=between))


class TiledNorm(TiledModule):
    """An RMSNorm of hidden states: a decoder layer's, or the last one."""

    feature = "memory.tiled_norm"
