"""200 steps of one small model twice: by a plain loop over the stock model, and by the pipeline with every feature on.

    python benchmarks/curves.py            # writes benchmarks/results/curves.{json,png}

Same weights, same packed data, same optimizer. The plain loop is transformers and torch alone: one process, one
document at a time, no DeepSpeed. The pipeline's run is `alst train`: two ranks, sp = 2, ZeRO-3, tiled loss, tiled MLP,
layer inputs offloaded.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM

from pipeline.data.batch import IGNORE_INDEX, Batch
from pipeline.data.loader import PackedLoader
from pipeline.data.packed_dataset import PackedDataset
from pipeline.launch.snapshot import commit
from pipeline.metrics.rows import read_steps
from pipeline.model.build import build_model
from pipeline.plan.job import JobPlan, plan_job
from pipeline.plan.run_dir import RunDir
from pipeline.recipe.load import load
from pipeline.train.schedule import learning_rate

STEPS = 200
RESULTS = Path(__file__).parent / "results"
OVERRIDES = [
    "optimizer.weight_decay_on=all",
    "evaluation=null",
    "data.seq_len=4096",
    f"train.steps={STEPS}",
    "train.self_check.tokens=4096",
    "memory.tiled_loss.tile_tokens=300",
    "memory.tiled_mlp.tile_tokens=500",
    "tracking.mlflow=false",
]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ALST_RUNS"] = folder
        weights = Path(folder) / "weights"
        build_model(load("tiny").model, attention="sdpa", seed=0).save_pretrained(weights)
        overrides = [*OVERRIDES, "model.init=pretrained", f"model.name_or_path={weights}"]
        plan = plan_job(load("tiny", overrides=overrides))
        subprocess.run([sys.executable, "-m", "pipeline.cli", "train", "tiny", *overrides], check=True)
        (run,) = Path(folder).glob("tiny-*")
        ours = [row["loss"] for row in read_steps(run / "metrics.jsonl")]
        plain = plain_losses(plan, PackedDataset.open(RunDir(run).packed(plan)), weights)
    write(plan, plain, ours)


def plain_losses(plan: JobPlan, dataset: PackedDataset, weights: Path) -> list[float]:
    """The losses of the plain loop."""
    recipe = plan.recipe
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32).train()
    options = {"lr": recipe.optimizer.lr, "betas": recipe.optimizer.betas, "eps": recipe.optimizer.eps}
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=recipe.optimizer.weight_decay, **options)
    loader = PackedLoader(
        dataset, sp_rank=0, sp=1, dp_rank=0, dp=1, grad_accumulation=1, steps=STEPS, seed=recipe.data.seed
    )
    losses = []
    for step in loader:
        optimizer.zero_grad()
        losses.append(sum(backward_of_sample(model, batch) for batch in step.micro_batches))
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.train.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step.step + 1)
        optimizer.step()
    return losses


def backward_of_sample(model: Any, batch: Batch) -> float:
    """Mean loss over the sample's labels; gradients accumulate document by document."""
    total = 0.0
    for start, stop in pairwise(batch.cu_seqlens.tolist()):
        labels = batch.labels[0, start:stop]
        logits = model(input_ids=batch.input_ids[:, start:stop], use_cache=False).logits[0]
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum") / batch.n_valid
        loss.backward()
        total += float(loss.detach())
    return total


def write(plan: JobPlan, plain: list[float], ours: list[float]) -> None:
    """The curves with their conditions, and a plot of both and of their difference."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    largest = max(abs(a - b) for a, b in zip(plain, ours, strict=True))
    conditions = {
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "plan": {key: value for key, value in plan.to_json().items() if key not in ("recipe", "model")},
        "model": plan.to_json()["model"],
        "optimizer": plan.recipe.optimizer.model_dump(mode="json"),
    }
    curves = {"plain": plain, "pipeline": ours}
    results = {"conditions": conditions, "largest_difference": largest, "loss": curves}
    (RESULTS / "curves.json").write_text(json.dumps(results, indent=1) + "\n")
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(9, 6), height_ratios=(2, 1), layout="tight")
    steps = range(1, STEPS + 1)
    above.plot(steps, plain, label="plain: stock model, one process", linewidth=3, alpha=0.4)
    above.plot(steps, ours, label="pipeline: sp=2, ZeRO-3, all features", linewidth=1)
    above.set_ylabel("loss (nats per token)")
    above.legend()
    below.plot(steps, [b - a for a, b in zip(plain, ours, strict=True)], color="tab:red", linewidth=1)
    below.set_ylabel("difference")
    below.set_xlabel("optimizer step")
    figure.savefig(RESULTS / "curves.png", dpi=110)
    print(f"largest difference over {STEPS} steps: {largest:.2e}; wrote {RESULTS / 'curves.json'}")


if __name__ == "__main__":
    main()
