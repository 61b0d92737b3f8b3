"""Limits of collectives, in every group that a process is in."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from pipeline.parallel.mesh import limit_collectives


@pytest.fixture
def _one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'gloo'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def limit_of(group: dist.ProcessGroup) -> timedelta:
    return group._get_backend(torch.device("cpu")).options._timeout


@pytest.mark.usefixtures("_one_rank")
def test_the_limit_holds_in_groups_that_others_made():
    made_as_deepspeed_does = dist.new_group(range(1))
    assert limit_of(made_as_deepspeed_does) == timedelta(minutes=30)
    limit_collectives(timedelta(seconds=77))
    assert {limit_of(made_as_deepspeed_does), limit_of(dist.group.WORLD)} == {timedelta(seconds=77)}
