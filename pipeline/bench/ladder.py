"""The feature sets that are compared: rungs of a ladder, each the one below and something more. Data, no code.

A new feature is one line in `LADDER`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.errors import UserError

CHECKPOINT = "memory.activation_checkpoint"
CHUNKS = "memory.sequence_chunks"


@dataclass(frozen=True)
class Rung:
    """A feature set, by what it changes of the rung below."""

    name: str
    overrides: tuple[str, ...]
    reference: bool = False
    """The reference's way (DeepSpeed's own tiles, exchange and offload) has all of this rung too."""


LADDER = (
    Rung(
        "baseline",  # stock layers whose inputs wait on the device, as every long-context recipe begins
        (
            "memory.tiled_loss=null",
            "memory.tiled_mlp=null",
            "memory.tiled_norm=null",
            f"{CHECKPOINT}={{offload: null, keep_attention: false, layers_per_group: 1, resident_groups: auto}}",
            f"{CHECKPOINT}={{disk_groups: auto, checksums: false, offload_dtype: null}}",
            "memory.sequence_chunks=null",
        ),
        reference=True,
    ),
    Rung("tiled-loss", ("memory.tiled_loss={tile_tokens: auto, kernel: own}",), reference=True),
    Rung("tiled-mlp", ("memory.tiled_mlp={tile_tokens: auto}",), reference=True),
    # Every checkpoint leaves: with `auto` those of a short sequence stay, and nothing of the offload would be seen.
    Rung("offload", (f"{CHECKPOINT}={{offload: cpu, resident_groups: 0}}",), reference=True),
    Rung("tiled-norm", ("memory.tiled_norm={tile_tokens: auto}",)),
    Rung("keep-attention", (f"{CHECKPOINT}.keep_attention=true",)),
    Rung("layer-groups", (f"{CHECKPOINT}.layers_per_group=2",)),
    Rung(
        "sequence-chunks",
        (f"{CHUNKS}={{chunk_tokens: auto, hidden_states: gpu, keys_values: gpu, keep_keys_values: false}}",),
    ),
    Rung("chunks-on-host", (f"{CHUNKS}={{hidden_states: cpu, keys_values: cpu}}",)),
)
"""From nothing to everything. The reference's whole set is `offload`."""

RECIPE = Rung("recipe", ())
"""Not a rung: the features as the recipe itself has them, `auto` resolved. For best against best."""


def names() -> tuple[str, ...]:
    return (*(rung.name for rung in LADDER), RECIPE.name)


def rungs_of(asked: Sequence[str]) -> tuple[Rung, ...]:
    """The rungs of these names, in the ladder's order. Raises UserError for one that is none."""
    known = {rung.name: rung for rung in (*LADDER, RECIPE)}
    for name in asked:
        if name not in known:
            raise UserError(f"--rungs {name}: is no feature set; use some of {', '.join(known)}, or all")
    return tuple(rung for name, rung in known.items() if name in asked)


def overrides_of(name: str) -> tuple[str, ...]:
    """Of the recipe, for this rung and all below it."""
    return () if name == RECIPE.name else tuple(_up_to(name))


def _up_to(name: str) -> Iterator[str]:
    for rung in LADDER:
        yield from rung.overrides
        if rung.name == name:
            return
