"""The loss of a step by place: how far into its document a token stands, and how long that document is.

Out of the per-token losses of the tiled loss: no logits are kept, and nothing runs forward again. Each rank sums over
its own shard; the step's one reduction does the rest.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.batch import IGNORE_INDEX, Batch
from pipeline.metrics.buckets import bucket_edges, bucket_names
from pipeline.metrics.reduction import RankMetric, Reduction
from pipeline.parallel.mesh import Mesh
from pipeline.parallel.shard import Layout

BY_POSITION, BY_DOCUMENT_LENGTH = "loss_by_position", "loss_by_document_length"


@dataclass
class TokenLosses:
    """One step's, of this rank: what its forwards fill in, and the bucket of every token."""

    layout: Layout
    mesh: Mesh
    device: torch.device
    _parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """Of each micro-batch, [S/sp] each: losses, whether the label counts, bucket by position, bucket by length."""

    def buffer(self, batch: Batch, boundaries: NDArray[Any]) -> torch.Tensor:
        """What the forward of this micro-batch is to fill, float32 [S/sp]. `boundaries` are those of the sample's
        documents, whatever may attend to what."""
        edges = torch.tensor(bucket_edges(self.layout.seq_len), device=self.device)
        losses = torch.zeros(batch.labels.shape[1], dtype=torch.float32, device=self.device)
        positions = batch.position_ids[0].to(self.device)
        lengths = torch.from_numpy(self._document_lengths(boundaries)).to(self.device)
        counts = batch.labels[0].to(self.device) != IGNORE_INDEX
        by_position, by_length = (torch.bucketize(values, edges, right=True) for values in (positions, lengths))
        self._parts.append((losses, counts, by_position, by_length))
        return losses

    def metrics(self) -> list[RankMetric]:
        """Mean loss of every bucket, weighted by its tokens; waits for the device once."""
        buckets = len(bucket_edges(self.layout.seq_len)) + 1
        table = torch.zeros(2, 2, buckets, dtype=torch.float64, device=self.device)  # place, sum and count
        for losses, counts, *places in self._parts:
            for row, place in zip(table, places, strict=True):
                row[0].index_add_(0, place, losses.double())  # 0 where the label does not count
                row[1].index_add_(0, place, counts.double())
        names = [bucket_names(kind, self.layout.seq_len) for kind in (BY_POSITION, BY_DOCUMENT_LENGTH)]
        return [
            RankMetric(name, total / count if count else 0.0, Reduction.WEIGHTED_MEAN, weight=count)
            for kind, (totals, counts) in zip(names, table.tolist(), strict=True)
            for name, total, count in zip(kind, totals, counts, strict=True)
        ]

    def _document_lengths(self, boundaries: NDArray[Any]) -> NDArray[np.int64]:
        """Of the document that each of this rank's tokens is in, int64 [S/sp]; 0 in the padding."""
        lengths = np.zeros(self.layout.local_seq_len, np.int64)
        for shard, place in zip(self.layout.shards(self.mesh.sp_rank), self.layout.local, strict=True):
            inside = np.diff(np.clip(boundaries, shard.start, shard.stop))
            repeated = np.repeat(np.diff(boundaries).astype(np.int64), inside)
            lengths[place][: len(repeated)] = repeated
        return lengths


def by_first_token(metrics: dict[str, float | None], kind: str) -> dict[str, float | None]:
    """The buckets of a kind, by the digits of their first token."""
    return {name.removeprefix(f"{kind}/"): value for name, value in metrics.items() if name.startswith(f"{kind}/")}
