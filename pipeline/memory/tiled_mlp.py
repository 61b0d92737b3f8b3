"""The MLP a tile of tokens at a time, run again in backward: its intermediates exist for one tile only.

ALST (arXiv 2506.13996, §3.1.1), after Mini-Sequence Transformer (2407.15892). Dense MLPs and blocks of experts alike:
routing, too, looks at one token at a time.
"""

from transformers import PreTrainedModel

from pipeline.errors import RecipeError
from pipeline.memory.tiled_module import TiledModule
from pipeline.model.anatomy import decoder_layers, mlps


def attach(model: PreTrainedModel, *, tile_tokens: int) -> None:
    """Put a TiledMLP around every MLP of every decoder layer; parameter names stay as they were.

    Raises RecipeError for a layer without an MLP of its own, and for a model whose loss looks at router logits: what is
    recorded inside a tile has the right value and no gradient.
    """
    if getattr(model.config, "output_router_logits", False):
        raise RecipeError(
            "model.config.output_router_logits = True: must be false, tiles give recorded router logits no gradient; "
            "set model.config.output_router_logits=false"
        )
    for layer in decoder_layers(model):
        for name in mlps(layer):
            setattr(layer, name, TiledMLP(getattr(layer, name), tile_tokens=tile_tokens))


class TiledMLP(TiledModule):
    """An MLP of a decoder layer, dense or of experts."""

    feature = "memory.tiled_mlp"
