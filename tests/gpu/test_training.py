"""The train job, on two GPUs where there are two: real kernels, offload over PCIe, the self-check, in bfloat16."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.gpu.support import gpu_of_this_machine

STEPS = 3


IN_CHUNKS = "memory.sequence_chunks={chunk_tokens: 8192, hidden_states: cpu, keys_values: cpu}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory)


def train(tmp_path_factory, *more: str):
    """`alst train tiny` on the GPU; its run folder and what it printed."""
    for package in ("deepspeed", "pydantic"):
        pytest.importorskip(package)
    runs = tmp_path_factory.mktemp("gpu") / "runs"
    overrides = [
        f"hardware.gpu={gpu_of_this_machine()}",
        f"hardware.gpus_per_node={min(torch.cuda.device_count(), 2)}",
        "model.dtype=bfloat16",
        f"train.steps={STEPS}",
        "train.self_check.tolerance=3e-2",
        "tracking.mlflow=false",
        "memory.activation_checkpoint.resident_groups=0",  # there is room for all of them
        *more,
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "train", "tiny", *overrides],
        env=os.environ | {"ALST_RUNS": str(runs)},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (folder,) = runs.glob("tiny-*")
    return folder, done.stdout


def test_loss_and_gradient_norm_equal_the_stock_model_on_the_gpu(run):
    _, printed = run
    assert "self-check on 32,768 tokens" in printed
    assert "attention: cpu" not in printed


def test_layer_inputs_wait_in_host_memory_and_the_gpu_is_measured(run):
    folder, _ = run
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    plan = json.loads((folder / "plan.json").read_text())
    bfloat16_bytes = 2
    layers, hidden = plan["model"]["num_layers"], plan["model"]["hidden_size"]
    assert len(rows) == STEPS
    assert rows[-1]["offloaded_bytes"] == layers * plan["local_seq_len"] * hidden * bfloat16_bytes
    assert rows[-1]["peak_device_bytes"] > 0
    assert 0 < rows[-1]["mfu"] < 1


def test_in_chunks_from_host_memory_it_trains_as_without_them(run, tmp_path_factory):
    """The self-check holds it to the stock model, and the losses to those of the run before."""
    folder, printed = train(tmp_path_factory, IN_CHUNKS)
    assert "self-check on 32,768 tokens" in printed
    losses = [
        [json.loads(line)["loss"] for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (run[0], folder)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
