"""Where sequence chunks keep hidden states, keys and values: the values that `auto` may take."""

from collections.abc import Iterator

from pipeline.recipe.load import check
from pipeline.recipe.schema import MemoryRecipe, Place, Recipe

PLACES: tuple[tuple[Place, Place], ...] = (("gpu", "gpu"), ("cpu", "gpu"), ("cpu", "cpu"))
"""Of hidden states, and of keys and values, the fastest first."""


def places(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe with each place that the `auto`s of its sequence_chunks may name; itself where it has none. Whether
    keys and values are kept for backward is asked afterwards: false where that is `auto`."""
    feature = recipe.memory.sequence_chunks
    if feature is None or "auto" not in (feature.hidden_states, feature.keys_values, feature.keep_keys_values):
        yield recipe
        return
    kept = False if feature.keep_keys_values == "auto" else feature.keep_keys_values
    for hidden_states, keys_values in _allowed(recipe.memory):
        yield _with(recipe, hidden_states=hidden_states, keys_values=keys_values, keep_keys_values=kept)


def keeping_keys(recipe: Recipe, found: Recipe) -> Recipe | None:
    """The recipe as it was found to be fastest, with keys and values kept; None where it does not leave that open."""
    asked, chunks = recipe.memory.sequence_chunks, found.memory.sequence_chunks
    checkpoint = found.memory.activation_checkpoint
    if asked is None or chunks is None or checkpoint is None or asked.keep_keys_values != "auto":
        return None
    raw = recipe.model_dump(mode="json")
    raw["memory"]["activation_checkpoint"] |= {
        "keep_attention": checkpoint.keep_attention,
        "layers_per_group": checkpoint.layers_per_group,
    }
    places = {"hidden_states": chunks.hidden_states, "keys_values": chunks.keys_values}
    return _with(check(raw), **places, keep_keys_values=True)


def _with(recipe: Recipe, **values: str | bool) -> Recipe:
    raw = recipe.model_dump(mode="json")
    raw["memory"]["sequence_chunks"] |= values
    return check(raw)


def _allowed(memory: MemoryRecipe) -> list[tuple[Place, Place]]:
    """In the order of PLACES, with what the recipe says in its place."""
    feature = memory.sequence_chunks
    assert feature is not None
    found: list[tuple[Place, Place]] = []
    for hidden_states, keys_values in PLACES:
        if feature.hidden_states != "auto":
            hidden_states = feature.hidden_states
        if feature.keys_values != "auto":
            keys_values = feature.keys_values
        allowed = hidden_states == "gpu" or memory.no_hidden_states_on_host is None
        if allowed and (hidden_states, keys_values) not in found:
            found.append((hidden_states, keys_values))
    return found
