"""What this machine lacks of the memory and disk that a plan counts on is refused when features are attached, by the
one call that a job makes; what each check says is tested beside it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.errors import RunError
from pipeline.memory import apply, disk, host_arena
from pipeline.memory.apply import Attached, attach
from pipeline.memory.disk import Disk
from pipeline.plan.job import JobPlan, plan_job
from pipeline.plan.offload import offload_of
from pipeline.recipe.load import load
from tests.unit.test_memory_features import llama

CHECKPOINT = "memory.activation_checkpoint"
ON_DISK = f"{CHECKPOINT}={{offload: disk, disk_groups: 1, resident_groups: 0}}"
GIB = 1 << 30


def planned(*overrides: str) -> JobPlan:
    """A layer's inputs are 32 MiB on each of two ranks, of two layers."""
    return plan_job(load("tiny", overrides=["data.seq_len=262144", *overrides]))


def attached(plan: JobPlan, *, pinned: bool = False) -> Attached:
    tiles = {f"{name}_tile_tokens": getattr(plan, f"{name}_tile_tokens") for name in ("norm", "mlp", "loss")}
    return attach(llama(), plan.recipe.memory, **tiles, offload=offload_of(plan), pinned=pinned)


@pytest.fixture
def machine_of(tmp_path, monkeypatch):
    def make(*, mib: int, left_mib: int) -> None:
        (tmp_path / "meminfo").write_text(f"MemTotal: {mib << 10} kB\nMemAvailable: {left_mib << 10} kB\n")
        (tmp_path / "membership").write_text("")
        monkeypatch.setattr(host_arena, "MEMINFO", tmp_path / "meminfo")
        monkeypatch.setattr(host_arena, "MEMBERSHIP", tmp_path / "membership")

    return make


def test_with_enough_of_all_nothing_is_refused(tmp_path):
    store = attached(planned(ON_DISK, f"hardware.scratch={tmp_path}")).store
    assert store.reserved_bytes == offload_of(planned(ON_DISK)).arena_bytes
    assert store.disk is not None


def test_host_memory_too_small_for_all_ranks_of_a_node_is_refused(machine_of):
    machine_of(mib=96, left_mib=96)  # a rank alone would find its 64
    with pytest.raises(RunError, match=r"offload needs 0.1 GiB of host memory on this node, which has 0.1 GiB"):
        attached(planned())


def test_host_memory_that_others_have_taken_is_refused(machine_of):
    machine_of(mib=1024, left_mib=48)
    with pytest.raises(RunError, match=r"offload needs 0.1 GiB of host memory on this rank, and 0.0 GiB are left"):
        attached(planned())


def test_memory_that_may_not_be_locked_is_refused(monkeypatch):
    """As CUDA refuses it: with an error's number."""
    asked = []

    def refuse(address: int, size: int, flags: int) -> int:
        asked.append(size)
        return 2

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=refuse))
    monkeypatch.setattr(apply, "HostStore", _on_a_cpu(apply.HostStore))
    told = (
        r"0.1 GiB of host memory cannot be pinned \(cudaHostRegister: 2\); the limit of locked memory is .*: raise it"
    )
    with pytest.raises(RunError, match=told):
        attached(planned(), pinned=True)
    assert asked == [offload_of(planned()).arena_bytes]


def _on_a_cpu(store_type: type) -> type:
    """A store whose memory is pinned and whose copies need no CUDA."""

    class OnCpu(store_type):
        def reserve(self, *, pinned: bool) -> None:
            self._arena = host_arena.HostArena(capacity_bytes=self._capacity_bytes, pinned=pinned)

    return OnCpu


def test_a_disk_too_small_for_what_is_planned_is_refused(tmp_path, monkeypatch):
    plan = planned(ON_DISK, f"hardware.scratch={tmp_path}")
    monkeypatch.setattr(disk, "_free_bytes", lambda folder: offload_of(plan).disk_bytes - 1)
    with pytest.raises(RunError, match=rf"{tmp_path}: cannot make room for 0.0 GiB on this rank .*0.0 GiB are free"):
        attached(plan)


def test_with_a_gpu_a_folder_in_memory_is_refused():
    with pytest.raises(RunError, match=r"/dev/shm: lies in memory \(tmpfs\), and must be on a disk"):
        attached(planned(ON_DISK, "hardware.scratch=/dev/shm"), pinned=True)


def test_with_a_gpu_a_disk_that_is_slower_than_half_of_what_is_planned_is_refused(tmp_path, monkeypatch):
    def unpinned(folder: Path, **settings) -> Disk:
        return Disk(folder, **settings | {"pinned": False})

    monkeypatch.setattr(apply, "Disk", unpinned)
    rate = "hardware.scratch_gigabytes_per_second=40000"
    told = r"GB/s were seen on this rank, and it must be 10000.00 GB/s, half of what the plan counts on"
    with pytest.raises(RunError, match=told):
        attached(planned(ON_DISK, f"hardware.scratch={tmp_path}", rate), pinned=True)
