"""Who may see whom: the documents of a sample, as cumulative boundaries. Never a mask."""

from dataclasses import dataclass
from itertools import pairwise

import torch


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

    @property
    def num_tokens(self) -> int:
        return self.bounds[-1]

    def documents(self) -> list[tuple[int, int]]:
        """`[start, stop)` of each document."""
        return list(pairwise(self.bounds))


def segments_of(cu_seqlens: torch.Tensor, *, device: torch.device) -> Segments:
    """From the host's int32 [num_documents + 1] boundaries `[0, …, n_tokens]`."""
    bounds = tuple(int(bound) for bound in cu_seqlens.tolist())
    lengths = [stop - start for start, stop in pairwise(bounds)]
    return Segments(cu_seqlens=cu_seqlens.to(device), bounds=bounds, max_len=max(lengths, default=0))
