"""Offload in eight bits: what is rounded, by how much, and what that does to gradients, as docs/memory.md states it."""

import pytest
import torch

from pipeline.errors import RecipeError
from pipeline.memory.disk import Disk
from pipeline.memory.fp8 import Fp8Store, narrowed, widened
from pipeline.memory.offload import HostStore
from pipeline.recipe.load import load
from tests.unit.test_memory_checkpoint import run

OF_ALL, OF_ONE = 0.06, 0.2
"""Relative errors of gradients: of all together, and of the worst tensor. Seen: 0.050 and 0.155."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_an_element_is_off_by_a_sixteenth_of_itself_or_a_speck_of_its_rows_largest(dtype, size):
    tensor = (torch.randn(2, 5000, 33) * size).to(dtype)
    tensor[0, 0] = 0
    back = widened(narrowed(tensor), dtype).view(tensor.shape)
    assert back.dtype == dtype
    difference, largest = (back - tensor).float().abs(), tensor.float().abs().amax(-1, keepdim=True)
    assert (difference <= tensor.float().abs() * (2**-4 + 2**-7) + largest * 2**-18).all()
    assert not back[0, 0].any()


def test_the_bytes_are_one_an_element_and_four_a_row():
    store = HostStore()
    Fp8Store(store).put(torch.zeros(1, 100, 64, dtype=torch.bfloat16))
    assert store.held_bytes == 100 * (64 + 4)


def test_what_is_put_as_exact_comes_back_to_the_bit(tmp_path):
    disk = Disk(tmp_path, capacity_bytes=0, staging_bytes=1 << 20, pinned=False, checksums=True)
    store = Fp8Store(HostStore(disk=disk, is_on_disk=lambda position: True))
    tensor = torch.randn(7, 5)
    exact, rounded = store.put(tensor, exact=True), store.put(tensor)
    assert torch.equal(store.get(rounded), widened(narrowed(tensor), torch.float32))
    assert torch.equal(store.get(exact), tensor)


@pytest.mark.parametrize("keep_attention", [False, True])
@pytest.mark.parametrize("layers_per_group", [1, 2, 5])
def test_gradients_are_off_by_no_more_than_is_stated_and_the_loss_by_nothing(keep_attention, layers_per_group):
    plain = run(attached=False)
    found = run(store=Fp8Store(HostStore()), keep_attention=keep_attention, layers_per_group=layers_per_group)
    assert torch.equal(found.loss, plain.loss)
    errors, norms = {}, {}
    for name, grad in plain.gradients.items():
        errors[name], norms[name] = float((found.gradients[name] - grad).norm()), float(grad.norm())
        assert errors[name] <= OF_ONE * norms[name], name
    both = [torch.tensor(list(values.values())).norm() for values in (errors, norms)]
    assert 1e-3 < both[0] / both[1] < OF_ALL


def test_without_offload_it_is_refused():
    with pytest.raises(
        RecipeError, match="offload_dtype fp8 needs offload cpu, disk or auto, not null; set offload_dtype"
    ):
        load("tiny", overrides=["memory.activation_checkpoint={offload: null, offload_dtype: fp8}"])
