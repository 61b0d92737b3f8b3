"""Expandable segments: set by the environment before CUDA starts, and seen in what the allocator really does."""

import os
import subprocess
import sys

PROBE = """
import torch
block = torch.empty(64 << 20, device="cuda")
print(any(segment["is_expandable"] for segment in torch.cuda.memory_snapshot()))
"""


def expandable_segments_in_force(variables: dict[str, str]) -> bool:
    """Whether a process with these variables gets its GPU memory in expandable segments."""
    unset = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    probe = subprocess.run(
        [sys.executable, "-c", PROBE],
        env={**unset, **variables},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return probe.stdout.strip() == "True"


def test_the_variables_of_a_job_put_expandable_segments_in_force():
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # as in plan/environment.py, which needs pydantic
    assert expandable_segments_in_force(dict.fromkeys(names, "expandable_segments:True"))


def test_without_them_the_probe_sees_none():
    assert not expandable_segments_in_force({})
