"""A sign of life of a rank: every layer of the model moves it on, forward and backward."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.model.anatomy import decoder_layers


@dataclass
class Heartbeat:
    """How far this rank is. Moved on by the main thread, read by the watchdog's: one attribute at a time."""

    beats: int = 0
    step: int = 0
    """Under way, counted from 1."""
    where: str = "start"
    at: float = 0.0
    """Of the last sign of life, by the monotonic clock."""

    def beat(self, where: str) -> None:
        self.where = where
        self.alive()
        self.beats += 1

    def alive(self) -> None:
        """A sign of life that gets this rank no further."""
        self.at = time.monotonic()

    def attach(self, model: PreTrainedModel) -> None:
        """A beat before each layer's forward, also when it runs again for backward, and one at its gradient."""
        for number, layer in enumerate(decoder_layers(model)):
            layer.register_forward_pre_hook(self._forward(f"layer {number}"))
            layer.register_forward_hook(self._backward(f"backward of layer {number}"))

    def _forward(self, where: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.beat(where)

        return hook

    def _backward(self, where: str) -> Callable[..., None]:
        def at_gradient(_: torch.Tensor) -> None:
            self.beat(where)

        def hook(module: Any, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, torch.Tensor) and hidden.requires_grad:
                hidden.register_hook(at_gradient)

        return hook
