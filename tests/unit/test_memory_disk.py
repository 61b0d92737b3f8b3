"""What waits on disk comes back as it went, or the step ends with an error that says what to do."""

import errno
import fcntl
import os
import resource
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.attention.kernels.cpu import CpuKernel
from pipeline.direct_io import PAGE, page_memory, write_at
from pipeline.errors import RunError
from pipeline.memory import activation_checkpoint, tiled_loss
from pipeline.memory.disk import PART_BYTES, Disk, check_is_disk
from pipeline.memory.offload import HostStore
from tests.unit.test_memory_checkpoint import forward, llama


def on_disk(folder: Path, *, capacity_bytes: int = 0, staging_bytes: int = 1 << 20, checksums: bool = False) -> Disk:
    return Disk(folder, capacity_bytes=capacity_bytes, staging_bytes=staging_bytes, pinned=False, checksums=checksums)


def store_of(disk: Disk, **settings) -> HostStore:
    return HostStore(disk=disk, is_on_disk=lambda position: True, **settings)


def numbered(number: int, size: int = 1000) -> torch.Tensor:
    return torch.arange(size, dtype=torch.float32) + 1000 * number


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The kernel refuses writes beyond it, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@given(
    sizes=st.lists(st.integers(0, 5000), min_size=1, max_size=12),
    every=st.integers(1, 3),
    ahead=st.integers(0, 3),
    resident_tensors=st.sampled_from([0, 2]),
    staging_bytes=st.sampled_from([0, PAGE, 1 << 20]),
    in_order=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_what_was_put_comes_back(tmp_path_factory, sizes, every, ahead, resident_tensors, staging_bytes, in_order):
    disk = on_disk(tmp_path_factory.mktemp("disk"), staging_bytes=staging_bytes, checksums=True)
    store = HostStore(
        disk=disk, is_on_disk=lambda position: position % every == 0, ahead=ahead, resident_tensors=resident_tensors
    )
    for round_ in range(2):
        tensors = [numbered(number + 7 * round_, size) for number, size in enumerate(sizes)]
        handles = [store.put(tensor.clone()) for tensor in tensors]
        sent = tensors[: max(0, len(tensors) - resident_tensors)]
        assert disk.held_bytes == sum(tensor.nbytes for tensor in sent[::every])
        assert store.held_bytes == sum(tensor.nbytes for tensor in sent) - disk.held_bytes
        for _ in range(len(handles)):
            which = 0 if in_order else -1
            assert torch.equal(store.get(handles.pop(which)), tensors.pop(which))
        assert (store.held_bytes, disk.held_bytes) == (0, 0)


def test_a_tensor_of_many_parts_and_another_shape_and_dtype_comes_back(tmp_path):
    tensor = torch.randn(3, 1 + PART_BYTES // 4, dtype=torch.bfloat16)
    store = store_of(on_disk(tmp_path, checksums=True))
    assert torch.equal(store.get(store.put(tensor.clone())), tensor)


def test_the_file_is_as_large_as_planned_from_the_start_and_has_no_name(tmp_path):
    disk = on_disk(tmp_path, capacity_bytes=100 * PAGE)
    assert list(tmp_path.iterdir()) == []
    assert os.fstat(disk._descriptor).st_size == 100 * PAGE
    store = store_of(disk)
    handles = [store.put(numbered(number, PAGE // 4)) for number in range(100)]
    for _ in range(2):  # the second micro-batch finds the room of the first
        for number in reversed(range(100)):
            assert torch.equal(store.get(handles[number]), numbered(number, PAGE // 4))
        handles = [store.put(numbered(number, PAGE // 4)) for number in range(100)]
    assert os.fstat(disk._descriptor).st_size == 100 * PAGE
    assert disk.peak_bytes == 100 * PAGE


def test_what_passes_through_host_memory_is_bounded(tmp_path):
    disk = on_disk(tmp_path, staging_bytes=3 * PAGE)
    store = store_of(disk, ahead=8)
    handles = [store.put(numbered(number, PAGE // 4)) for number in range(50)]
    while handles:
        store.get(handles.pop())
    assert sum(slot.memory.nbytes for slot in disk._slots) == 3 * PAGE


@pytest.mark.parametrize("capacity_bytes", [1 << 50, 2 << 20])
def test_a_disk_that_is_too_small_is_refused_before_training_with_both_numbers(tmp_path, capacity_bytes):
    size = f"{capacity_bytes / 2**30:.1f}"
    told = rf"{tmp_path}: cannot make room for {size} GiB on this rank \(.*; [\d.]+ GiB are free\); make"
    with files_of_at_most(1 << 20), pytest.raises(RunError, match=told):
        on_disk(tmp_path, capacity_bytes=capacity_bytes)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"file/scratch: cannot make room .*Not a directory; it cannot be looked at"):
        on_disk(tmp_path / "file" / "scratch")


def test_a_folder_that_lies_in_memory_is_no_disk(tmp_path, monkeypatch):
    with pytest.raises(RunError, match=r"^/dev/shm/x: lies in memory \(tmpfs\), and must be on a disk; set hardware"):
        check_is_disk(Path("/dev/shm/x"))
    (tmp_path / "mounts").write_text(f"none / tmpfs rw 0 0\n/dev/nvme0 {tmp_path} ext4 rw 0 0\n")
    monkeypatch.setattr("pipeline.memory.disk.MOUNTS", tmp_path / "mounts")
    check_is_disk(tmp_path / "scratch")


@pytest.mark.parametrize("staging_bytes", [0, PAGE, 1 << 20])
def test_a_disk_that_fills_up_ends_the_step_and_gives_no_wrong_tensor(tmp_path, staging_bytes):
    store, number = store_of(on_disk(tmp_path, staging_bytes=staging_bytes)), 40
    told = r"cannot write layer inputs \(File too large; [\d.]+ GiB are free\); make room there, set hardware.scratch"
    with files_of_at_most(20 * PAGE), pytest.raises(RunError, match=told):
        handles = [store.put(numbered(number, PAGE // 4)) for number in range(number)]
        while handles:
            number -= 1
            assert torch.equal(store.get(handles.pop()), numbered(number, PAGE // 4))


def test_a_file_that_loses_its_end_is_an_error(tmp_path):
    disk = on_disk(tmp_path)
    store = store_of(disk)
    handle = store.put(numbered(0))
    disk._finish_oldest()
    os.ftruncate(disk._descriptor, 0)
    with pytest.raises(RunError, match=r"cannot read layer inputs back \(the file ends before what was written to it"):
        store.get(handle)


def test_bytes_that_changed_on_disk_are_seen_with_checksums(tmp_path):
    disk = on_disk(tmp_path, checksums=True)
    store = store_of(disk)
    handle = store.put(numbered(0))
    disk._finish_oldest()
    write_at(disk._descriptor, memoryview(page_memory(PAGE)), 0, tmp_path)
    with pytest.raises(RunError, match=r"is not what was written \(checksum .* exclude this node"):
        store.get(handle)


def test_a_disk_slower_than_the_plan_counts_on_is_refused_with_both_rates(tmp_path):
    disk = on_disk(tmp_path, capacity_bytes=1 << 20)
    disk.check_rate(1.0)
    with pytest.raises(RunError, match=r"[\d.]+ GB/s were seen on this rank, and it must be 1000000.00 GB/s, half of"):
        disk.check_rate(1e15)
    assert disk.held_bytes == 0


@pytest.mark.parametrize("where", ["open", "pwrite", "preadv"])
def test_without_direct_io_it_goes_through_the_page_cache_with_one_warning(tmp_path, monkeypatch, where):
    call = getattr(os, where)

    def refusing(first, second, *rest, **named):
        asked = second if where == "open" else fcntl.fcntl(first, fcntl.F_GETFL)
        if asked & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return call(first, second, *rest, **named)

    monkeypatch.setattr(os, where, refusing)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        store = store_of(on_disk(tmp_path))
        handles = [store.put(numbered(number)) for number in range(5)]
        for number in reversed(range(5)):
            assert torch.equal(store.get(handles[number]), numbered(number))
    assert [str(warning.message).partition("; ")[0] for warning in caught] == [
        f"the file system of {tmp_path} has no direct I/O"
    ]


def test_a_tensor_that_is_changed_while_it_stays_is_an_error_and_not_written(tmp_path):
    store = store_of(on_disk(tmp_path), resident_tensors=1)
    tensor = numbered(0)
    store.put(tensor)
    tensor.add_(1)
    with pytest.raises(RunError, match="in place"):
        store.put(numbered(1))


def test_a_disk_that_fails_between_forward_and_backward_ends_the_step_without_a_gradient_of_what_it_held(tmp_path):
    model, disk = llama(), on_disk(tmp_path)
    activation_checkpoint.attach(model, store=store_of(disk), keep_attention=True)
    tiled_loss.attach(model, tile_tokens=10)
    loss = forward(model, CpuKernel())
    while disk._writing:
        disk._finish_oldest()
    os.ftruncate(disk._descriptor, 0)
    with pytest.raises(RunError, match="cannot read layer inputs back"):
        loss.backward()
    assert all(parameter.grad is None for parameter in model.model.layers.parameters())
