"""Activation checkpointing: what waits for backward, what runs again, and what does not."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.attention.function import NAME as ALST_ATTENTION
from pipeline.attention.function import AttentionContext, register
from pipeline.attention.kernels.cpu import CpuKernel
from pipeline.attention.segments import segments_of
from pipeline.attention.tape import AttentionTape
from pipeline.errors import RunError
from pipeline.memory import activation_checkpoint, tiled_loss
from pipeline.memory.offload import DeviceStore, HostStore
from pipeline.model.anatomy import decoder_layers
from pipeline.model.parity import BOUNDS, build_tiny, sample
from pipeline.parallel.mesh import Mesh
from tests.architectures import ARCHITECTURES

LAYERS, TOKENS = 5, BOUNDS[-1]


class CountingKernel(CpuKernel):
    def __init__(self) -> None:
        self.forwards = 0

    def forward(self, *args):
        self.forwards += 1
        return super().forward(*args)


@dataclass
class Run:
    """What one forward and backward of a Llama of five layers did."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]
    kernel_forwards: int
    layer_forwards: int
    held_bytes: int
    """By the store between forward and backward"""
    left_bytes: int
    """After backward"""


def llama(**overrides) -> PreTrainedModel:
    config = ARCHITECTURES["llama"] | {"num_hidden_layers": LAYERS} | overrides
    register()
    return build_tiny(config.pop("model_type"), config, attention=ALST_ATTENTION)


def run(*, store=None, attached: bool = True, **settings) -> Run:
    model, kernel, store, layer_forwards = llama(), CountingKernel(), store or HostStore(), [0]
    if attached:
        activation_checkpoint.attach(model, store=store, **settings)
    tiled_loss.attach(model, tile_tokens=10)
    for layer in decoder_layers(model):
        layer.mlp.register_forward_pre_hook(lambda *_: layer_forwards.__setitem__(0, layer_forwards[0] + 1))
    loss = forward(model, kernel)
    held = counted(store).held_bytes
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Run(loss.detach(), gradients, kernel.forwards, layer_forwards[0], held, counted(store).held_bytes)


def counted(store) -> HostStore | DeviceStore:
    """The store that counts bytes, which may be inside another."""
    return getattr(store, "store", store)


def forward(model: PreTrainedModel, kernel: CpuKernel) -> torch.Tensor:
    segments = segments_of(torch.tensor(BOUNDS, dtype=torch.int32), device=torch.device("cpu"))
    context = AttentionContext(segments, Mesh(rank=0, world_size=1, sp=1, sp_group=None), kernel)
    return model(**sample(model.config.vocab_size), attention_context=context)


@pytest.mark.parametrize("store", [HostStore, DeviceStore])
@pytest.mark.parametrize("keep_attention", [False, True])
@pytest.mark.parametrize("layers_per_group", [1, 2, 3, LAYERS, LAYERS + 1])
def test_what_waits_and_what_runs_again(store, keep_attention, layers_per_group):
    plain = run(attached=False)
    found = run(store=store(), keep_attention=keep_attention, layers_per_group=layers_per_group)
    assert torch.equal(found.loss, plain.loss)
    for name, grad in found.gradients.items():
        torch.testing.assert_close(grad, plain.gradients[name], rtol=1e-12, atol=1e-14, msg=name)

    groups = -(-LAYERS // layers_per_group)
    assert found.layer_forwards == 3 * LAYERS - groups
    assert found.kernel_forwards == (LAYERS if keep_attention else 2 * LAYERS)
    config = llama().config
    kept = LAYERS * TOKENS * 8 * config.num_attention_heads * (config.head_dim + 1) if keep_attention else 0
    assert found.held_bytes == (groups * TOKENS * config.hidden_size * 8 + kept if store is HostStore else 0)
    assert found.left_bytes == 0


def test_a_forward_that_was_given_up_leaves_nothing_for_the_next_one():
    model, kernel = llama(), CountingKernel()
    activation_checkpoint.attach(model, store=HostStore(), layers_per_group=3)
    tiled_loss.attach(model, tile_tokens=10)
    fails = decoder_layers(model)[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        forward(model, kernel)
    fails.remove()
    forward(model, kernel).backward()
    plain = run(attached=False)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.gradients[name], rtol=1e-12, atol=1e-14, msg=name)


class Doubling(nn.Module):
    """A layer and something between it and the next one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: torch.Tensor, **others) -> torch.Tensor:
        return 2 * self.layer(hidden_states, **others)


def test_a_model_that_changes_hidden_states_between_its_layers_is_not_grouped():
    model = llama()
    activation_checkpoint.attach(model, store=HostStore(), layers_per_group=2)
    tiled_loss.attach(model, tile_tokens=10)
    model.model.layers[0] = Doubling(model.model.layers[0])
    with pytest.raises(RunError, match=r"changes hidden states between its layers.*layers_per_group: 1"):
        forward(model, CpuKernel())


def test_a_tape_plays_what_is_on_it_and_records_what_is_not():
    first, second = (torch.zeros(1), torch.zeros(1)), (torch.ones(1), torch.ones(1))
    tape = AttentionTape([first])
    assert tape.play_or_record(lambda: second) is first
    assert tape.play_or_record(lambda: second) is second
    tape.rewind()
    assert [tape.play_or_record(list), tape.play_or_record(list)] == [first, second]
    tape.rewind(for_last_run=True)
    assert [tape.play_or_record(list), tape.play_or_record(list)] == [first, second]
    assert tape.play_or_record(lambda: first) is first
    assert tape.outputs == []
