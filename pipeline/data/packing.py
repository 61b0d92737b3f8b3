"""The packing plan: which pieces of which documents make each sample. Global, deterministic, plain numpy.

Between tokenize and write in the data path: lengths -> PackingPlan. No token is touched here.
"""

import json
from bisect import bisect_left, insort
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.files import replaced

PLANNER_VERSION = 2
OPEN_SAMPLES = 64
"""Samples that wait for a document that fits; four reach the lower bound at 3.7M tokens, short samples need more."""

CHUNK = 1 << 16
"""Documents whose lengths are Python integers at a time: a loop handles them faster than numpy's."""

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PackingPlan:
    """Samples as runs of pieces; a piece is tokens `[start, stop)` of a document.

    The pieces of sample s are rows `sample_offsets[s]` to `sample_offsets[s + 1]`, in the order they are laid out.
    """

    seq_len: int
    seed: int
    documents: int
    """That were taken, each as often as it was taken."""
    documents_cut: int
    """Of those, in more than one piece."""
    tokens_in: int
    """Tokens of the documents that were taken."""
    dropped: dict[str, int]
    """Tokens of them that no sample holds, by reason; declared, so that nothing is lost unseen."""
    sample_offsets: Ints
    """[samples + 1]"""
    document: Ints
    """[pieces]"""
    start: Ints
    """[pieces]"""
    stop: Ints
    """[pieces]"""

    @property
    def samples(self) -> int:
        return len(self.sample_offsets) - 1

    @property
    def tokens(self) -> int:
        """Tokens that samples hold; the rest of samples × seq_len is padding."""
        return int((self.stop - self.start).sum())

    @property
    def tokens_dropped(self) -> int:
        return sum(self.dropped.values())

    @property
    def unfilled_fraction(self) -> float:
        return 1 - self.tokens / (self.samples * self.seq_len)

    def pieces(self, sample: int) -> tuple[Ints, Ints, Ints]:
        """Document, start and stop of each piece of a sample."""
        rows = slice(int(self.sample_offsets[sample]), int(self.sample_offsets[sample + 1]))
        return self.document[rows], self.start[rows], self.stop[rows]


@dataclass(frozen=True)
class Selection:
    """Which documents are packed."""

    shortest: int = 1
    longest: int | None = None
    """Tokens; documents outside the two are dropped."""
    drop_last: bool = False
    """Leave out the sample with most padding, if it has any."""


def plan_packing(
    lengths: NDArray[Any],
    *,
    seq_len: int,
    seed: int,
    copies: NDArray[Any] | None = None,
    selection: Selection = Selection(),
    open_samples: int = OPEN_SAMPLES,
) -> PackingPlan:
    """Packs documents of `lengths` tokens [documents] into samples of `seq_len`, best fit over a seeded shuffle.

    A document that fits into a sample is never cut; a longer one fills whole samples, and its rest is packed like a
    document. Shuffled, because sorting makes the samples' attention cost (sum of squares) 70 times more uneven.
    `copies` [documents] is how often each is taken, once if it is not given. Raises DataError if there is no document
    to pack or one without a token.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    copies = np.ones(len(lengths), np.int64) if copies is None else np.asarray(copies, np.int64)
    if len(lengths) and lengths.min() < 1:
        bad = int(lengths.argmin())
        raise DataError(f"document {bad} has {lengths[bad]} tokens, and a document needs at least one; drop it")
    short, long = lengths < selection.shortest, lengths > (selection.longest or _WORD)
    kept = np.where(short | long, 0, copies)
    taken = np.repeat(np.arange(len(lengths)), kept)
    if not len(taken):
        raise DataError(
            f"0 of {len(lengths)} documents are left to pack, and a sample needs at least one; check data.sources and "
            "data.packing"
        )
    plan = PackingPlan(
        seq_len=seq_len,
        seed=seed,
        documents=int(copies.sum()),
        documents_cut=int(kept[lengths > seq_len].sum()),
        tokens_in=int((lengths * copies).sum()),
        dropped={
            "documents_too_short": int((lengths * copies)[short].sum()),
            "documents_too_long": int((lengths * copies)[long].sum()),
        },
        **_pieces(taken[seeded_order(len(taken), seed=seed)], lengths, seq_len=seq_len, open_samples=open_samples),
    )
    check_plan(plan, lengths=lengths, copies=kept)
    return _without_last(plan) if selection.drop_last else plan


def _pieces(documents: Ints, lengths: Ints, *, seq_len: int, open_samples: int) -> dict[str, Ints]:
    """The arrays of a plan for `documents`, in the order given: samples of rests first, then those filled by one."""
    sizes = lengths[documents]
    full, rests = sizes // seq_len, sizes % seq_len
    left = np.flatnonzero(rests)
    rest_sample = _best_fit(rests[left], seq_len=seq_len, open_samples=open_samples)
    first_full = int(rest_sample.max()) + 1 if len(left) else 0
    full_start = seq_len * (np.arange(int(full.sum())) - np.repeat(np.cumsum(full) - full, full))
    sample = np.concatenate([rest_sample, first_full + np.arange(len(full_start))])
    rows = np.argsort(sample, kind="stable")
    return {
        "sample_offsets": np.concatenate([[0], np.cumsum(np.bincount(sample))]),
        "document": np.concatenate([documents[left], np.repeat(documents, full)])[rows],
        "start": np.concatenate([seq_len * full[left], full_start])[rows],
        "stop": np.concatenate([sizes[left], full_start + seq_len])[rows],
    }


def _best_fit(rests: Ints, *, seq_len: int, open_samples: int) -> Ints:
    """The sample of each rest [rests]; samples are numbered as they are opened.

    `waiting` holds the open samples, sorted by free tokens, each as one integer (free << 40 | sample), because
    comparing tuples takes three times as long. When no rest fits and there are too many, the fullest is closed.
    """
    waiting: list[int] = []
    samples, mask = 0, (1 << 40) - 1
    found = np.empty(len(rests), np.int64)
    for first in range(0, len(rests), CHUNK):
        chosen: list[int] = []
        for rest in rests[first : first + CHUNK].tolist():
            fit = bisect_left(waiting, rest << 40)
            if fit < len(waiting):
                place = waiting.pop(fit) - (rest << 40)
            else:
                place = seq_len - rest << 40 | samples
                samples += 1
                if len(waiting) == open_samples:
                    del waiting[0]
            if place > mask:
                insort(waiting, place)
            chosen.append(place & mask)
        found[first : first + CHUNK] = chosen
    return found


def _without_last(plan: PackingPlan) -> PackingPlan:
    """The plan without its sample of fewest tokens, unless that is full. Raises DataError if no other is left."""
    tokens = np.add.reduceat(plan.stop - plan.start, plan.sample_offsets[:-1])
    last = int(tokens.argmin())
    if tokens[last] == plan.seq_len:
        return plan
    if plan.samples == 1:
        raise DataError(
            f"the only sample has {tokens[last]} of {plan.seq_len} tokens, and data.packing.unfilled_last: drop leaves "
            "none; set it to keep, or data.seq_len lower"
        )
    first, stop = plan.sample_offsets[last : last + 2]
    rows = np.delete(np.arange(len(plan.document)), slice(first, stop))
    return replace(
        plan,
        dropped=plan.dropped | {"unfilled_last_sample": int(tokens[last])},
        sample_offsets=np.delete(
            np.where(plan.sample_offsets >= stop, plan.sample_offsets - (stop - first), plan.sample_offsets), last + 1
        ),
        document=plan.document[rows],
        start=plan.start[rows],
        stop=plan.stop[rows],
    )


def check_plan(plan: PackingPlan, *, lengths: Ints, copies: Ints) -> None:
    """Raises DataError unless every token is in one place per copy of its document, and no sample is too long."""
    sizes = plan.stop - plan.start
    per_document = -(-lengths // plan.seq_len)
    most = int(per_document.max())
    # One number for each piece that there must be, document after document; each as often as its document has copies.
    number = np.sort(plan.document * most + plan.start // plan.seq_len)
    expected = np.repeat(np.arange(len(lengths)), per_document * copies)
    within = np.arange(len(expected)) - np.searchsorted(expected, expected)
    _refuse(
        {
            "a sample has no piece": np.diff(plan.sample_offsets).min() < 1 or plan.sample_offsets[-1] != len(sizes),
            "a document has too many or too few pieces": not np.array_equal(
                number, expected * most + within // np.maximum(copies[expected], 1)
            ),
            "tokens in are not tokens out + dropped": plan.tokens_in != plan.tokens + plan.tokens_dropped,
        }
    )
    whole = np.minimum(lengths[plan.document] - plan.start, plan.seq_len)
    _refuse(
        {
            "a token is in two samples or in none": bool((plan.start % plan.seq_len).any())
            or not np.array_equal(sizes, whole),
            "a sample is too long": np.add.reduceat(sizes, plan.sample_offsets[:-1]).max() > plan.seq_len,
        }
    )


def _refuse(faults: dict[str, bool]) -> None:
    for fault, found in faults.items():
        if found:
            raise DataError(f"the packing plan is wrong: {fault}; delete it and run the stages plan and write again")


def seeded_order(count: int, *, seed: int, stream: int = 0) -> Ints:
    """A permutation of range(count) [count] that `seed` and `stream` decide, alone and for ever.

    Ranks hashes (splitmix64) rather than asking numpy's generators, whose streams may change between versions.
    """
    salt = _mix(np.array([_mix_int(seed) + stream & _WORD], dtype=np.uint64))
    keys = _mix(salt + np.arange(count, dtype=np.uint64) * np.uint64(_GOLDEN))
    return np.argsort(keys, kind="stable")


def _mix_int(value: int) -> int:
    return int(_mix(np.array([value & _WORD], dtype=np.uint64))[0])


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finalizer; arrays wrap around silently, as it needs."""
    words = words + np.uint64(_GOLDEN)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


_ARRAYS = ("sample_offsets", "document", "start", "stop")
_HEADER = ("seq_len", "seed", "documents", "documents_cut", "tokens_in", "dropped")


def save_plan(plan: PackingPlan, path: Path) -> None:
    """Writes the plan atomically as one .npz; equal plans are equal bytes."""
    header = {"planner_version": PLANNER_VERSION} | {name: getattr(plan, name) for name in _HEADER}
    arrays = {name: getattr(plan, name) for name in _ARRAYS}
    with replaced(path) as temporary, temporary.open("wb") as file:
        np.savez(file, header=np.array(json.dumps(header)), **arrays)


def load_plan(path: Path) -> PackingPlan:
    """The plan in `path`. Raises DataError if it is missing, damaged or another planner's."""
    try:
        with np.load(path, allow_pickle=False) as file:
            header = json.loads(str(file["header"]))
            arrays = {name: file[name] for name in _ARRAYS}
    except FileNotFoundError as error:
        raise DataError(f"there is no packing plan {path}; run the stage plan first") from error
    except (ValueError, KeyError, BadZipFile) as error:
        raise DataError(f"packing plan {path} is damaged ({error}); delete it and run the stage plan again") from error
    if header["planner_version"] != PLANNER_VERSION:
        raise DataError(
            f"packing plan {path} is of planner version {header['planner_version']}, and this one reads "
            f"{PLANNER_VERSION}; delete it and run the stage plan again"
        )
    return PackingPlan(**{name: header[name] for name in _HEADER}, **arrays)
