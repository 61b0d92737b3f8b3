"""A profiled step leaves a trace and a table of its operators; what fails in it fails as without."""

import gzip
import json

import pytest
import torch

from pipeline.train.profiler import profiled


def test_a_profiled_step_leaves_its_trace_and_its_operators(tmp_path):
    with profiled(tmp_path / "profile", 7):
        torch.ones(8, 8) @ torch.ones(8, 8)
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "step-000007.json.gz").read_bytes()))
    assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])
    assert "aten::mm" in (tmp_path / "profile" / "step-000007.txt").read_text()


def test_an_error_in_a_profiled_step_surfaces(tmp_path):
    with pytest.raises(ZeroDivisionError), profiled(tmp_path, 1):
        1 / 0  # noqa: B018
