"""Which tokens count in the loss, as runs: int32 [runs, 2], each `[start, stop)`, sorted, not touching.

A token that counts is one that is predicted: the label of the token before it. Runs cost 8 bytes each, where a mask of
a 3.7M-token sample is 3.7 MB and int64 labels are 29.6 MB.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Runs = NDArray[np.int32]

EMPTY: Runs = np.zeros((0, 2), np.int32)


def whole(tokens: int) -> Runs:
    """All of `tokens` tokens count."""
    return np.array([[0, tokens]], np.int32)


def runs_of_mask(mask: NDArray[np.bool_]) -> Runs:
    """bool [tokens] -> runs."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return edges.reshape(-1, 2).astype(np.int32)


def mask_of_runs(runs: Runs, *, start: int, stop: int) -> NDArray[np.bool_]:
    """bool [stop - start]: which of the tokens `[start, stop)` count."""
    steps = np.zeros(stop - start + 1, np.int8)
    inside = clipped(runs, start=start, stop=stop)
    steps[inside[:, 0]] += 1
    steps[inside[:, 1]] -= 1
    return np.cumsum(steps[:-1], dtype=np.int8).astype(bool)


def clipped(runs: Runs, *, start: int, stop: int) -> Runs:
    """The part of the runs within `[start, stop)`, counted from `start`."""
    inside = np.clip(runs, start, stop) - np.int32(start)
    return inside[inside[:, 1] > inside[:, 0]]


def joined(pieces: list[Runs], *, offsets: NDArray[Any]) -> Runs:
    """The runs of pieces that lie end to end from `offsets` on [pieces]; runs that touch become one."""
    sizes = [len(piece) for piece in pieces]
    flat = np.concatenate([*pieces, EMPTY]) + np.repeat(offsets, sizes)[:, None]
    if not len(flat):
        return EMPTY
    first = np.concatenate([[True], flat[1:, 0] > flat[:-1, 1]])
    last = np.concatenate([first[1:], [True]])
    return np.stack([flat[first, 0], flat[last, 1]], axis=1).astype(np.int32)


def count_labels(runs: Runs, *, cu_seqlens: NDArray[Any]) -> int:
    """Labels of a sample that count: its runs' tokens, without the first of each document, which nothing predicts."""
    lengths = runs[:, 1].astype(np.int64) - runs[:, 0]
    firsts = cu_seqlens[:-1]
    row = np.searchsorted(runs[:, 0], firsts, side="right") - 1
    predicted = (row >= 0) & (firsts < np.append(runs[:, 1], 0)[row])
    return int(lengths.sum()) - int(predicted.sum())
