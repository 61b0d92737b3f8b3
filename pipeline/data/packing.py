"""The packing plan: which pieces of which documents make each sample. Global, deterministic, plain numpy.

Between tokenize and write in the data path: lengths -> PackingPlan. No token is touched here.
"""

import json
from bisect import bisect_left, insort
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.files import replaced

PLANNER_VERSION = 1
OPEN_SAMPLES = 64
"""Samples that wait for a document that fits; four reach the lower bound at 3.7M tokens, short samples need more."""

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
    tokens_in: int
    """Tokens of all documents."""
    tokens_dropped: int
    """Tokens of them that no sample holds; declared, so that nothing is lost unseen."""
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
    def documents_cut(self) -> int:
        """Documents in more than one piece."""
        return int((np.bincount(self.document, minlength=self.documents) > 1).sum())

    @property
    def unfilled_fraction(self) -> float:
        return 1 - self.tokens / (self.samples * self.seq_len)

    def pieces(self, sample: int) -> tuple[Ints, Ints, Ints]:
        """Document, start and stop of each piece of a sample."""
        rows = slice(int(self.sample_offsets[sample]), int(self.sample_offsets[sample + 1]))
        return self.document[rows], self.start[rows], self.stop[rows]


def plan_packing(lengths: NDArray[Any], *, seq_len: int, seed: int, open_samples: int = OPEN_SAMPLES) -> PackingPlan:
    """Packs documents of `lengths` tokens [documents] into samples of `seq_len`, best fit over a seeded shuffle.

    A document that fits into a sample is never cut; a longer one fills whole samples, and its rest is packed like a
    document. Shuffled, because sorting makes the samples' attention cost (sum of squares) 70 times more uneven.
    Raises DataError if there is no document or one without a token.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if not len(lengths):
        raise DataError("there are 0 documents, and a sample needs at least one; check data.sources")
    if lengths.min() < 1:
        bad = int(lengths.argmin())
        raise DataError(f"document {bad} has {lengths[bad]} tokens, and a document needs at least one; drop it")
    order = seeded_order(len(lengths), seed=seed)
    pieces = _best_fit(order.tolist(), lengths[order].tolist(), seq_len=seq_len, open_samples=open_samples)
    sample, document, start, stop = np.array(pieces, dtype=np.int64).T
    rows = np.argsort(sample, kind="stable")
    counts = np.bincount(sample)
    plan = PackingPlan(
        seq_len=seq_len,
        seed=seed,
        documents=len(lengths),
        tokens_in=int(lengths.sum()),
        tokens_dropped=0,
        sample_offsets=np.concatenate([[0], np.cumsum(counts)]),
        document=document[rows],
        start=start[rows],
        stop=stop[rows],
    )
    check_plan(plan, lengths=lengths)
    return plan


def _best_fit(
    order: list[int], lengths: list[int], *, seq_len: int, open_samples: int
) -> list[tuple[int, int, int, int]]:
    """(sample, document, start, stop) of every piece, samples numbered as they are opened.

    `waiting` holds (free tokens, sample) of the open samples, sorted; when no document fits any of them and there are
    too many, the fullest is closed.
    """
    pieces: list[tuple[int, int, int, int]] = []
    waiting: list[tuple[int, int]] = []
    samples = 0
    for document, length in zip(order, lengths, strict=True):
        start = 0
        while length - start >= seq_len:
            pieces.append((samples, document, start, start + seq_len))
            start, samples = start + seq_len, samples + 1
        if start == length:
            continue
        fit = bisect_left(waiting, (length - start, 0))
        if fit < len(waiting):
            free, sample = waiting.pop(fit)
        else:
            free, sample = seq_len, samples
            samples += 1
            if len(waiting) == open_samples:
                waiting.pop(0)
        pieces.append((sample, document, start, length))
        if free > length - start:
            insort(waiting, (free - (length - start), sample))
    return pieces


def check_plan(plan: PackingPlan, *, lengths: NDArray[Any]) -> None:
    """Raises DataError unless every token is in exactly one place, or declared dropped, and no sample is too long."""
    sizes = plan.stop - plan.start
    per_sample = np.diff(plan.sample_offsets)
    rows = np.lexsort((plan.start, plan.document))
    document, start, stop = plan.document[rows], plan.start[rows], plan.stop[rows]
    first = np.concatenate([[True], document[1:] != document[:-1]])
    expected_start = np.where(first, 0, np.concatenate([[0], stop[:-1]]))
    faults = {
        "it was made for other documents": plan.documents != len(lengths) or plan.tokens_in != lengths.sum(),
        "a sample has no piece": per_sample.min() < 1 or plan.sample_offsets[-1] != len(sizes),
        "a piece has no token": sizes.min() < 1,
        "a sample is too long": np.add.reduceat(sizes, plan.sample_offsets[:-1]).max() > plan.seq_len,
        "a token is in two samples or in none": (start != expected_start).any(),
        "a document's end is in no sample": plan.tokens_dropped == 0
        and not np.array_equal(stop[np.concatenate([first[1:], [True]])], lengths),
        "tokens in are not tokens out + dropped": plan.tokens_in != plan.tokens + plan.tokens_dropped,
    }
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
_NUMBERS = ("seq_len", "seed", "documents", "tokens_in", "tokens_dropped")


def save_plan(plan: PackingPlan, path: Path) -> None:
    """Writes the plan atomically as one .npz; equal plans are equal bytes."""
    header = {"planner_version": PLANNER_VERSION} | {name: getattr(plan, name) for name in _NUMBERS}
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
    return PackingPlan(**{name: header[name] for name in _NUMBERS}, **arrays)
