"""Who may see whom: the documents of a sample, as cumulative boundaries. Never a mask."""

from dataclasses import dataclass
from itertools import pairwise

import torch


@dataclass(frozen=True)
class EarlierKeys:
    """A block of keys before the queries, in the same document: a query sees each of them that its window reaches."""

    cu_seqlens: torch.Tensor
    """int32 [2] on the device of the computation: [0, tokens]."""
    tokens: int
    gap: int
    """Tokens between the last key and the first query."""


@dataclass(frozen=True)
class Segments:
    """The documents of one sample. Attention is causal inside a document and nothing beyond it.

    Rows behind the last boundary are padding: they attend to nothing, and their output is zero.
    """

    cu_seqlens: torch.Tensor
    """int32 [num_documents + 1] on the device of the computation: what varlen kernels take."""
    bounds: tuple[int, ...]
    """The same on the host."""
    max_len: int
    """Tokens of the longest document."""
    keys: EarlierKeys | None = None
    """None: the queries' own rows, and causal. Otherwise one document, and no causal mask."""

    @property
    def num_tokens(self) -> int:
        return self.bounds[-1]

    @property
    def num_keys(self) -> int:
        return self.num_tokens if self.keys is None else self.keys.tokens

    @property
    def key_cu_seqlens(self) -> torch.Tensor:
        return self.cu_seqlens if self.keys is None else self.keys.cu_seqlens

    @property
    def max_keys(self) -> int:
        """Keys of the document that has most."""
        return self.max_len if self.keys is None else self.keys.tokens

    @property
    def first_position(self) -> int:
        """Where the first query stands, counted in keys: query a is at `first_position + a`."""
        return 0 if self.keys is None else self.keys.tokens + self.keys.gap

    def documents(self) -> list[tuple[int, int]]:
        """`[start, stop)` of each document."""
        return list(pairwise(self.bounds))

    def window_left(self, window: int | None) -> int:
        """Keys that a query sees to the left of its own place, query a being placed at key `a + keys - queries`.

        For its own rows that is the query's own key; earlier keys are aligned at their last, as flash-attn does it.
        -1: no window. Raises ValueError for earlier keys that are not a piece of `rectangles`.
        """
        if window is None:
            return -1
        if self.keys is None:
            return window - 1
        left = window - 1 - self.keys.gap - self.num_tokens
        if left < 0 or self.num_tokens > self.num_keys:
            raise ValueError(
                f"{self.num_tokens} queries, {self.keys.gap} tokens behind {self.num_keys} keys, in a window of "
                f"{window}: each query must see a key, and there must be no more queries than keys; cut by rectangles()"
            )
        return left

    def window_right(self, window: int | None) -> int:
        """The same to the right: none of its own rows, all of earlier keys. -1: no window over these.

        Given in numbers because flash-attn 2 makes -1, beside a left side, as many as there are keys.
        """
        if self.keys is None:
            return 0
        return -1 if window is None else self.num_tokens

    def first_seen(self, window: int | None) -> int:
        """The first of the earlier keys that any query sees: the first query's, which looks back furthest."""
        return 0 if self.keys is None or window is None else max(0, self.first_position - window + 1)


def segments_of(cu_seqlens: torch.Tensor, *, device: torch.device) -> Segments:
    """From the host's int32 [num_documents + 1] boundaries `[0, …, n_tokens]`."""
    bounds = tuple(int(bound) for bound in cu_seqlens.tolist())
    lengths = [stop - start for start, stop in pairwise(bounds)]
    return Segments(cu_seqlens=cu_seqlens.to(device), bounds=bounds, max_len=max(lengths, default=0))


def rectangle(queries: int, keys: int, *, gap: int, device: torch.device) -> Segments:
    """Queries that look at a block of earlier keys of their document, `gap` tokens before the first query."""
    if queries < 1 or keys < 1 or gap < 0:
        raise ValueError(
            f"{queries} queries, {keys} keys, gap {gap}: a rectangle has both, and keys lie before queries"
        )
    unit = torch.arange(2, dtype=torch.int32, device=device)  # made on the device: no copy to wait for
    earlier = EarlierKeys(cu_seqlens=unit * keys, tokens=keys, gap=gap)
    return Segments(cu_seqlens=unit * queries, bounds=(0, queries), max_len=queries, keys=earlier)


def rectangles(queries: int, keys: int, *, gap: int, window: int | None) -> list[tuple[slice, bool]]:
    """The queries that see a block of earlier keys, cut where that changes: (which, whether they see all of it).

    Each is a call of its own, whose gap is `gap` + the slice's start; those that see all need no window. Queries see
    less of the block the later they are, and those in no slice see nothing of it.
    """
    if window is None:
        return [(slice(0, queries), True)]
    all_seen = min(max(window - gap - keys, 0), queries)
    some_seen = min(max(window - 1 - gap, all_seen), queries)
    cuts = [(slice(0, all_seen), True), (slice(all_seen, some_seen), False)]
    return [(which, sees_all) for which, sees_all in cuts if which.start < which.stop]
