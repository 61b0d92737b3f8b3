"""What surrounds a step, on real ranks: weight decay, evaluation, gradients that are not finite.

A worker of `test_surface`: each rank runs `python -m tests.multiprocess.surface FOLDER`; rank 0 writes results.json.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from transformers import AutoModelForCausalLM

from pipeline.attention.function import NAME as ALST_ATTENTION
from pipeline.attention.function import register
from pipeline.attention.kernels.cpu import CpuKernel
from pipeline.data.batch import IGNORE_INDEX
from pipeline.data.loader import PackedLoader, StepBatch
from pipeline.data.packed_dataset import PackedDataset
from pipeline.memory.apply import attach_features
from pipeline.metrics.meter import StepTimer
from pipeline.model.build import build_model
from pipeline.parallel.mesh import Mesh, create_mesh
from pipeline.plan.job import JobPlan, plan_job
from pipeline.plan.run_dir import RunDir
from pipeline.recipe.load import load
from pipeline.train.engine import create_engine, init_distributed, zero3_config
from pipeline.train.evaluate import evaluate, open_held_out
from pipeline.train.guard import Guard, NotFiniteError
from pipeline.train.self_check import shard_of_sample
from pipeline.train.step import StepResult, Trainee, model_inputs, run_step
from tests.multiprocess.case import Case
from tests.multiprocess.parity import plan_of, save_weights, whole_sample

LR, DECAY = 0.1, 0.5
MESHES = {"sp": {"sp": 2, "dp": 1}, "dp": {"sp": 1, "dp": 2}}
HELD_OUT = 3  # not a multiple of dp: a replica runs one that does not count
STEPS = 4
SEQ_LEN = 64
NAN_TOKEN = 5
BFLOAT16, ON_HOST = "model.dtype=bfloat16", "zero.offload_optimizer=cpu"
NOT_FINITE = [
    *((f"zero.stage={stage}",) for stage in range(4)),
    *((f"zero.stage={stage}", BFLOAT16) for stage in range(4)),
    *((f"zero.stage={stage}", ON_HOST) for stage in (1, 2, 3)),
    *((f"zero.stage={stage}", BFLOAT16, ON_HOST) for stage in (1, 2, 3)),
]
EVALUATED = [(3, "sp"), (3, "dp"), (0, "sp"), (2, "dp")]
"""ZeRO stage and mesh."""


@contextmanager
def trainee_of(plan: JobPlan, meshes: dict[int, Mesh]) -> Iterator[Trainee]:
    model = build_model(plan.recipe.model, attention=ALST_ATTENTION, seed=0, zero3=zero3_config(plan))
    engine = create_engine(model, plan, attach_features(model, plan))
    yield Trainee(engine, plan, meshes[plan.sp], CpuKernel(), torch.device("cpu"))
    engine.destroy()


def weights_of(trainee: Trainee) -> dict[str, torch.Tensor]:
    """The optimizer's own, whole, in float32. Collective."""
    found = {}
    for name, parameter in trainee.engine.module.named_parameters():
        whole = parameter if trainee.plan.recipe.zero.stage == 0 else safe_get_full_fp32_param(parameter)
        found[name] = whole.detach().float().clone()
    return found


def step_on(trainee: Trainee, *, valid_tokens: int, change: Callable[[Any], None]) -> StepResult:
    """One step on the first sample of the parity suite, after `change` of this rank's batch."""
    batch = shard_of_sample(whole_sample(0, trainee.plan.seq_len), trainee.layout, trainee.mesh.sp_rank)
    change(batch)
    return run_step(
        trainee, [model_inputs(batch, trainee)], valid_tokens=valid_tokens, learning_rate=LR, timer=StepTimer()
    )


def decay(plan: JobPlan, meshes: dict[int, Mesh]) -> dict[str, float]:
    """By parameter, weight after over weight before a step whose gradients are all zero."""
    with trainee_of(plan, meshes) as trainee:
        before = weights_of(trainee)
        step_on(trainee, valid_tokens=0, change=lambda batch: batch.labels.fill_(IGNORE_INDEX))
        after = weights_of(trainee)
    factors = {}
    for name, weight in before.items():
        ratio = after[name][weight != 0] / weight[weight != 0]
        assert (ratio.max() - ratio.min()) < 1e-5, name
        factors[name] = float(ratio.mean())
    return factors


def not_finite(plan: JobPlan, meshes: dict[int, Mesh]) -> dict[str, Any]:
    """A step in which rank 1 alone meets a token whose embedding is nan."""

    def only_rank_1_meets_it(batch: Any) -> None:
        batch.input_ids[batch.input_ids == NAN_TOKEN] = NAN_TOKEN + 1
        if dist.get_rank() == 1:
            batch.input_ids[0, -1] = NAN_TOKEN

    with trainee_of(plan, meshes) as trainee:
        before = weights_of(trainee)
        bad = step_on(trainee, valid_tokens=10, change=only_rank_1_meets_it)
        after = weights_of(trainee)
    return {
        "loss": str(bad.loss),
        "grad_norm": str(bad.grad_norm),
        "update_applied": bad.update_applied,
        "first_not_finite": bad.first_not_finite,
        "unchanged": all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before),
    }


def guarded(plan: JobPlan, meshes: dict[int, Mesh], dataset: PackedDataset, run_dir: RunDir) -> dict[str, Any]:
    """Steps until one is not finite; what the guard then says and leaves behind.

    `backward` is what it says of the first step, whose loss is finite, as if its gradient were not.
    """
    saved_aside: list[int] = []
    backward: str | None = None
    with trainee_of(plan, meshes) as trainee:
        guard = Guard(trainee, dataset, run_dir, saved_aside.append)
        for batch in loader_of(plan, trainee.mesh, dataset, steps=dataset.samples):
            result = step_of(trainee, batch)
            if batch.step == 0:
                no_gradient = replace(result, grad_norm=math.nan, update_applied=False)
                backward = said_by(Guard(trainee, dataset, run_dir, lambda step: None), batch, no_gradient)
            if message := said_by(guard, batch, result):
                record = json.loads(run_dir.nan_record(batch.step + 1).read_text()) if dist.get_rank() == 0 else {}
                found = {"message": message, "step": batch.step + 1, "saved_aside": saved_aside, "record": record}
                return found | {"backward": backward}
    raise AssertionError("every step was finite")


def said_by(guard: Guard, batch: StepBatch, result: StepResult) -> str | None:
    try:
        guard.check(batch, result)
    except NotFiniteError as error:
        return str(error)
    return None


def loader_of(plan: JobPlan, mesh: Mesh, dataset: PackedDataset, *, steps: int) -> PackedLoader:
    return PackedLoader(
        dataset,
        sp_rank=mesh.sp_rank,
        sp=mesh.sp,
        dp_rank=mesh.dp_rank,
        dp=mesh.dp,
        grad_accumulation=plan.recipe.train.grad_accumulation,
        steps=steps,
        seed=plan.recipe.data.seed,
        held_out=plan.held_out,
    )


def step_of(trainee: Trainee, batch: StepBatch) -> StepResult:
    inputs = [model_inputs(micro_batch, trainee) for micro_batch in batch.micro_batches]
    return run_step(trainee, inputs, valid_tokens=batch.valid_tokens, learning_rate=LR, timer=StepTimer())


def evaluation(plan: JobPlan, meshes: dict[int, Mesh], dataset: PackedDataset) -> dict[str, Any]:
    """The losses of a few steps, and the held-out loss before the first and after each."""
    held_out = open_held_out(plan, dataset)
    losses, samples, found = [], [], []
    with trainee_of(plan, meshes) as trainee:
        if held_out is not None:
            found.append(evaluate(trainee, held_out).loss)
        for batch in loader_of(plan, trainee.mesh, dataset, steps=STEPS):
            losses.append(step_of(trainee, batch).loss)
            samples += batch.samples
            if held_out is not None:
                found.append(evaluate(trainee, held_out).loss)
                assert trainee.engine.module.training
        weights = weights_of(trainee)
    checksum = math.fsum(float(weight.double().sum()) for weight in weights.values())
    return {
        "losses": losses,
        "samples": samples,
        "held_out": [] if held_out is None else list(held_out.samples),
        "evaluations": found,
        "checksum": checksum,
    }


def plan_on_packed(weights: Path, stage: int, mesh: str, *overrides: str) -> JobPlan:
    """Of a case on the packed data set, whose samples are shorter than those of the parity suite."""
    case = Case(stage=stage, accumulation=2, **MESHES[mesh])
    return plan_of(replace(case, overrides=("train.self_check=null", f"data.seq_len={SEQ_LEN}", *overrides)), weights)


def results(folder: Path, meshes: dict[int, Mesh]) -> Iterator[tuple[str, Any]]:
    weights, with_nan = folder / "llama", folder / "llama-with-nan"
    adamw = f"optimizer={{name: adamw, lr: {LR}, weight_decay: {DECAY}}}"
    sgd = f"optimizer={{name: sgd, lr: {LR}, weight_decay: {DECAY}}}"
    for stage in range(4):
        plan = plan_of(Case(sp=2, stage=stage, overrides=(adamw,)), weights)
        yield f"decay adamw zero{stage}", decay(plan, meshes)
    for overrides in ((sgd,), (adamw, "optimizer.weight_decay_on=all")):
        plan = plan_of(Case(sp=2, stage=3, overrides=overrides), weights)
        yield f"decay {overrides[0].split(',')[0].split()[-1]} zero3 {len(overrides)}", decay(plan, meshes)
    for overrides in NOT_FINITE:
        plan = plan_of(Case(sp=2, overrides=overrides), with_nan)
        yield f"not finite {' '.join(overrides)}", not_finite(plan, meshes)
    dataset = PackedDataset.open(folder / "packed")
    for stage, mesh in EVALUATED:
        for name, recipe in (("off", "null"), ("on", f"{{every_steps: 1, samples: {HELD_OUT}}}")):
            plan = plan_on_packed(weights, stage, mesh, f"evaluation={recipe}")
            yield f"evaluation {name} zero{stage} {mesh}", evaluation(plan, meshes, dataset)
    for stage, mesh in EVALUATED:
        run_dir = RunDir(folder / f"run zero{stage} {mesh}")
        run_dir.path.mkdir(exist_ok=True)
        plan = plan_on_packed(with_nan, stage, mesh)
        yield f"guard zero{stage} {mesh}", guarded(plan, meshes, dataset, run_dir)


def plant_nan(source: Path, folder: Path) -> None:
    """The weights in `source`, with the embedding of one token nan: a sample without that token is as ever."""
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.get_input_embeddings().weight[NAN_TOKEN] = float("nan")
    model.save_pretrained(folder)


def main(folder_path: str) -> None:
    folder = Path(folder_path)
    torch.set_num_threads(1)
    if os.environ["RANK"] == "0":
        save_weights("llama", folder / "llama")
        plant_nan(folder / "llama", folder / "llama-with-nan")
    # Any plan for the CPU starts the process group.
    init_distributed(plan_job(load("tiny", overrides=["hardware.gpus_per_node=1"])))
    dist.barrier()
    register()
    meshes = {sp: create_mesh(sp) for sp in (1, 2)}
    found = {}
    for name, result in results(folder, meshes):
        found[name] = result
        if dist.get_rank() == 0:
            (folder / "results.json").write_text(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo and DeepSpeed abort in about one orderly exit of eight


if __name__ == "__main__":
    main(*sys.argv[1:])
