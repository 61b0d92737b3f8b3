"""What the attention kernel gave in one run of a layer, so that another run of it need not ask the kernel again.

A layer whose activations are made again in backward runs twice with the same queries, keys and values. Attention is
most of its time, and its backward needs only out and lse of the forward besides them (DistFlashAttention's
rematerialization-aware checkpointing, arXiv 2310.03294 §3.3).
"""

from collections.abc import Callable

import torch

Output = tuple[torch.Tensor, torch.Tensor]
"""out [S, H, E] and lse [H, S] of one call of the kernel"""


class AttentionTape:
    """Outputs of a layer's attention calls, in order: those on it are played, those beyond its end are recorded."""

    def __init__(self, outputs: list[Output] | None = None) -> None:
        self.outputs: list[Output] = [] if outputs is None else outputs
        self._position = 0

    def rewind(self) -> None:
        """To be called before each run of the layer."""
        self._position = 0

    def play_or_record(self, call: Callable[[], Output]) -> Output:
        """The next output of the tape; at its end that of `call`, which is then on it."""
        if self._position == len(self.outputs):
            self.outputs.append(call())
        self._position += 1
        return self.outputs[self._position - 1]
