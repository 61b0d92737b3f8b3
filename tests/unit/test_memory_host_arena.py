"""How much host memory a process may take: the machine's, or what its control groups leave; told before training."""

import resource
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from pipeline.errors import RunError
from pipeline.memory import host_arena
from pipeline.memory.host_arena import HostArena, available_bytes, check_node, host_block

GIB = 1 << 30
MEMINFO = "MemTotal:       16777216 kB\nMemFree:         1048576 kB\nMemAvailable:    8388608 kB\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Of 16 GiB with 8 left; `machine(membership, {group: (limit, used, file pages)})` adds control groups."""

    def make(membership: str = "", groups: dict | None = None, names=("memory.max", "memory.current")) -> None:
        (tmp_path / "meminfo").write_text(MEMINFO)
        (tmp_path / "membership").write_text(membership)
        for group, (limit, used, pages) in (groups or {}).items():
            folder = tmp_path / "cgroup" / group
            folder.mkdir(parents=True, exist_ok=True)
            (folder / names[0]).write_text(f"{limit}\n")
            (folder / names[1]).write_text(f"{used}\n")
            (folder / "memory.stat").write_text(f"anon 1\ninactive_file {pages}\n")
        monkeypatch.setattr(host_arena, "MEMINFO", tmp_path / "meminfo")
        monkeypatch.setattr(host_arena, "MEMBERSHIP", tmp_path / "membership")
        monkeypatch.setattr(host_arena, "CGROUPS", tmp_path / "cgroup")

    return make


def test_without_a_control_group_it_is_what_the_machine_has_left(machine):
    machine()
    assert available_bytes() == 8 * GIB


def test_the_narrowest_group_of_all_that_a_process_is_in_counts_and_the_page_cache_does_not(machine):
    groups = {"slurm/job_7/step_0": ("max", 9, 0), "slurm/job_7": (4 * GIB, 3 * GIB, GIB), "slurm": (15 * GIB, GIB, 0)}
    machine("0::/slurm/job_7/step_0\n", groups)
    assert available_bytes() == 2 * GIB


def test_a_container_that_shows_its_own_group_as_the_root(machine):
    machine("0::/../../outside\n", {".": (5 * GIB, GIB, 0)})
    assert available_bytes() == 4 * GIB


def test_the_first_version_of_control_groups(machine):
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    machine("4:memory:/docker/x\n3:cpu:/docker/x\n", {"memory/docker/x": (3 * GIB, GIB, 0)}, names)
    assert available_bytes() == 2 * GIB
    machine("4:memory:/docker/x\n", {"memory/docker/x": (1 << 63, GIB, 0)}, names)  # its word for no limit
    assert available_bytes() == 8 * GIB


def test_more_than_a_control_group_leaves_is_refused_with_both_numbers_and_what_to_do(machine):
    machine("0::/job\n", {"job": (3 * GIB, GIB, 0)})
    told = (
        r"offload needs 2.5 GiB of host memory on this rank, and 2.0 GiB are left; raise memory.activation_checkpoint"
    )
    with pytest.raises(RunError, match=told):
        host_block(5 * GIB // 2, pinned=False)


def test_what_the_ranks_of_a_node_need_together_is_refused_where_each_alone_would_fit(machine):
    machine("0::/job\n", {"job": (6 * GIB, GIB, 0)})
    check_node(6 * GIB)
    with pytest.raises(RunError, match=r"needs 8.0 GiB of host memory on this node, which has 6.0 GiB \(hardware.host"):
        check_node(8 * GIB)


def test_this_process_may_take_something_and_gets_it_from_a_pages_border_on():
    assert 0 < available_bytes() <= host_arena._meminfo("MemTotal")
    block = host_block(10_001, pinned=False)
    assert (block.dtype, block.nbytes, block.data_ptr() % 4096) == (torch.uint8, 10_001, 0)


def test_what_is_pinned_is_unpinned_once_when_its_last_view_is_gone_and_copies_have_ended(monkeypatch):
    calls = []
    cuda = SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: calls.append(("pin", address, size)) or 0,
        cudaHostUnregister=lambda address: calls.append(("unpin", address)),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append(("wait",)))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "device", lambda number: calls.append(("on", number)) or nullcontext())
    arena = HostArena(capacity_bytes=GIB >> 10, pinned=True)
    _, piece = arena.take(torch.empty(100))
    address = piece.data_ptr()
    del arena
    assert calls == [("pin", address, GIB >> 10)]
    del piece
    assert calls[1:] == [("on", 3), ("wait",), ("unpin", address)]


def test_the_limit_of_locked_memory_is_told():
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 22, before[1]))
    try:
        assert host_arena._locked_limit() == "0.004 GiB"
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, before)
