"""What the exchange of one attention layer sends, counted. Worker of `test_exchange`: FOLDER/results.json by sp."""

import json
import os
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from pipeline.attention.function import AttentionContext, alst_attention
from pipeline.attention.kernels.cpu import CpuKernel
from pipeline.attention.segments import segments_of
from pipeline.parallel.mesh import create_mesh

HEADS, KV_HEADS, HEAD_DIM, LOCAL_SEQ_LEN = 8, 2, 4, 6


def sent_elements(sp: int) -> dict[str, int]:
    """Elements that leave this rank in forward and in backward of one layer, for sp * LOCAL_SEQ_LEN tokens."""
    mesh = create_mesh(sp)
    sent = 0
    real = dist.all_to_all_single

    def counting(out: torch.Tensor, x: torch.Tensor, group: dist.ProcessGroup) -> None:
        nonlocal sent
        sent += x.numel() * (sp - 1) // sp  # slice i of sp stays at home
        real(out, x, group=group)

    shapes = [(1, heads, LOCAL_SEQ_LEN, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes)
    boundaries = torch.tensor([0, 5, sp * LOCAL_SEQ_LEN], dtype=torch.int32)
    context = AttentionContext(segments_of(boundaries, device=torch.device("cpu")), mesh, CpuKernel())
    with mock.patch("pipeline.parallel.exchange.dist.all_to_all_single", counting):
        out, _ = alst_attention(torch.nn.Module(), q, k, v, None, attention_context=context)
        forward = sent
        out.sum().backward()
    return {"forward": forward, "backward": sent - forward}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    results = {sp: sent_elements(sp) for sp in (1, 2, 4)}
    if dist.get_rank() == 0:
        (Path(sys.argv[1]) / "results.json").write_text(json.dumps(results))
    dist.barrier()
    os._exit(0)
