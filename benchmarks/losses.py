"""Fused linear cross-entropies side by side: error of loss and gradients against float64, time and peak memory.

    python benchmarks/losses.py            # writes this device's part of benchmarks/results/losses.json

On a GPU if there is one, else on the CPU: the stock loss over whole logits, ours, torch's `F.linear_cross_entropy`,
DeepSpeed's `vocab_parallel_linear_cross_entropy` and Liger's. What is not installed is a row that says so. Every
measurement is a process of its own, so that its peak is its own.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from pipeline.launch.snapshot import commit
from pipeline.memory.tiled_loss import IGNORE_INDEX, LogitsTransform, tiled_loss

RESULTS = Path(__file__).parent / "results" / "losses.json"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = ("float32", "bfloat16")
ERROR_SHAPE = (1024, 128, 4096)  # tokens, hidden size, vocabulary
TIME_SHAPE = {"cpu": (2048, 256, 32768), "cuda": (32768, 4096, 128256)}[DEVICE]
TILE_TOKENS = {"cpu": 256, "cuda": 2048}[DEVICE]
SEEDS, REPEATS = (0, 1, 2), 3
FACTOR = 8 / 1371
"""On the loss, as `train.engine.loss_scale` is: a number that bfloat16 has not, by 0.11 %."""

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""hidden [tokens, hidden], weight [vocab, hidden], labels [tokens] -> the sum over labels that count."""


def stock(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden, weight).to(torch.promote_types(hidden.dtype, torch.float32))
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")


def own(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return tiled_loss(hidden[None], weight, None, labels[None], tile_tokens=TILE_TOKENS, transform=LogitsTransform())


def torch_sum(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, labels, reduction="sum", ignore_index=IGNORE_INDEX, options=options)


def torch_per_token(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The sum made here, in float32."""
    options = torch.nn.LinearCrossEntropyOptions()
    losses = F.linear_cross_entropy(
        hidden, weight, labels, reduction="none", ignore_index=IGNORE_INDEX, options=options
    )
    return losses.to(torch.promote_types(losses.dtype, torch.float32)).sum()


def deepspeed(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from deepspeed.sequence.linear_cross_entropy import vocab_parallel_linear_cross_entropy

    return vocab_parallel_linear_cross_entropy(hidden, weight, labels, ignore_index=IGNORE_INDEX, reduction="sum")


def liger(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(
        hidden, weight, labels, ignore_index=IGNORE_INDEX, reduction="sum", accum_dtype=torch.float32
    )


LOSSES: dict[str, Loss] = {
    "stock": stock,
    "own": own,
    "torch": torch_sum,
    "torch, a loss per token": torch_per_token,
    "deepspeed": deepspeed,
    "liger": liger,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("LOSS", "DTYPE"), help="measure this alone, and print JSON")
    asked = parser.parse_args()
    if asked.one is not None:
        name, dtype = asked.one
        print(json.dumps(measure(LOSSES[name], getattr(torch, dtype))))
        return
    measured_at = conditions()
    rows = [{"loss": name, "dtype": dtype, **in_its_own_process(name, dtype)} for dtype in DTYPES for name in LOSSES]
    devices = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    devices[DEVICE] = {"conditions": measured_at, "rows": rows}
    RESULTS.write_text(json.dumps(devices, indent=1) + "\n")
    print(f"wrote {RESULTS}")


def in_its_own_process(name: str, dtype: str) -> dict[str, Any]:
    """What `measure` finds, or why it finds nothing."""
    done = subprocess.run([sys.executable, __file__, "--one", name, dtype], capture_output=True, text=True, check=False)
    last_line = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1]
    row: dict[str, Any] = json.loads(last_line) if done.returncode == 0 else {"failed": last_line}
    print(f"{dtype} {name}: {row}", flush=True)
    return row


def measure(loss: Loss, dtype: torch.dtype) -> dict[str, Any]:
    """Errors at ERROR_SHAPE, then time and memory at TIME_SHAPE."""
    runs = [errors(loss, dtype, seed) for seed in SEEDS]
    worst = {name: max((run[name] for run in runs), key=abs) for name in runs[0]}
    return {"worst_error": worst, "nothing_to_learn_gives_zero": gives_zero(loss, dtype), **cost(loss, dtype)}


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, ...]:
    """Rounded to `dtype`; logits of a standard deviation near two; one label of five is ignored."""
    tokens, hidden_size, vocab = shape
    torch.manual_seed(seed)
    hidden = torch.randn(tokens, hidden_size, device=DEVICE).to(dtype).requires_grad_()
    weight = (2 * hidden_size**-0.5 * torch.randn(vocab, hidden_size, device=DEVICE)).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (tokens,), device=DEVICE)
    labels[::5] = IGNORE_INDEX
    return hidden, weight, labels


def errors(loss: Loss, dtype: torch.dtype, seed: int) -> dict[str, float]:
    """Relative to float64 on the same rounded inputs. `scale`: what all gradients have in common, 0 for unbiased."""
    hidden, weight, labels = inputs(ERROR_SHAPE, dtype, seed)
    exact_inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact_loss = stock(*exact_inputs, labels)
    exact = torch.autograd.grad(exact_loss * FACTOR, exact_inputs)
    found_loss = loss(hidden, weight, labels)
    found = torch.autograd.grad(found_loss * FACTOR, (hidden, weight))
    report = {"loss": relative(found_loss, exact_loss)}
    for name, mine, theirs in zip(("hidden", "weight"), found, exact, strict=True):
        report[name] = relative(mine, theirs)
        report[f"{name}_scale"] = float((mine.double() * theirs).sum() / theirs.square().sum()) - 1
    return report


def relative(mine: torch.Tensor, exact: torch.Tensor) -> float:
    return float(((mine.double() - exact).norm() / exact.norm()).detach())


def gives_zero(loss: Loss, dtype: torch.dtype) -> bool:
    """Whether a rank without labels contributes nothing, rather than NaN."""
    hidden, weight, labels = inputs((64, 32, 128), dtype, 0)
    found = loss(hidden, weight, torch.full_like(labels, IGNORE_INDEX))
    return not any(bool(x.any()) for x in (found, *torch.autograd.grad(found * FACTOR, (hidden, weight))))


def cost(loss: Loss, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds (on a CPU, of its time) of forward and backward, and the most memory beyond the inputs."""
    hidden, weight, labels = inputs(TIME_SHAPE, dtype, 0)
    before = used_bytes()
    seconds = []
    for _ in range(1 + REPEATS):
        synchronize()
        start = clock()
        torch.autograd.grad(loss(hidden, weight, labels) * FACTOR, (hidden, weight))
        synchronize()
        seconds.append(clock() - start)
    measured = seconds[1:]  # the first one also compiles and allocates
    return {
        "seconds": {"median": statistics.median(measured), "least": min(measured), "most": max(measured)},
        "peak_mib": (peak_bytes() - before) / 2**20,
    }


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def clock() -> float:
    """Seconds; on a CPU of this process alone, so that a busy machine does not count."""
    return time.perf_counter() if DEVICE == "cuda" else time.process_time()


def used_bytes() -> int:
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """Of the process, on a CPU: errors were measured before, at a shape whose peak is far lower."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def conditions() -> dict[str, Any]:
    """What the rows hold for."""
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{_cpu()}, {torch.get_num_threads()} thread(s)"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("deepspeed", "liger-kernel", "triton"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "commit": commit(),
        "device": device,
        "versions": versions,
        "factor_on_the_loss": FACTOR,
        "errors": {"tokens, hidden, vocabulary": ERROR_SHAPE, "seeds": SEEDS, "kept": "worst"},
        "cost": {"tokens, hidden, vocabulary": TIME_SHAPE, "tile_tokens": TILE_TOKENS, "repeats": REPEATS},
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


if __name__ == "__main__":
    main()
