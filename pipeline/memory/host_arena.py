"""Host memory for what waits there: how much of it this process may still take, and a stack in blocks of exact size.

torch's own pinned memory is rounded up to powers of two, block by block.
"""

import resource
import weakref
from pathlib import Path

import torch

from pipeline.direct_io import page_memory
from pipeline.errors import RunError
from pipeline.plan.host_memory import ARENA_ALIGNMENT as ALIGNMENT

GROWTH_BYTES = 64 << 20  # of a block that was not planned: small runs and tests
GIB = 1 << 30
CGROUPS, MEMBERSHIP, MEMINFO = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"), Path("/proc/meminfo")
REMEDY = (
    "raise memory.activation_checkpoint.layers_per_group, set keep_attention: false, offload: disk, with "
    "sequence_chunks hidden_states: gpu or keys_values: gpu, or more nodes"
)


class HostArena:
    """Host memory in few large blocks, a stack. Blocks have exactly the bytes that were asked for."""

    def __init__(self, *, capacity_bytes: int = 0, pinned: bool) -> None:
        self._pinned = pinned
        self._blocks: list[torch.Tensor] = []
        self._tops: list[int] = []
        """Bytes in use of every block."""
        self._taken: list[tuple[int, int]] = []
        """Block, and its top before, of every piece that was taken."""
        self._returned: set[int] = set()
        self.peak_bytes = 0
        """The most that was in use at once."""
        if capacity_bytes:
            self._grow(capacity_bytes)

    @property
    def reserved_bytes(self) -> int:
        return sum(block.nbytes for block in self._blocks)

    @property
    def pinned_bytes(self) -> int:
        return self.reserved_bytes if self._pinned else 0

    def take(self, like: torch.Tensor) -> tuple[int, torch.Tensor]:
        """Memory for a tensor of that shape and dtype, and its number."""
        size = -(-like.nbytes // ALIGNMENT) * ALIGNMENT
        block = next((b for b, top in enumerate(self._tops) if top + size <= self._blocks[b].nbytes), None)
        if block is None:
            self._grow(max(size, GROWTH_BYTES))
            block = len(self._blocks) - 1
        begin = self._tops[block]
        self._taken.append((block, begin))
        self._tops[block] = begin + size
        self.peak_bytes = max(self.peak_bytes, sum(self._tops))
        piece = self._blocks[block][begin : begin + like.nbytes]
        return len(self._taken) - 1, piece.view(like.dtype).view(like.shape)

    def give_back(self, number: int) -> None:
        """Piece `number` is done with; memory is free again once all that was taken after it is."""
        self._returned.add(number)
        while self._taken and len(self._taken) - 1 in self._returned:
            self._returned.discard(len(self._taken) - 1)
            block, begin = self._taken.pop()
            self._tops[block] = begin

    def clear(self) -> None:
        """All that was taken is done with."""
        self._taken.clear()
        self._returned.clear()
        self._tops = [0] * len(self._blocks)

    def _grow(self, size: int) -> None:
        self._blocks.append(host_block(size, pinned=self._pinned))
        self._tops.append(0)


def host_block(size: int, *, pinned: bool) -> torch.Tensor:
    """uint8 [size], from a page's border on; pinned until the last view of it is gone. Raises RunError if this process
    has not that memory left, or may not pin it."""
    available = available_bytes()
    if size > available:
        raise RunError(
            f"offload needs {size / GIB:.1f} GiB of host memory on this rank, and {available / GIB:.1f} GiB are left; "
            f"{REMEDY}"
        )
    memory = page_memory(size)
    block = torch.frombuffer(memory, dtype=torch.uint8)[:size]
    if pinned:
        _pin(block)
        unpin = weakref.finalize(memory, _unpin, block.data_ptr(), torch.cuda.current_device())
        unpin.atexit = False  # the end of the process unpins all
    return block


def check_node(node_bytes: int) -> None:
    """Raises RunError if the ranks of a node together want more than this machine, or their control group, has."""
    limit = min([_meminfo("MemTotal"), *(there for there, _ in _cgroup_limits())])
    if node_bytes > limit:
        raise RunError(
            f"offload needs {node_bytes / GIB:.1f} GiB of host memory on this node, which has {limit / GIB:.1f} GiB "
            f"(hardware.host_memory_gib, or the job's --mem); {REMEDY}"
        )


def available_bytes() -> int:
    """What this process may still take: what the machine has left, and what its control groups leave it."""
    return min([_meminfo("MemAvailable"), *(limit - used for limit, used in _cgroup_limits())])


def _meminfo(name: str) -> int:
    values = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
    return int(values[name].split()[0]) << 10


def _cgroup_limits() -> list[tuple[int, int]]:
    """(limit, bytes in use beside what the kernel may take back) of this process's control groups that have one.

    Both versions; a container may show its own group as the root of what it sees.
    """
    found = []
    for line in MEMBERSHIP.read_text().splitlines() if MEMBERSHIP.exists() else []:
        _, controllers, name = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = CGROUPS / controllers
        folder = root / name.lstrip("/")
        folders = [folder, *folder.parents] if folder.is_relative_to(root) else [root]
        found += [one for one in map(_limit_of, folders[: folders.index(root) + 1]) if one is not None]
    return found


def _limit_of(folder: Path) -> tuple[int, int] | None:
    for limit_name, used_name in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        limit, used = folder / limit_name, folder / used_name
        if limit.is_file() and used.is_file() and (told := limit.read_text().strip()) != "max":
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            pages = int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))
            return int(told), max(0, int(used.read_text()) - pages)
    return None


def _pin(block: torch.Tensor) -> None:
    failed = torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.nbytes, 0)
    if int(failed):
        raise RunError(
            f"{block.nbytes / GIB:.1f} GiB of host memory cannot be pinned (cudaHostRegister: {failed}); the limit of "
            f"locked memory is {_locked_limit()}: raise it (`ulimit -l unlimited`, or the container's), or {REMEDY}"
        )


def _unpin(address: int, device: int) -> None:
    """Copies end first: a store may be dropped while they are on their way, and its pages are then given back."""
    with torch.cuda.device(device):  # whichever thread drops it: one that has no device starts CUDA on the first
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaHostUnregister(address)


def _locked_limit() -> str:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "unlimited" if soft == resource.RLIM_INFINITY else f"{soft / GIB:.3f} GiB"
