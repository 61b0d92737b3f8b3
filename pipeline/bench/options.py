"""What is written on the command line of `alst bench`, as values. What cannot be meant raises UserError."""

import re
from collections.abc import Sequence

from pipeline.bench.cases import ENGINES, Engine
from pipeline.bench.ladder import RECIPE, names, rungs_of
from pipeline.errors import UserError

UNITS = {"": 1, "K": 2**10, "M": 2**20}


def tokens_of(text: str, *, option: str) -> int:
    """`131072`, `128K` or `2M`."""
    found = re.fullmatch(r"(\d+)([KM]?)", text.strip().upper())
    if found is None or int(found[1]) == 0:
        raise UserError(f"{option} {text}: must be tokens, as 131072, 128K (131,072) or 2M (2,097,152); correct it")
    return int(found[1]) * UNITS[found[2]]


def lengths_of(text: str) -> tuple[int, ...]:
    """Ascending, so that what does not fit comes last."""
    return tuple(sorted({tokens_of(part, option="--lengths") for part in text.split(",") if part.strip()}))


def layers_of(text: str, *, speed: bool) -> tuple[int, ...]:
    """Ascending. Speeds need two layers: what a layer's neighbours hide and wait for does not exist in one."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() and int(part) for part in parts):
        raise UserError(f"--layers {text}: must be numbers of layers with commas between them; write e.g. 2,4")
    layers = tuple(sorted({int(part) for part in parts}))
    if speed and layers[0] < 2:
        raise UserError(f"--layers {text}: a speed needs at least 2 layers; use --layers 2, or leave --lengths out")
    return layers


def rung_names(text: str) -> tuple[str, ...]:
    """`all` is the whole ladder; `recipe` stands beside it."""
    asked = [part.strip() for part in text.split(",") if part.strip()]
    if "all" in asked:
        asked = [*(name for name in names() if name != RECIPE.name), *(name for name in asked if name != "all")]
    if not asked:
        raise UserError(f"--rungs {text}: names no feature set; use some of {', '.join(names())}, or all")
    return tuple(rung.name for rung in rungs_of(asked))


def engines_of(text: str) -> tuple[Engine, ...]:
    asked = [part.strip() for part in text.split(",") if part.strip()]
    for name in asked:
        if name not in ENGINES:
            raise UserError(f"--engines {name}: unknown; use some of {', '.join(ENGINES)}")
    if not asked:
        raise UserError(f"--engines {text}: names none; use some of {', '.join(ENGINES)}")
    return tuple(engine for engine in ENGINES if engine in asked)


def check_asked(lengths: Sequence[int], *, find_max: bool) -> None:
    if not lengths and not find_max:
        raise UserError("alst bench: nothing to measure; give --lengths 32K,128K for speed, or --find-max for length")
