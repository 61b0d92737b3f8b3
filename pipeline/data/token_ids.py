"""Which numbers are token ids, and what is said of those that are not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError

IDS = 1 << 31  # no vocabulary is as large; a negative id that was stored in 32 bits is not below it


def largest_id(ids: NDArray[Any], *, limit: int | None, name_of: Callable[[int], str]) -> int:
    """The largest of some ids, integers [at least 1].

    Raises DataError for the first that is negative or not below `limit`; `name_of` names the document of a position.
    """
    if ids.itemsize < 4:
        ids = ids.astype(np.int32)
    # A negative id is a huge one: half the time of two looks.
    largest = int(np.maximum.reduce(ids.view(f"u{ids.itemsize}")))
    if largest < min(limit or IDS, IDS):
        return largest
    at = int(np.flatnonzero((ids < 0) | (ids >= min(limit or IDS, IDS)))[0])
    wrong = int(ids[at : at + 1].view(np.int32)[0]) if ids.itemsize == 4 else int(ids[at])
    rule = f"is outside the vocabulary of {limit}" if 0 <= wrong < IDS else "is no token"
    raise DataError(
        f"token id {wrong} in {name_of(at)} {rule}; set data.tokenizer to the model's own, raise "
        "model.config.vocab_size, or repair the row"
    )


def check_vocabulary(token_id: int, *, limit: int | None, where: Path) -> None:
    """Raises DataError unless the token id is below `limit`."""
    if limit is not None and token_id >= limit:
        raise DataError(
            f"token id {token_id} in {where} is outside the model's vocabulary of {limit}; set data.tokenizer to the "
            "model's own, or raise model.config.vocab_size"
        )
