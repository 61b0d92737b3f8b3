"""The stores: what was put comes back, memory is used again, and bytes are counted where they are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import RunError
from pipeline.memory.host_arena import HostArena
from pipeline.memory.offload import DeviceStore, HostStore
from pipeline.plan.host_memory import ARENA_ALIGNMENT as ALIGNMENT


def numbered(number: int, size: int = 100) -> torch.Tensor:
    return torch.full((size,), float(number))


@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=12),
    resident_tensors=st.sampled_from([0, 1, 3, 100]),
    ahead=st.integers(0, 3),
    capacity_bytes=st.sampled_from([0, 10_000]),
)
@settings(max_examples=60, deadline=None)
def test_what_was_put_comes_back_in_the_opposite_order(sizes, resident_tensors, ahead, capacity_bytes):
    store = HostStore(capacity_bytes=capacity_bytes, resident_tensors=resident_tensors, ahead=ahead)
    for _ in range(2):  # micro-batches: the second uses the memory of the first
        tensors = [numbered(number, size) for number, size in enumerate(sizes)]
        handles = [store.put(tensor.clone()) for tensor in tensors]
        waiting = store.held_bytes
        assert waiting == sum(tensor.nbytes for tensor in tensors[: max(0, len(tensors) - resident_tensors)])
        while handles:
            assert torch.equal(store.get(handles.pop()), tensors.pop())
        assert store.held_bytes == 0
        assert store.peak_bytes == waiting


def test_the_order_of_giving_back_does_not_matter():
    store = HostStore(ahead=2)
    handles = [store.put(numbered(number)) for number in range(6)]
    for number in (5, 3, 4, 0, 2, 1):
        assert torch.equal(store.get(handles[number]), numbered(number))


def test_memory_is_used_again_from_the_top_down():
    arena = HostArena(capacity_bytes=4 * ALIGNMENT, pinned=False)
    tensor = torch.zeros(ALIGNMENT, dtype=torch.uint8)
    pieces = [arena.take(tensor) for _ in range(4)]
    assert len({piece.data_ptr() for _, piece in pieces}) == 4
    arena.give_back(pieces[2][0])
    arena.give_back(pieces[3][0])
    assert [arena.take(tensor)[1].data_ptr() for _ in range(2)] == [piece.data_ptr() for _, piece in pieces[2:]]
    assert arena.reserved_bytes == 4 * ALIGNMENT


def test_a_tensor_that_does_not_fit_makes_the_arena_grow_and_changes_no_other():
    arena = HostArena(capacity_bytes=ALIGNMENT, pinned=False)
    _, small = arena.take(torch.zeros(10))
    small.fill_(1)
    _, large = arena.take(torch.zeros(100_000))
    large.fill_(2)
    assert (small == 1).all()


def test_more_host_memory_than_there_is_is_refused_with_both_numbers():
    with pytest.raises(RunError, match=r"needs 1048576.0 GiB of host memory .* and \d+\.\d GiB are left; raise"):
        HostStore(capacity_bytes=1 << 50).put(torch.zeros(1))


@pytest.mark.parametrize("store", [DeviceStore(), HostStore(resident_tensors=1)])
def test_a_tensor_that_stays_where_it_is_and_is_changed_is_an_error(store):
    tensor = torch.zeros(3)
    handle = store.put(tensor)
    tensor.add_(1)
    with pytest.raises(RunError, match="in place; this model is not supported"):
        store.get(handle)
