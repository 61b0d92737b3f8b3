"""Where sequence chunks keep hidden states, keys and values: the values that `auto` may take."""

from collections.abc import Iterator

from pipeline.recipe.load import check
from pipeline.recipe.schema import MemoryRecipe, Place, Recipe

PLACES: tuple[tuple[Place, Place], ...] = (("gpu", "gpu"), ("cpu", "gpu"), ("cpu", "cpu"))
"""Of hidden states, and of keys and values: the second frees more bytes of the GPU than the third, for less traffic."""


def places(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe with each value that the `auto`s of its sequence_chunks may take; itself where it has none."""
    feature = recipe.memory.sequence_chunks
    if feature is None or "auto" not in (feature.hidden_states, feature.keys_values, feature.keep_keys_values):
        yield recipe
        return
    kept = (False, True) if feature.keep_keys_values == "auto" else (feature.keep_keys_values,)
    for hidden_states, keys_values in _allowed(recipe.memory):
        for keep_keys_values in kept:
            raw = recipe.model_dump(mode="json")
            raw["memory"]["sequence_chunks"] |= {
                "hidden_states": hidden_states,
                "keys_values": keys_values,
                "keep_keys_values": keep_keys_values,
            }
            yield check(raw)


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
