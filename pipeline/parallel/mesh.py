"""The mesh: which rank shares a sequence with which, and which reads what.

world_size = dp x sp. SP ranks are neighbours, so that the exchange stays inside a node wherever sp fits in one.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout, _world


@dataclass(frozen=True)
class Mesh:
    """This rank's place. `sp_group` is None when sp is 1, and nothing is exchanged."""

    rank: int
    world_size: int
    sp: int
    sp_group: dist.ProcessGroup | None

    @property
    def dp(self) -> int:
        return self.world_size // self.sp

    @property
    def sp_rank(self) -> int:
        return self.rank % self.sp

    @property
    def dp_rank(self) -> int:
        return self.rank // self.sp


def create_mesh(sp: int, *, timeout: timedelta | None = None) -> Mesh:
    """The mesh over the initialised process group. Collective: every rank calls it, in the same order.

    `timeout` of its own collectives; None is torch's ten minutes.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    own: dist.ProcessGroup | None = None
    if sp > 1:
        for first in range(0, world_size, sp):
            group = dist.new_group(list(range(first, first + sp)), timeout=timeout)
            if first <= rank < first + sp:
                own = group
    return Mesh(rank=rank, world_size=world_size, sp=sp, sp_group=own)


def limit_collectives(timeout: timedelta) -> None:
    """From here on a collective that takes longer ends its process with an error.

    In every group there is: ZeRO's are DeepSpeed's own, which makes them with torch's ten minutes.
    """
    for group in list(_world.pg_map):
        _set_pg_timeout(timeout, group)
