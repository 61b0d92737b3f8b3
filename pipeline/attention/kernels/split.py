"""Which calls a kernel gets: one where it can, several where one call would pass 2^31 elements.

Kernels count elements in 32-bit integers in places (each module says where). A wrong offset is a wrong gradient long
before it is a crash, so no call may reach the limit. The axes, in the order they are used, cheapest first:

1. whole KV heads, with the query heads that share them: independent;
2. the query heads of one KV head: their dk and dv are summed;
3. documents: independent, but a document cannot be cut.

Earlier keys are one document. Those that no query's window reaches are left out of its calls, and their gradients are
zero: no kernel has to be right about keys without a query (flash_attention_3.py has one that is not).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from pipeline.attention.kernels.interface import Capabilities
from pipeline.attention.segments import Segments
from pipeline.errors import UserError

DOCUMENT_PADDING = 128  # rows that backward buffers add per document, at most, and once more at the end
HEAD_DIM_MULTIPLE = 64  # backward buffers round the head dim up; no kernel here rounds further than this


@dataclass(frozen=True)
class Piece:
    """One call: documents [first, last), their queries and keys, and heads."""

    first: int
    last: int
    tokens: slice
    keys: slice
    heads: slice
    kv_heads: slice
    segments: Segments
    """Of these documents alone, starting at 0."""


def pieces(
    capabilities: Capabilities,
    segments: Segments,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int | None = None,
) -> list[Piece]:
    """The calls for [num_tokens, heads, head_dim] queries. Raises UserError for a document too long for any call."""
    first_key = segments.first_seen(window)
    segments = _without_keys_before(first_key, segments)
    groups = heads // kv_heads
    row = -(-head_dim // HEAD_DIM_MULTIPLE) * HEAD_DIM_MULTIPLE
    calls = []
    for first, last in _runs(capabilities, segments, row):
        tokens = slice(segments.bounds[first], segments.bounds[last])
        keys = tokens if segments.keys is None else slice(first_key, first_key + segments.num_keys)
        local = _part(segments, first, last)
        elements_per_head = _rows(max(local.num_tokens, local.num_keys), last - first) * row
        for some_heads, some_kv_heads in _head_slices(elements_per_head, capabilities, kv_heads, groups):
            calls.append(Piece(first, last, tokens, keys, some_heads, some_kv_heads, local))
    return calls


def _rows(tokens: int, documents: int) -> int:
    """Rows of a call's largest buffer."""
    return tokens + DOCUMENT_PADDING * (documents + 1)


def _runs(capabilities: Capabilities, segments: Segments, row: int) -> Iterator[tuple[int, int]]:
    """Documents [first, last) of each call, so that one query head of them stays below the limit."""
    documents = len(segments.bounds) - 1
    if documents and _fits(capabilities, max(segments.num_tokens, segments.num_keys), documents, row):
        yield 0, documents  # nearly always; a sample may have ten thousands of documents to go through otherwise
        return
    if segments.keys is not None:
        raise UserError(
            f"{segments.num_tokens:,} queries and a block of {segments.num_keys:,} earlier keys at head dim {row}: one "
            f"head of one attention call holds at most {capabilities.max_elements:,} elements; "
            "set a smaller memory.sequence_chunks.chunk_tokens"
        )
    first = 0
    for document, (start, stop) in enumerate(pairwise(segments.bounds)):
        if not _fits(capabilities, stop - start, 1, row):
            raise UserError(
                f"a document of {stop - start:,} tokens at head dim {row}: one head of one attention call holds at "
                f"most {capabilities.max_elements:,} elements; pack with a smaller data.seq_len, or set "
                "memory.sequence_chunks.chunk_tokens below that"
            )
        if not _fits(capabilities, stop - segments.bounds[first], document + 1 - first, row):
            yield first, document
            first = document
    if documents:
        yield first, documents


def _fits(capabilities: Capabilities, tokens: int, documents: int, row: int) -> bool:
    too_large = capabilities.max_elements is not None and _rows(tokens, documents) * row > capabilities.max_elements
    return not too_large and (capabilities.max_documents is None or documents <= capabilities.max_documents)


def _head_slices(
    elements_per_head: int, capabilities: Capabilities, kv_heads: int, groups: int
) -> Iterator[tuple[slice, slice]]:
    """(query heads, KV heads) of each call."""
    heads = kv_heads * groups
    at_once = heads if capabilities.max_elements is None else max(1, capabilities.max_elements // elements_per_head)
    if at_once >= groups:
        step = min(kv_heads, at_once // groups)
        for kv_head in range(0, kv_heads, step):
            stop = min(kv_heads, kv_head + step)
            yield slice(kv_head * groups, stop * groups), slice(kv_head, stop)
        return
    for kv_head in range(kv_heads):
        for group in range(0, groups, at_once):
            stop = min(groups, group + at_once)
            yield slice(kv_head * groups + group, kv_head * groups + stop), slice(kv_head, kv_head + 1)


def _without_keys_before(first_key: int, segments: Segments) -> Segments:
    if segments.keys is None or first_key == 0:
        return segments
    cu_seqlens = (segments.keys.cu_seqlens - first_key).clamp_(min=0)
    return replace(segments, keys=replace(segments.keys, cu_seqlens=cu_seqlens, tokens=segments.num_keys - first_key))


def _part(segments: Segments, first: int, last: int) -> Segments:
    if (first, last) == (0, len(segments.bounds) - 1):
        return segments
    bounds = tuple(bound - segments.bounds[first] for bound in segments.bounds[first : last + 1])
    return Segments(
        cu_seqlens=segments.cu_seqlens[first : last + 1] - segments.cu_seqlens[first],
        bounds=bounds,
        max_len=max(stop - start for start, stop in pairwise(bounds)),
    )
