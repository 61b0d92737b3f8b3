"""Every gradient of a distributed run against the stock model: one process, eager, one document at a time.

A worker of `test_parity`: each rank runs `python -m tests.multiprocess.parity CASES.json FOLDER`, several cases
in one launch. The reference is stock transformers in float64 and again in the case's dtype; how far the two lie apart
is the stock model's own rounding, and the measure for ours.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, pairwise
from pathlib import Path
from types import MethodType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_grad
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from pipeline.attention.function import NAME as ALST_ATTENTION
from pipeline.attention.function import register
from pipeline.attention.kernels import AttentionKernel, choose, cpu, needs_of
from pipeline.attention.kernels.cpu import CpuKernel
from pipeline.attention.segments import Segments, segments_of
from pipeline.data.batch import IGNORE_INDEX, Batch
from pipeline.memory.apply import attach_features
from pipeline.metrics.meter import StepTimer
from pipeline.model.build import build_model
from pipeline.model.parity import NothingBelowFloat64
from pipeline.parallel.mesh import Mesh, create_mesh
from pipeline.plan.job import JobPlan, plan_job
from pipeline.recipe.load import load
from pipeline.recipe.schema import Gpu
from pipeline.train import step as step_module
from pipeline.train.engine import create_engine, init_distributed, loss_scale, zero3_config
from pipeline.train.self_check import self_check, shard_of_sample
from pipeline.train.step import Trainee, model_inputs, run_step
from tests.architectures import ARCHITECTURES
from tests.multiprocess.case import Case

BASE = Path(__file__).with_name("parity.yaml")
VOCAB = 97
_references: dict[tuple, list] = {}
DOCUMENTS = ((0, 31, 77, 117, 118, None), (0, None), (0, 1, 64, 113), (0, 59, 61, None))
"""Of consecutive samples: borders inside shards and on them, one long document, a padded tail, one-token documents.
None is the end of the sample."""


@dataclass
class Result:
    """Relative differences, loss and worst gradient tensor, per step; and the stock model's own rounding."""

    loss: float = 0.0
    gradient: float = 0.0
    tensor: str = ""
    rounding: float = 0.0
    zero_gradients: list[str] = field(default_factory=list)
    """Gradients that are absolutely zero in the reference and not in ours."""


def plan_of(case: Case, weights: Path) -> JobPlan:
    """The real plan of a case, through the real recipe."""
    asked = [
        f"model.name_or_path={weights}",
        f"data.seq_len={case.seq_len}",
        f"parallel.sp={case.sp}",
        f"hardware.gpus_per_node={case.ranks}",
        f"hardware.gpu={case.gpu}",
        f"zero.stage={case.stage}",
        f"train.grad_accumulation={case.accumulation}",
        f"train.self_check={{tokens: {case.seq_len}, tolerance: 3e-6}}",
        *case.overrides,
    ]
    return plan_job(load(BASE, overrides=asked))


def whole_sample(position: int, seq_len: int) -> Batch:
    """The `position`-th sample of training, whole. Valid labels are unequal over samples and shards, on purpose."""
    bounds = tuple(seq_len if bound is None else bound for bound in DOCUMENTS[position % len(DOCUMENTS)])
    generator = torch.Generator().manual_seed(100 + position)
    input_ids = torch.randint(3, VOCAB, (seq_len,), generator=generator)
    labels = input_ids.roll(-1)
    labels[[stop - 1 for stop in bounds[1:]]] = IGNORE_INDEX
    labels[bounds[-1] :] = IGNORE_INDEX
    labels[torch.rand(seq_len, generator=generator) < (0.0, 0.6, 0.3)[position % 3]] = IGNORE_INDEX
    if position % 2 == 0:
        labels[: seq_len // 2] = IGNORE_INDEX  # with sp = 2 the first rank has nothing to learn
    position_ids = torch.cat([torch.arange(stop - start) for start, stop in pairwise((*bounds, seq_len))])
    return Batch(
        input_ids=input_ids[None],
        labels=labels[None],
        position_ids=position_ids[None],
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        n_tokens=bounds[-1],
        n_valid=int((labels != IGNORE_INDEX).sum()),
        seq_len=seq_len,
        sample=position,
    )


def save_weights(architecture: str, folder: Path) -> None:
    """A Hugging Face folder of the architecture; weights scaled up, so that attention is far from uniform."""
    config = dict(ARCHITECTURES[architecture] | {"vocab_size": VOCAB})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config.pop("model_type")](**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(4.0)
            if "sinks" in name:
                parameter.normal_()
    model.save_pretrained(folder)


def reference(plan: JobPlan, samples: list[list[Batch]], *, dtype: torch.dtype) -> list[tuple[float, dict[str, Any]]]:
    """(loss, gradients) of each step: stock, a document at a time, plain torch."""
    model = in_dtype(build_model(plan.recipe.model, attention="eager", seed=0), dtype)
    optimizer = _plain_optimizer(model, plan)
    found = []
    for step in samples:
        valid = sum(batch.n_valid for batch in step)
        model.zero_grad()
        total = 0.0
        for batch in step:
            for start, stop in pairwise(batch.cu_seqlens.tolist()):
                with exactly(dtype):
                    loss = _document_loss(model, batch, slice(start, stop)) / max(valid, 1)
                    loss.backward()
                total += float(loss.detach())
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((total, gradients))
        if plan.recipe.train.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), plan.recipe.train.grad_clip)
        optimizer.step()
    return found


def reference_of(case: Case, plan: JobPlan, samples: list[list[Batch]], *, dtype: str) -> list:
    """`reference`, kept for the cases that share it: mesh, ZeRO and memory features change nothing about it."""
    recipe = plan.recipe
    trained = (recipe.model.dtype, repr(recipe.optimizer), recipe.train.grad_clip)
    key = (case.architecture, case.seq_len, len(samples), len(samples[0]), case.no_labels, dtype, *trained)
    if key not in _references:
        _references[key] = reference(plan, samples, dtype=getattr(torch, dtype))
    return _references[key]


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """The model in another dtype; in float64 with experts one by one, for the fused ones do not know it."""
    if dtype == torch.float64:
        model.config.get_text_config()._experts_implementation = "eager"
    return model.to(dtype)


def exactly(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """In float64 nothing drops to float32, as stock norms, routers and softmax otherwise do."""
    return NothingBelowFloat64() if dtype == torch.float64 else nullcontext()


def _plain_optimizer(model: Any, plan: JobPlan) -> torch.optim.Optimizer:
    """torch's own, as the recipe asks."""
    recipe = plan.recipe.optimizer
    if recipe.name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=recipe.lr)
    spared = ("norm", "embed", "bias")
    groups = [
        {"params": [p], "weight_decay": 0.0 if any(word in name for word in spared) else recipe.weight_decay}
        for name, p in model.named_parameters()
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps)


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
    zero3 = zero3_config(plan) if case.engine else None
    model = build_model(plan.recipe.model, attention=ALST_ATTENTION, seed=0, zero3=zero3)
    if not case.engine:
        model = in_dtype(model, torch.float64)
    attached = attach_features(model, plan)
    engine = create_engine(model, plan, attached) if case.engine else None
    device = device_of(plan)
    trainee = Trainee(engine, plan, mesh, kernel_of(model, plan, device), device)
    if case.self_check:
        self_check(trainee, samples[0][0])
    for step in samples:
        valid = sum(batch.n_valid for batch in step)
        mine = [
            model_inputs(shard_of_sample(batch, trainee.layout, mesh.sp_rank), trainee)
            for batch in step[mesh.dp_rank :: mesh.dp]
        ]
        yield _engine_step(trainee, mine, valid) if case.engine else _plain_step(model, mine, valid)
    if engine is not None:
        engine.destroy()


def device_of(plan: JobPlan) -> torch.device:
    """The CPU, or this rank's GPU."""
    return torch.device("cpu" if plan.recipe.hardware.gpu is Gpu.CPU else f"cuda:{os.environ['LOCAL_RANK']}")


def kernel_of(model: Any, plan: JobPlan, device: torch.device) -> AttentionKernel:
    """The CPU's algorithm, which runs anywhere, exactly; on a GPU in bfloat16, what a job would take there."""
    if device.type == "cpu" or plan.recipe.model.dtype == "float32":
        return CpuKernel()
    needs = needs_of(model.config, dtype=getattr(torch, plan.recipe.model.dtype), sp=plan.sp)
    return choose("auto", device=device, needs=needs).kernel


def _engine_step(trainee: Trainee, inputs: list[dict[str, Any]], valid: int) -> tuple[float, dict[str, Any]]:
    """The product's own step; gradients are taken between its last backward and the update."""
    engine, gradients = trainee.engine, {}
    update = type(engine).step

    def taking_gradients(self: Any) -> None:
        if self.is_gradient_accumulation_boundary():
            for name, parameter in self.module.named_parameters():
                grad = safe_get_full_grad(parameter)
                # ZeRO-0 gives its own tensors, which clipping changes in place.
                gradients[name] = grad if grad is None else grad.cpu().clone()
        update(self)

    engine.step = MethodType(taking_gradients, engine)
    rate = trainee.plan.recipe.optimizer.lr
    result = run_step(trainee, inputs, valid_tokens=valid, learning_rate=rate, timer=StepTimer())
    del engine.step
    return result.loss, gradients


def _plain_step(model: Any, inputs: list[dict[str, Any]], valid: int) -> tuple[float, dict[str, Any]]:
    """Without DeepSpeed, in float64: gradients are summed over ranks here."""
    total = torch.zeros((), dtype=torch.float64)
    for micro_batch in inputs:
        with exactly(torch.float64):
            loss = model(**micro_batch)
            (loss / max(valid, 1)).backward()
        total += loss.detach()
    dist.all_reduce(total)
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
    return float(total) / max(valid, 1), {name: p.grad for name, p in model.named_parameters()}


@contextmanager
def sabotaged(what: str) -> Iterator[None]:
    """Our code broken in one place: each of these once stood in somebody's trainer."""

    def twice_the_scale(plan: JobPlan, valid_tokens: int) -> float:
        return 2 * right(plan, valid_tokens)

    def one_document(cu_seqlens: torch.Tensor, *, device: torch.device) -> Segments:
        return segments_of(cu_seqlens[[0, -1]], device=device)

    def one_key_ahead(scores: torch.Tensor, block: Any, window: int | None) -> None:
        hide(scores, replace(block, q0=block.q0 + 1, q1=block.q1 + 1), window)

    hide, right = cpu._hide, loss_scale
    targets = {
        "scale": (step_module, "loss_scale", twice_the_scale),
        "boundary": (step_module, "segments_of", one_document),
        "mask": (cpu, "_hide", one_key_ahead),
    }
    if not what:
        yield
        return
    with mock.patch.object(targets[what][0], targets[what][1], targets[what][2]):
        yield


def compare(case: Case, mesh: Mesh, weights: Path) -> Result:
    """Run a case on all ranks; the result is rank 0's."""
    plan = plan_of(case, weights)
    per_step = plan.samples_per_step
    samples = [
        [whole_sample(step * per_step + offset, case.seq_len) for offset in range(per_step)]
        for step in range(case.steps)
    ]
    if case.no_labels:
        for batch in chain(*samples):
            batch.labels.fill_(IGNORE_INDEX)
        samples = [[replace(batch, n_valid=0) for batch in step] for step in samples]
    with sabotaged(case.sabotage):
        found = list(distributed(case, plan, mesh, samples))
    result = Result()
    if dist.get_rank() != 0:
        return result
    exact = reference_of(case, plan, samples, dtype="float64")
    stock = reference_of(case, plan, samples, dtype=plan.recipe.model.dtype) if case.engine else exact
    for (loss, gradients), (exact_loss, exact_grads), (_, stock_grads) in zip(found, exact, stock, strict=True):
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


def open_cases(cases_path: str, folder: str) -> tuple[list[Case], dict[str, Path], dict[int, Mesh]]:
    """The cases of a launch, their weights by architecture, and a mesh by sp; the process group is up. Collective."""
    raw_cases = json.loads(Path(cases_path).read_text())
    cases = [Case(**raw | {"overrides": tuple(raw["overrides"])}) for raw in raw_cases]
    weights = {name: Path(folder) / "weights" / name for name in {case.architecture for case in cases}}
    torch.set_num_threads(1)
    if os.environ["RANK"] == "0":
        for name, path in weights.items():
            if not path.exists():
                save_weights(name, path)
    gpu = cases[0].gpu
    if gpu != "cpu":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Any plan for the hardware starts the process group.
    init_distributed(plan_job(load("tiny", overrides=["hardware.gpus_per_node=1", f"hardware.gpu={gpu}"])))
    dist.barrier()
    register()
    return cases, weights, {sp: create_mesh(sp) for sp in sorted({case.sp for case in cases})}


def main(cases_path: str, folder: str) -> None:
    cases, weights, meshes = open_cases(cases_path, folder)
    results = {}
    for case in cases:
        results[case.name] = asdict(compare(case, meshes[case.sp], weights[case.architecture]))
        if dist.get_rank() == 0:
            (Path(folder) / "results.json").write_text(json.dumps(results))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo and DeepSpeed abort in about one orderly exit of eight


if __name__ == "__main__":
    main(*sys.argv[1:])
