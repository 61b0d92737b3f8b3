"""Host memory and a GPU: copies on streams of their own bring back what was sent, while the GPU computes."""

import time
from pathlib import Path

import pytest
import torch

from pipeline.memory.disk import Disk
from pipeline.memory.fp8 import Fp8Store, narrowed, widened
from pipeline.memory.host_arena import HostArena, host_block
from pipeline.memory.offload import DeviceStore, HostStore
from pipeline.parallel.waits import take_waits

MIB = 1 << 20


def tensor_of(number: int, size: int = 4 * MIB) -> torch.Tensor:
    return torch.full((size,), float(number), dtype=torch.bfloat16, device="cuda")


def disk_in(folder: Path, staging_bytes: int = 24 * MIB) -> Disk:
    return Disk(folder, capacity_bytes=0, staging_bytes=staging_bytes, pinned=True, checksums=True)


def busy(seconds: float = 0.2) -> None:
    """The compute stream has something to do for about so long."""
    torch.cuda._sleep(int(seconds * 1e9))


@pytest.mark.parametrize("resident_tensors", [0, 3, 100])
@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("every", [0, 1, 2], ids=["host", "disk", "both"])
def test_nothing_is_read_before_it_is_written_or_overwritten_before_it_is_read(
    tmp_path, resident_tensors, ahead, every
):
    """Memory of tensors that leave is freed and used again at once, and the host memory by the next micro-batch."""
    disk = disk_in(tmp_path) if every else None
    store = HostStore(
        resident_tensors=resident_tensors, ahead=ahead, disk=disk, is_on_disk=lambda position: position % every == 0
    )
    for round_ in range(3):
        handles = []
        for number in range(12):
            busy(0.01)
            tensor = tensor_of(number + 100 * round_)
            handles.append(store.put(tensor))
            del tensor
            tensor_of(-1)  # takes the memory that was given back
        for number in reversed(range(12)):
            found = store.get(handles.pop())
            busy(0.01)
            assert (found == number + 100 * round_).all().item()
            del found
            tensor_of(-2)
    assert store.held_bytes == 0


def test_a_copy_to_the_host_does_not_wait_for_the_host():
    """`put` returns while the GPU is still busy with what comes before."""
    store = HostStore()
    store.get(store.put(tensor_of(0)))  # streams and memory are there now
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    busy()
    store.put(tensor_of(1))
    done.record()
    assert not done.query()


def test_pinned_blocks_have_the_bytes_that_were_asked_for():
    arena = HostArena(capacity_bytes=33 * MIB, pinned=True)
    assert arena.reserved_bytes == 33 * MIB
    _, piece = arena.take(torch.empty(MIB, dtype=torch.uint8))
    assert piece.is_pinned()


def test_a_store_that_is_dropped_gives_its_pinned_memory_back():
    """Also with copies on their way. What lies in the same place then is not pinned, and may be pinned again."""
    places = set()
    for _ in range(20):
        store = HostStore(capacity_bytes=64 * MIB)
        handle = store.put(tensor_of(1, 16 * MIB))
        assert handle.waiting.is_pinned()
        places.add(handle.waiting.data_ptr())
        del store, handle
        plain = host_block(64 * MIB, pinned=False)
        assert not plain.is_pinned()
        places.add(plain.data_ptr())
        del plain
    assert len(places) < 40, "no place was used twice, and so nothing was seen"


def test_the_device_holds_no_more_than_what_is_on_its_way():
    store, size = HostStore(ahead=1), 64 * MIB
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    handles = [store.put(tensor_of(number, size // 2)) for number in range(16)]
    while handles:
        store.get(handles.pop())
    assert torch.cuda.max_memory_allocated() - before <= 5 * size


def test_eight_bits_are_the_same_on_a_gpu():
    tensor = torch.randn(5000, 128, dtype=torch.bfloat16, device="cuda")
    store = Fp8Store(HostStore())
    expected = widened(narrowed(tensor.cpu()), torch.bfloat16)
    assert torch.equal(store.get(store.put(tensor)).cpu(), expected)


STALL = 0.15
"""Of a step, at most, that copies may cost where the computation lasts four times as long as they do."""


@pytest.mark.parametrize("where", ["host", "fp8"])
def test_copies_hide_behind_the_computation(where, record_property):
    """The stall of a step: what it lasts longer than one whose tensors stay."""
    layers, size = 16, 128 * MIB
    copies = layers * 2 * size / 20e9  # a pinned PCIe link of the fourth generation
    host = HostStore(capacity_bytes=layers * size)
    store = Fp8Store(host) if where == "fp8" else host
    step_seconds(store, layers, size, computing=4 * copies)  # pins
    stays, moved = (step_seconds(one, layers, size, computing=4 * copies) for one in (DeviceStore(), store))
    record_property("stall_seconds", moved - stays)
    print(f"offload stall of a step: {moved - stays:.3f} s of {stays:.3f} s")
    assert moved - stays < STALL * stays


@pytest.mark.parametrize("every", [1, 2], ids=["disk", "host and disk"])
def test_writes_and_reads_of_a_disk_hide_behind_the_computation(tmp_path, every, record_property):
    """However fast the disk is: the computation lasts four times as long as what is moved does alone.

    It has as much memory to pass through as the plan gives it, two tensors. What a step tells of its wait is held to
    the same bound as what it lasts longer.
    """
    layers, size = 16, 32 * MIB
    disk = Disk(tmp_path, capacity_bytes=layers * size, staging_bytes=2 * size, pinned=True)
    store = HostStore(
        capacity_bytes=layers * size, disk=disk, is_on_disk=lambda position: position % every == 0, ahead=1
    )
    step_seconds(store, layers, size, computing=0.0)  # pins
    take_waits()
    alone = step_seconds(store, layers, size, computing=0.0)
    assert take_waits()["offload_stall"] > 0.2 * alone
    stays = step_seconds(DeviceStore(), layers, size, computing=4 * alone)
    moved = step_seconds(store, layers, size, computing=4 * alone)
    told = take_waits()["offload_stall"]
    rate = 2 * disk.peak_bytes / alone / 1e9
    record_property("stall_seconds", moved - stays)
    record_property("offload_stall_seconds", told)
    print(f"offload stall of a step: {moved - stays:.3f} s of {stays:.3f} s, {told:.3f} s told; disk {rate:.2f} GB/s")
    assert moved - stays < STALL * stays
    assert told < STALL * stays


def step_seconds(store, layers: int, size: int, *, computing: float) -> float:
    """Of a forward that puts a tensor of `size` bytes after each layer and a backward that gets them again."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    handles = []
    for number in range(layers):
        busy(computing / layers / 2)
        handles.append(store.put(tensor_of(number, size // 2)))
    while handles:
        store.get(handles.pop())
        busy(computing / layers / 2)
    torch.cuda.synchronize()
    return time.perf_counter() - began
