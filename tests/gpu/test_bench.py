"""The bench's own command on a GPU, small: bytes and rates of the device, the goals' table, and no room as a row."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.support import gpu_of_this_machine

SECONDS = 540


def bench(folder: Path, *arguments: str) -> list[dict]:
    """The rows of a bench of two of Llama-3.2-1B's layers."""
    command = [sys.executable, "-m", "pipeline.cli", "bench", "llama8b", "--model=meta-llama/Llama-3.2-1B"]
    options = ["--steps=1", f"--output={folder}", "hardware.gpus_per_node=1", "zero.offload_optimizer=null"]
    done = subprocess.run(
        [*command, *arguments, *options], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return json.loads((folder / "results.json").read_text())["rows"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, dict]:
    pytest.importorskip("deepspeed")
    gpu_of_this_machine()  # skips where recipes have no name for it
    asked = ("--lengths=8K", "--rungs=offload,keep-attention", "--engines=alst,reference")
    return {row["key"]: row for row in bench(tmp_path_factory.mktemp("bench"), *asked)}


def test_every_row_has_bytes_of_the_device_and_rates(rows):
    assert len(rows) == 3
    for row in rows.values():
        assert row["outcome"] == "ok", row["detail"]
        found = row["measured"]
        assert 0 < found["peak_device_bytes"] <= found["peak_device_reserved_bytes"]
        assert 0 < found["mfu"] <= found["hfu"] < 1
        assert not row["attention"].startswith("cpu")


def test_the_reference_starts_from_the_same_loss(rows):
    ours, theirs = rows["alst-offload-8192-2l-r1"], rows["reference-offload-8192-2l-r1"]
    assert theirs["measured"]["first_loss"] == pytest.approx(ours["measured"]["first_loss"], rel=1e-2)


def test_what_does_not_fit_is_a_row(tmp_path):
    pytest.importorskip("deepspeed")
    gpu_of_this_machine()
    (row,) = bench(tmp_path, "--lengths=2M", "--rungs=baseline")  # logits alone are 500 GiB
    assert row["outcome"] == "out of memory", row["detail"]
