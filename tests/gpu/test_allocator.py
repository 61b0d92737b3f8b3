"""What the environment asks of the allocators before CUDA starts, seen in what they really do."""

import os
import subprocess
import sys

import pytest
import torch

PROBE = """
import torch
block = torch.empty(64 << 20, device="cuda")
print(any(segment["is_expandable"] for segment in torch.cuda.memory_snapshot()))
"""


PINNED = """
import torch
block = torch.empty(100 << 20, dtype=torch.uint8, pin_memory=True)
print(torch.cuda.host_memory_stats()["allocated_bytes.current"])
"""

KNOWS_PINNED_BLOCKS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)
PINNED_BLOCKS = ",pinned_max_round_threshold_mb:64,pinned_max_cached_size_mb:64"
JOB = {"PYTORCH_ALLOC_CONF": "expandable_segments:True" + (PINNED_BLOCKS if KNOWS_PINNED_BLOCKS else "")}
"""As in plan/environment.py, which needs pydantic."""


def printed(script: str, variables: dict[str, str]) -> str:
    """What a process with these variables, and no other of an allocator, prints."""
    unset = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    probe = subprocess.run(
        [sys.executable, "-c", script],
        env={**unset, **variables},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return probe.stdout.strip()


def test_the_variables_of_a_job_put_expandable_segments_in_force():
    assert printed(PROBE, JOB) == "True"


def test_without_them_the_probe_sees_none():
    assert printed(PROBE, {}) == "False"


@pytest.mark.skipif(not KNOWS_PINNED_BLOCKS, reason=f"torch {torch.__version__} has no blocks of exact size")
def test_a_large_page_locked_block_takes_its_own_bytes_in_a_job_and_a_power_of_two_else():
    assert int(printed(PINNED, JOB)) == 100 << 20
    assert int(printed(PINNED, {})) == 128 << 20
