"""Buckets that double in width: where in a document, and in how long a one, a loss belongs."""

FIRST_TOKENS = 256
"""Upper end of the first bucket: what even a short context knows. Each further bucket is twice as long."""


def bucket_edges(seq_len: int) -> tuple[int, ...]:
    """First token of every bucket but the first, which begins at 0; the last bucket ends with the sample."""
    edges = []
    edge = FIRST_TOKENS
    while edge < seq_len:
        edges.append(edge)
        edge *= 2
    return tuple(edges)


def bucket_names(kind: str, seq_len: int) -> tuple[str, ...]:
    """`kind/00000000`, `kind/00000256`, …: the first token of each bucket, in digits that sort as they count."""
    return tuple(f"{kind}/{first:08d}" for first in (0, *bucket_edges(seq_len)))
