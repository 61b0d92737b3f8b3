"""A Batch: what one rank trains on, its part of one sample. Labels are shifted and positions set; no rank asks another.

Between packed data set and model in the data path.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.loss_runs import clipped, count_labels, mask_of_runs
from pipeline.data.packed_dataset import PackedDataset, PackedSample
from pipeline.parallel.shard import Layout, Shard

IGNORE_INDEX = -100


@dataclass(frozen=True, eq=False)
class Batch:
    """An SP rank's part of a sample, in the order of its layout. `local_seq_len` = seq_len / sp."""

    input_ids: torch.Tensor
    """int64 [1, local_seq_len]; zeros in the padding"""
    labels: torch.Tensor
    """int64 [1, local_seq_len]: the next token of the same document; IGNORE_INDEX where it does not count, at each
    document's last token and in the padding"""
    position_ids: torch.Tensor
    """int64 [1, local_seq_len], from 0 in every document (with cross-document attention: in the sample); zeros in the
    padding, so that no position is beyond the longest document"""
    cu_seqlens: torch.Tensor
    """int32 [num_documents + 1] on the CPU, of the whole sample: `[0, …, n_tokens]` (with cross-document attention
    `[0, n_tokens]`)"""
    n_tokens: int
    """Of the whole sample, without padding."""
    n_valid: int
    """Labels of the whole sample that count."""
    seq_len: int
    """Of the whole sample, with padding."""
    sample: int
    """Index in the packed data set."""


def batch_of(
    dataset: PackedDataset,
    sample: int,
    *,
    sp_rank: int = 0,
    sp: int = 1,
    chunk_tokens: int | None = None,
    cross_document_attention: bool = False,
    length: int | None = None,
    verify: bool = True,
) -> Batch:
    """The part of `sp_rank` of a sample, or of the sample's first `length` tokens; of each of its shards it reads
    `[start, stop + 1)` only.

    `chunk_tokens` as in Layout. With `verify`, also the rest of the slices at both ends, to check them. A document that
    `length` cuts keeps its first part, whose last token then predicts nothing. Raises ValueError if `sp` does not
    divide the length, or the length is not within the sample; DataError if what is read is not what was written.
    """
    seq_len = dataset.seq_len if length is None else length
    if not 0 < seq_len <= dataset.seq_len:
        raise ValueError(f"length {seq_len} is not within 1 and seq_len {dataset.seq_len}")
    shards = Layout(seq_len, sp, chunk_tokens).shards(sp_rank)
    known = dataset.sample(sample)
    boundaries = boundaries_within(known, length=seq_len)
    attended = boundaries[[0, -1]] if cross_document_attention else boundaries
    input_ids, labels = zip(
        *(_read(dataset, sample, shard, seq_len, boundaries=boundaries, verify=verify) for shard in shards), strict=True
    )
    n_tokens = int(boundaries[-1])
    return Batch(
        input_ids=_row(input_ids),
        labels=_row(labels),
        position_ids=_row([_position_ids(shard=shard, boundaries=attended) for shard in shards]),
        cu_seqlens=torch.from_numpy(attended.astype(np.int32)),
        n_tokens=n_tokens,
        n_valid=count_labels(clipped(known.loss_runs, start=0, stop=n_tokens), cu_seqlens=boundaries),
        seq_len=seq_len,
        sample=sample,
    )


def _read(
    dataset: PackedDataset, sample: int, shard: Shard, seq_len: int, *, boundaries: NDArray[np.int64], verify: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(input ids, labels) of a shard of the sample's first `seq_len` tokens, each int64 [shard.tokens]."""
    stop = min(shard.stop + 1, seq_len)
    tokens = dataset.read_tokens(sample, shard.start, stop, verify=verify).astype(np.int64)
    counts = mask_of_runs(dataset.sample(sample).loss_runs, start=shard.start, stop=stop)
    return tokens[: shard.tokens], _labels(tokens, counts=counts, shard=shard, boundaries=boundaries)


def _row(parts: Sequence[NDArray[np.int64]]) -> torch.Tensor:
    """Parts [n] -> int64 [1, sum of n]; of one part its own memory."""
    return torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts)).unsqueeze(0)


def boundaries_within(sample: PackedSample, *, length: int) -> NDArray[np.int64]:
    """The boundaries of the sample's first `length` tokens, int64 [documents + 1]."""
    last = min(sample.n_tokens, length)
    inside = sample.cu_seqlens[sample.cu_seqlens < last].astype(np.int64)
    return np.concatenate([inside, [last]])


def _labels(
    tokens: NDArray[np.int64], *, counts: NDArray[np.bool_], shard: Shard, boundaries: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Tokens of `[start, stop + 1)`, up to `stop` in the last shard, and which count -> labels of `[start, stop)`."""
    labels = np.full(shard.tokens, IGNORE_INDEX, np.int64)
    labels[: len(tokens) - 1] = np.where(counts, tokens, IGNORE_INDEX)[1:]
    last_tokens = boundaries[1:] - 1 - shard.start
    labels[last_tokens[(last_tokens >= 0) & (last_tokens < shard.tokens)]] = IGNORE_INDEX
    labels[max(0, int(boundaries[-1]) - shard.start) :] = IGNORE_INDEX
    return labels


def _position_ids(*, shard: Shard, boundaries: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions of `[start, stop)`, counted from the boundary before each; zeros from the last boundary on."""
    clipped = np.clip(boundaries, shard.start, shard.stop)
    starts = np.repeat(boundaries[:-1], np.diff(clipped))
    positions = np.zeros(shard.tokens, np.int64)
    positions[: len(starts)] = np.arange(shard.start, shard.start + len(starts)) - starts
    return positions
