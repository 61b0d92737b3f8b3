"""What the attention kernel gave in one run of a layer, so that another run of it need not ask the kernel again.

A layer whose activations are made again in backward runs twice with the same queries, keys and values. Attention is
most of its time, and its backward needs only out and lse of the forward besides them (DistFlashAttention's
rematerialization-aware checkpointing, arXiv 2310.03294 §3.3).
"""

from collections.abc import Callable, Sequence

import torch

Output = tuple[torch.Tensor, torch.Tensor]
"""out [S, H, E] and lse [H, S] of one call of the kernel"""


class AttentionTape:
    """Outputs of a layer's attention calls, in order: those on it are played, those beyond its end are recorded."""

    def __init__(self, outputs: Sequence[Output] = ()) -> None:
        self._outputs: list[Output | None] = list(outputs)
        self._position = 0
        self._keep = True

    @property
    def outputs(self) -> list[Output]:
        """Those that are on it still."""
        return [output for output in self._outputs if output is not None]

    def rewind(self, *, for_last_run: bool = False) -> None:
        """To be called before each run of the layer. In the last one outputs leave the tape, and none is recorded."""
        self._position = 0
        self._keep = not for_last_run

    def play_or_record(self, call: Callable[[], Output]) -> Output:
        """The next output of the tape; at its end that of `call`, which is then on it."""
        position, self._position = self._position, self._position + 1
        found = self._outputs[position] if position < len(self._outputs) else None
        if found is None:
            found = call()
            if self._keep:
                self._outputs.append(found)
        elif not self._keep:
            self._outputs[position] = None
        return found
