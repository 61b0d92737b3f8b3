"""Before the first step: does the attached model on this mesh compute what the stock model computes on one rank?

The first tokens of the first sample go twice through the real engine with the real weights: as training will run
them, and with every feature off, one document at a time through the stock model's own forward. Loss and gradient norm
must agree; a difference is fatal.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from pipeline.data.batch import IGNORE_INDEX, Batch
from pipeline.errors import RunError
from pipeline.memory.apply import features_off
from pipeline.metrics.meter import StepTimer
from pipeline.parallel.shard import Layout
from pipeline.plan.job import JobPlan
from pipeline.train.step import StepResult, Trainee, model_inputs, run_step


@dataclass(frozen=True)
class Check:
    """Loss and gradient norm, ours and stock."""

    loss: float
    stock_loss: float
    grad_norm: float
    stock_grad_norm: float

    @property
    def difference(self) -> float:
        """The larger relative difference of the two."""
        return max(
            abs(self.loss - self.stock_loss) / max(abs(self.stock_loss), 1e-30),
            abs(self.grad_norm - self.stock_grad_norm) / max(self.stock_grad_norm, 1e-30),
        )


def self_check(trainee: Trainee, whole: Batch) -> Check:
    """Compare on one short sample, given whole to every rank. Collective.

    Raises RunError if they differ by more than the recipe's tolerance. Weights and optimizer are left as they were.
    """
    recipe = trainee.plan.recipe.train.self_check
    assert recipe is not None, "called only when the recipe asks for it"
    sample = _in_two_documents(whole)
    mesh = trainee.mesh
    model: PreTrainedModel = trainee.engine.module
    with features_off(model, forward=_stock_loss_sum, attention=stock_attention(model)):
        stock = _trial_step(trainee, _documents(sample, trainee.device), sample.n_valid * mesh.world_size)
    layout = Layout(sample.seq_len, mesh.sp, _chunk_tokens(trainee.plan, sample.seq_len))
    inputs = model_inputs(shard_of_sample(sample, layout, mesh.sp_rank), trainee, chunk_tokens=layout.chunk_tokens)
    ours = _trial_step(trainee, [inputs], sample.n_valid * mesh.dp)
    if ours.grad_norm is None or stock.grad_norm is None:
        raise RunError(f"self-check: DeepSpeed gave no gradient norm at zero.stage {trainee.plan.recipe.zero.stage}")
    check = Check(ours.loss, stock.loss, ours.grad_norm, stock.grad_norm)
    if not check.difference <= recipe.tolerance:
        raise RunError(
            f"self-check on {whole.n_tokens:,} tokens: loss {check.loss:.6f} and gradient norm {check.grad_norm:.6f} "
            f"at sp={mesh.sp}, but {check.stock_loss:.6f} and {check.stock_grad_norm:.6f} with the stock model at "
            f"sp=1: off by {check.difference:.1e}, allowed is {recipe.tolerance:.0e}. Training would go wrong; report "
            "it with plan.json, or set train.self_check.tolerance if the model's dtype explains it"
        )
    return check


def stock_attention(model: PreTrainedModel) -> str:
    """The implementation of transformers that computes this model's attention; sdpa knows no sinks and no soft-cap."""
    config = model.config.get_text_config()
    sinks = any(name.endswith("sinks") for name, _ in model.named_parameters())
    return "eager" if sinks or getattr(config, "attn_logit_softcapping", None) else "sdpa"


def _trial_step(trainee: Trainee, micro_batches: list[dict[str, Any]], valid_tokens: int) -> StepResult:
    """One step at learning rate 0 through the real engine; optimizer and counters are then as if it had not been."""
    engine = trainee.engine
    result = run_step(
        trainee,
        _one_step_of(micro_batches, engine),
        valid_tokens=valid_tokens,
        learning_rate=0.0,
        timer=StepTimer(),
    )
    engine.set_gradient_accumulation_boundary(None)  # DeepSpeed counts again
    engine.micro_steps = engine.global_steps = engine.global_samples = 0
    for state in getattr(engine.optimizer, "optimizer", engine.optimizer).state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                value.zero_()
            elif isinstance(value, int):  # CPU Adam counts its steps in a plain number
                state[name] = 0
    return result


def _one_step_of(micro_batches: list[dict[str, Any]], engine: Any) -> Iterator[dict[str, Any]]:
    """However many micro-batches the recipe accumulates, the step ends with the last of these."""
    for number, inputs in enumerate(micro_batches, start=1):
        engine.set_gradient_accumulation_boundary(number == len(micro_batches))
        yield inputs


def _stock_loss_sum(model: PreTrainedModel, labels: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    """The loss sum of one document by the stock forward."""
    logits = type(model).forward(model, use_cache=False, **inputs).logits[0]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, labels[0], ignore_index=IGNORE_INDEX, reduction="sum")


def _documents(sample: Batch, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """What the stock model is called with, [1, len] each, for every document."""
    lengths = sample.cu_seqlens.diff().tolist()
    names = ("input_ids", "position_ids", "labels")
    parts = [getattr(sample, name)[:, : sample.n_tokens].to(device).split(lengths, dim=1) for name in names]
    return [dict(zip(names, tensors, strict=True)) for tensors in zip(*parts, strict=True)]


def _in_two_documents(whole: Batch) -> Batch:
    """The sample; if it is a single document, cut in two, so that a border is checked as well."""
    if len(whole.cu_seqlens) > 2 or whole.n_tokens < 2:
        return whole
    cut = max(1, whole.n_tokens // 3)
    labels, position_ids = whole.labels.clone(), whole.position_ids.clone()
    labels[:, cut - 1] = IGNORE_INDEX
    position_ids[:, cut : whole.n_tokens] = torch.arange(whole.n_tokens - cut)
    return replace(
        whole,
        labels=labels,
        position_ids=position_ids,
        cu_seqlens=torch.tensor([0, cut, whole.n_tokens], dtype=whole.cu_seqlens.dtype),
        n_valid=int((labels != IGNORE_INDEX).sum()),
    )


def _chunk_tokens(plan: JobPlan, seq_len: int) -> int:
    """Of the short sample: three chunks where training has several, so that their borders are checked as well."""
    if plan.recipe.memory.sequence_chunks is None:
        return seq_len
    return min(plan.chunk_tokens, ceil(seq_len / (3 * plan.sp)) * plan.sp)


def shard_of_sample(sample: Batch, layout: Layout, sp_rank: int) -> Batch:
    """A rank's part of a sample that every rank holds whole."""

    def own(whole: torch.Tensor) -> torch.Tensor:
        return torch.cat([whole[:, part.start : part.stop] for part in layout.shards(sp_rank)], dim=1)

    return replace(
        sample,
        input_ids=own(sample.input_ids),
        labels=own(sample.labels),
        position_ids=own(sample.position_ids),
    )
