"""Every gradient of a distributed run against the stock model: one process, eager, one document at a time.

A worker of `test_parity`: each rank runs `python -m tests.multiprocess.parity CASES.json RESULTS.json`, several cases
in one launch. The reference is stock transformers in float64 and again in the case's dtype; how far the two lie apart
is the stock model's own rounding, and the measure for ours.
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_grad

from pipeline.attention.function import NAME as ALST_ATTENTION
from pipeline.attention.function import register
from pipeline.attention.kernels.cpu import CpuKernel
from pipeline.data.batch import IGNORE_INDEX, Batch
from pipeline.memory.apply import attach_features
from pipeline.model.build import build_model
from pipeline.parallel.mesh import Mesh, create_mesh
from pipeline.parallel.shard import shard_of
from pipeline.plan.job import JobPlan, plan_job
from pipeline.recipe.load import load
from pipeline.recipe.schema import ModelRecipe
from pipeline.train.engine import create_engine, init_distributed, loss_scale
from pipeline.train.step import Trainee, model_inputs
from tests.architectures import ARCHITECTURES

VOCAB = 97
SEQ_LEN = 120
DOCUMENTS = ((0, 31, 77, 119, 120), (0, 120), (0, 1, 64, 113), (0, 59, 61, 120))
"""Of consecutive samples: borders inside shards, on them, one long document, a padded tail, one-token documents."""


@dataclass(frozen=True)
class Case:
    """A point of the parity suite. Whatever is not named is as in configs/tiny.yaml."""

    architecture: str = "llama"
    sp: int = 1
    stage: int = 3
    accumulation: int = 1
    overrides: tuple[str, ...] = ()
    engine: bool = True
    """False: no DeepSpeed, in float64."""
    steps: int = 1

    @property
    def name(self) -> str:
        engine = f"zero{self.stage}" if self.engine else "float64"
        extra = "".join(f" {override}" for override in self.overrides)
        steps = f" steps{self.steps}" if self.steps > 1 else ""
        return f"{self.architecture} sp{self.sp} {engine} accumulation{self.accumulation}{steps}{extra}"


@dataclass
class Result:
    """Relative differences, loss and worst gradient tensor, per step; and the stock model's own rounding."""

    loss: float = 0.0
    gradient: float = 0.0
    tensor: str = ""
    rounding: float = 0.0
    zero_gradients: list[str] = field(default_factory=list)
    """Gradients that are absolutely zero in the reference and not in ours."""


def plan_of(case: Case, world_size: int) -> JobPlan:
    """The real plan of a case, through the real recipe."""
    config = ARCHITECTURES[case.architecture] | {"vocab_size": VOCAB}
    asked = [
        "model.config=" + json.dumps(config),
        f"data.seq_len={SEQ_LEN}",
        f"parallel.sp={case.sp}",
        f"hardware.gpus_per_node={world_size}",
        f"zero.stage={case.stage}",
        f"train.grad_accumulation={case.accumulation}",
        "train.self_check=null",
        "memory.tiled_loss.tile_tokens=11",
        "memory.tiled_mlp.tile_tokens=13",
        "optimizer={name: sgd, lr: 1e-5, weight_decay: 0.0}",
        *case.overrides,
    ]
    return plan_job(load("tiny", overrides=asked))


def whole_sample(position: int) -> Batch:
    """The `position`-th sample of training, whole. Valid labels are unequal over samples and shards, on purpose."""
    bounds = DOCUMENTS[position % len(DOCUMENTS)]
    generator = torch.Generator().manual_seed(100 + position)
    input_ids = torch.randint(3, VOCAB, (SEQ_LEN,), generator=generator)
    labels = input_ids.roll(-1)
    labels[[stop - 1 for stop in bounds[1:]]] = IGNORE_INDEX
    labels[bounds[-1] :] = IGNORE_INDEX
    labels[torch.rand(SEQ_LEN, generator=generator) < (0.0, 0.6, 0.3)[position % 3]] = IGNORE_INDEX
    if position % 2 == 0:
        labels[: SEQ_LEN // 2] = IGNORE_INDEX  # with sp = 2 the first rank has nothing to learn
    position_ids = torch.cat([torch.arange(stop - start) for start, stop in pairwise((*bounds, SEQ_LEN))])
    return Batch(
        input_ids=input_ids[None],
        labels=labels[None],
        position_ids=position_ids[:SEQ_LEN][None],
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        n_tokens=bounds[-1],
        n_valid=int((labels != IGNORE_INDEX).sum()),
        seq_len=SEQ_LEN,
        sample=position,
    )


def shard_batch(whole: Batch, mesh: Mesh) -> Batch:
    part = shard_of(mesh.sp_rank, sp=mesh.sp, seq_len=SEQ_LEN)
    cut = slice(part.start, part.stop)
    values = {name: getattr(whole, name) for name in whole.__dataclass_fields__}
    for name in ("input_ids", "labels", "position_ids"):
        values[name] = values[name][:, cut]
    return Batch(**values)


def build(recipe: ModelRecipe, *, attention: str, dtype: torch.dtype) -> Any:
    """The same weights every time; scaled up, so that attention is far from uniform."""
    model = build_model(recipe, attention=attention, seed=0).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(4.0)
            if "sinks" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator).to(dtype))
    return model


def reference(plan: JobPlan, samples: list[list[Batch]], *, dtype: torch.dtype) -> list[tuple[float, dict[str, Any]]]:
    """(loss, gradients) of each step: stock, a document at a time, SGD."""
    # In float64 through sdpa: eager attention itself drops to float32 for its softmax.
    attention = "sdpa" if dtype == torch.float64 else "eager"
    model = build(plan.recipe.model, attention=attention, dtype=dtype)
    found = []
    for step in samples:
        valid = sum(batch.n_valid for batch in step)
        model.zero_grad()
        total = 0.0
        for batch in step:
            for start, stop in pairwise(batch.cu_seqlens.tolist()):
                loss = _document_loss(model, batch, slice(start, stop)) / max(valid, 1)
                loss.backward()
                total += float(loss.detach())
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((total, gradients))
        _clipped_sgd(model, gradients, plan)
    return found


def _clipped_sgd(model: Any, gradients: dict[str, Any], plan: JobPlan) -> None:
    """The update that DeepSpeed makes with this recipe."""
    norm = float(torch.stack([grad.double().norm() for grad in gradients.values()]).norm())
    clip = plan.recipe.train.grad_clip
    factor = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in gradients:
                parameter -= plan.recipe.optimizer.lr * factor * gradients[name]


def _document_loss(model: Any, batch: Batch, document: slice) -> torch.Tensor:
    logits = model(
        input_ids=batch.input_ids[:, document], position_ids=batch.position_ids[:, document], use_cache=False
    ).logits
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits[0].to(wide), batch.labels[0, document], ignore_index=IGNORE_INDEX, reduction="sum")


def distributed(
    case: Case, plan: JobPlan, mesh: Mesh, samples: list[list[Batch]]
) -> Iterator[tuple[float, dict[str, Any]]]:
    """(loss, gradients) of each step through the project's own model, engine and loss scale."""
    dtype = torch.float32 if case.engine else torch.float64
    model = build(plan.recipe.model, attention=ALST_ATTENTION, dtype=dtype)
    attached = attach_features(model, plan)
    engine = create_engine(model, plan, attached) if case.engine else None
    trainee = Trainee(engine, plan, mesh, CpuKernel(), torch.device("cpu"))
    for step in samples:
        valid = sum(batch.n_valid for batch in step)
        mine = [shard_batch(batch, mesh) for batch in step[mesh.dp_rank :: mesh.dp]]
        total = torch.zeros((), dtype=torch.float64)
        for number, batch in enumerate(mine):
            loss = (engine or model)(**model_inputs(batch, trainee))
            total += loss.detach().double()
            if engine is None:
                (loss / max(valid, 1)).backward()
                continue
            engine.backward(loss * loss_scale(plan, valid))
            if number < len(mine) - 1:
                engine.step()
        dist.all_reduce(total)
        yield float(total) / max(valid, 1), _gradients(model, engine)
        if engine is not None:
            engine.step()
    if engine is not None:
        engine.destroy()


def _gradients(model: Any, engine: Any) -> dict[str, Any]:
    if engine is not None:
        return {name: safe_get_full_grad(p) for name, p in model.named_parameters()}
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
    return {name: p.grad for name, p in model.named_parameters()}


def compare(case: Case, mesh: Mesh) -> Result:
    """Run a case on all ranks; the result is rank 0's."""
    plan = plan_of(case, mesh.world_size)
    samples = [
        [whole_sample(step * plan.samples_per_step + offset) for offset in range(plan.samples_per_step)]
        for step in range(case.steps)
    ]
    exact = reference(plan, samples, dtype=torch.float64)
    stock = reference(plan, samples, dtype=torch.float32) if case.engine else exact
    result = Result()
    for (loss, gradients), (exact_loss, exact_grads), (_, stock_grads) in zip(
        distributed(case, plan, mesh, samples), exact, stock, strict=True
    ):
        result.loss = max(result.loss, abs(loss - exact_loss) / max(abs(exact_loss), 1e-30))
        result.rounding = max(result.rounding, *_differences(stock_grads, exact_grads).values())
        ours = _differences(gradients, exact_grads)
        worst = max(ours, key=ours.__getitem__)
        if ours[worst] >= result.gradient:
            result.gradient, result.tensor = ours[worst], worst
        result.zero_gradients += [
            name
            for name, grad in gradients.items()
            if grad is not None and (name not in exact_grads or not exact_grads[name].any()) and grad.any()
        ]
    return result


def _differences(gradients: dict[str, Any], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    """Per tensor, relative to the larger of its norm and 1e-4 of the global norm."""
    floor = 1e-4 * float(torch.stack([grad.double().norm() for grad in exact.values()]).norm())
    found = {}
    for name, grad in exact.items():
        mine = gradients[name]
        difference = float("inf") if mine is None else float((mine.double() - grad.double()).norm())
        found[name] = difference / max(float(grad.double().norm()), floor, 1e-30)
    return found


def main(cases_path: str, results_path: str) -> None:
    cases = [Case(**raw | {"overrides": tuple(raw["overrides"])}) for raw in json.loads(Path(cases_path).read_text())]
    torch.set_num_threads(1)
    init_distributed(plan_of(cases[0], int(os.environ["WORLD_SIZE"])))
    register()
    meshes = {sp: create_mesh(sp) for sp in sorted({case.sp for case in cases})}
    results = {}
    for case in cases:
        results[case.name] = asdict(compare(case, meshes[case.sp]))
        if dist.get_rank() == 0:
            Path(results_path).write_text(json.dumps(results))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo and DeepSpeed abort in about one orderly exit of eight


if __name__ == "__main__":
    main(*sys.argv[1:])
