"""The exchange of Ulysses sequence parallelism: sequence shards into head shards and back, with their gradients.

DeepSpeed-Ulysses, arXiv 2309.14509. Per rank and tensor it moves S/sp * H * D * (sp-1)/sp elements: constant when
sequence and ranks grow together.
"""

from typing import Any

import torch
import torch.distributed as dist

from pipeline.parallel.mesh import Mesh
from pipeline.parallel.waits import waiting


def sequence_to_heads(x_SHD: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """[S/sp, H, D] -> [S, H/sp, D]: a shard of the sequence with all heads becomes all of it with a share of them."""
    if mesh.sp_group is None:
        return x_SHD
    local_seq_len, heads, dim = x_SHD.shape
    by_rank = x_SHD.reshape(local_seq_len, mesh.sp, heads // mesh.sp, dim).transpose(0, 1)
    exchanged: torch.Tensor = _AllToAll.apply(by_rank.contiguous(), mesh.sp_group)
    return exchanged.reshape(mesh.sp * local_seq_len, heads // mesh.sp, dim)


def heads_to_sequence(x_SHD: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """[S, H/sp, D] -> [S/sp, H, D]: the way back."""
    if mesh.sp_group is None:
        return x_SHD
    seq_len, local_heads, dim = x_SHD.shape
    by_rank = x_SHD.reshape(mesh.sp, seq_len // mesh.sp, local_heads, dim)
    exchanged: torch.Tensor = _AllToAll.apply(by_rank.contiguous(), mesh.sp_group)
    return exchanged.transpose(0, 1).reshape(seq_len // mesh.sp, mesh.sp * local_heads, dim)


class _AllToAll(torch.autograd.Function):
    """[sp, …] -> [sp, …]: slice j goes to rank j, slice i comes from rank i. It is its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        out = torch.empty_like(x)
        _exchange(out, x, group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grads[0].contiguous()
        out = torch.empty_like(grad)
        _exchange(out, grad, ctx.group)
        return out, None


@waiting("communication")
def _exchange(out: torch.Tensor, x: torch.Tensor, group: dist.ProcessGroup) -> None:
    dist.all_to_all_single(out, x, group=group)
