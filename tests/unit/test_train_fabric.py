"""How fast ranks reach each other, where there is one alone; tests/cluster measures between several."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline.train import fabric
from pipeline.train.fabric import check_fabric

CPU = torch.device("cpu")


@pytest.fixture
def one_rank(tmp_path: Path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_rank_alone_reaches_nobody_and_meets_every_floor(one_rank):
    assert check_fabric(CPU, least_bytes_per_second=1e99) is None


def test_a_sum_that_is_wrong_ends_the_job(one_rank, monkeypatch):
    def with_a_bit_that_flips(tensor: torch.Tensor) -> None:
        tensor[-1] += 1

    monkeypatch.setattr(fabric.dist, "all_reduce", with_a_bit_that_flips)
    with pytest.raises(fabric.RunError, match="the fabric is not in order"):
        fabric.measure(CPU)
