"""One rank of a baseline: stock model, DeepSpeed's engine, the plan's steps, each measured as the product's are."""

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import transformers

from benchmarks.baselines.ways import Way, way_of
from pipeline.data.batch import Batch
from pipeline.data.loader import PackedLoader, StepBatch
from pipeline.data.packed_dataset import PackedDataset
from pipeline.errors import AlstError
from pipeline.files import write_json
from pipeline.metrics.environment import environment_found
from pipeline.metrics.meter import RunClock, StepTimer, flops_utilization, memory_metrics
from pipeline.metrics.reduction import Gathered, RankMetric, Reduction
from pipeline.metrics.rows import JsonlWriter
from pipeline.model.build import build_model
from pipeline.plan.hardware import HARDWARE
from pipeline.plan.job import JobPlan, read_plan
from pipeline.plan.run_dir import RunDir
from pipeline.recipe.schema import Gpu
from pipeline.train.engine import deepspeed_config, init_distributed, zero3_config
from pipeline.train.flops import StepFlops
from pipeline.train.optimizer import create_optimizer

TIMEOUT = timedelta(hours=2)


def train(kind: str, plan: JobPlan, run_dir: RunDir) -> None:
    """Every step of the plan."""
    device = _device(plan)
    way = way_of(kind, plan)
    init_distributed(plan, timeout=TIMEOUT)
    engine = _engine(way, plan)
    rank = dist.get_rank()
    _say(rank, f"attention: {way.attention} (transformers {transformers.__version__}, torch {torch.__version__})")
    loader = _loader(plan, PackedDataset.open(run_dir.packed(plan)), rank)
    timer = StepTimer(synchronize=torch.cuda.synchronize if device.type == "cuda" else None)
    writer = JsonlWriter(run_dir.metrics) if rank == 0 else None
    if rank == 0:
        write_json(run_dir.environment, environment_found())
    flops, clock, around = StepFlops.of(engine.module), RunClock(), way.around_step()
    steps = iter(loader)
    for _ in range(len(loader)):
        loss, norm, batch = _step(engine, way, steps, timer, device, around)
        measured = _gather([*timer.end_step().metrics(), *memory_metrics()], device)
        row = _row(plan, batch, measured, loss, norm) | _shares(plan, batch, loader, flops, measured)
        row["time"] = clock.now()
        if writer is not None:
            writer.write(row)
        _say(rank, f"step {row['step']}: loss {loss:.6f}, {row['step_seconds']:.2f} s")
    dist.barrier()


def _step(
    engine: Any,
    way: Way,
    steps: Any,
    timer: StepTimer,
    device: torch.device,
    around: Callable[[], AbstractContextManager[Any]],
) -> tuple[float, float | None, StepBatch]:
    """(loss, gradient norm, what was trained on)."""
    with timer.phase("data"):
        batch = next(steps)
        (micro_batch,) = batch.micro_batches
        inputs = _inputs(micro_batch, device)
    with around():
        with timer.phase("forward"):
            loss = way.loss(engine, **inputs)
            told = float(loss.detach())
        with timer.phase("backward"):
            engine.backward(loss)
    with timer.phase("optimizer"):
        engine.step()
    norm = engine.get_global_grad_norm()
    return told, None if norm is None else float(norm), batch


def _inputs(batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    """Labels are shifted already, as their loader's adapter does it."""
    return {
        "input_ids": batch.input_ids.to(device),
        "position_ids": batch.position_ids.to(device),
        "shift_labels": batch.labels.to(device),
    }


def _engine(way: Way, plan: JobPlan) -> Any:
    recipe = plan.recipe
    model = build_model(recipe.model, attention=way.attention, seed=recipe.train.seed, zero3=zero3_config(plan))
    mpu = way.prepare(model)
    config = deepspeed_config(plan) | way.config()
    engine, *_ = deepspeed.initialize(model=model, optimizer=create_optimizer(model, plan), config=config, mpu=mpu)
    return engine


def _loader(plan: JobPlan, dataset: PackedDataset, rank: int) -> PackedLoader:
    data = plan.recipe.data
    return PackedLoader(
        dataset,
        sp_rank=rank % plan.sp,
        sp=plan.sp,
        dp_rank=rank // plan.sp,
        dp=plan.dp,
        grad_accumulation=1,
        steps=plan.recipe.train.steps,
        seed=data.seed,
        cross_document_attention=data.cross_document_attention,
        order=data.order,
        prefetch=data.prefetch,
        verify=data.verify_checksums,
    )


def _gather(mine: list[RankMetric], device: torch.device) -> dict[str, float | None]:
    """Over ranks, by each metric's reduction."""
    own = torch.tensor([metric.value for metric in mine], dtype=torch.float64, device=device)
    table = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(table, own)
    values = torch.stack(table).cpu().tolist()
    assert all(metric.reduction is not Reduction.WEIGHTED_MEAN for metric in mine)
    return Gathered(mine, values=values, weights=[[1.0] * len(mine)] * len(values)).reduced()


def _row(
    plan: JobPlan, batch: StepBatch, measured: dict[str, float | None], loss: float, norm: float | None
) -> dict[str, Any]:
    """A row of metrics.jsonl. What forward and backward wait for is not told apart here."""
    seconds = measured["step_seconds"] or 0.0
    unknown = {"communication_seconds": None, "offload_stall_seconds": None, "pinned_bytes": None}
    return {
        "step": batch.step + 1,
        "loss": loss,
        "grad_norm": norm,
        "tokens": batch.tokens,
        "tokens_per_second": batch.tokens / seconds,
        "tokens_per_second_per_gpu": batch.tokens / seconds / plan.world_size,
        **measured,
        **unknown,
    }


def _shares(
    plan: JobPlan, batch: StepBatch, loader: PackedLoader, flops: StepFlops | None, measured: dict[str, float | None]
) -> dict[str, float | None]:
    """MFU and HFU, as the product counts them."""
    peak, seconds = HARDWARE[plan.recipe.hardware.gpu].peak_flops, measured["step_seconds"] or 0.0
    if flops is None:
        return {"mfu": None, "hfu": None}
    done = {"mfu": flops.of_step(batch, loader), "hfu": flops.hardware_of_step(batch, loader, plan)}
    return {name: flops_utilization(count, seconds, peak, plan.world_size) for name, count in done.items()}


def _device(plan: JobPlan) -> torch.device:
    if plan.recipe.hardware.gpu is Gpu.CPU:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def _say(rank: int, text: str) -> None:
    if rank == 0:
        print(text, flush=True)


def main() -> None:
    _, kind, plan_path = sys.argv
    code = 0
    try:
        train(kind, read_plan(Path(plan_path)), RunDir(Path(plan_path).parent))
    except AlstError as error:
        print(f"alst: {error}", file=sys.stderr)
        code = error.exit_code
    except Exception:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo and DeepSpeed abort in about one orderly exit of eight


if __name__ == "__main__":
    main()
