"""The two ways to train that the product is compared with, each with what it does to the stock model and its loss."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from deepspeed.runtime.activation_checkpointing.offload_activations import (
    get_checkpoint_hidden_states_offloading_ctx_manager,
)
from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP, UlyssesSPAttentionHF, sequence_tiled_compute

from pipeline.errors import UserError
from pipeline.plan.job import JobPlan
from pipeline.recipe.schema import Gpu

LOSS_TILE_BYTES = 2**30
"""Of float32 logits, as the reference derives its number of tiles."""
IGNORED = -100

Step = Callable[[], AbstractContextManager[Any]]


class Way(Protocol):
    """A baseline."""

    attention: str
    """transformers' name of the kernel."""

    def prepare(self, model: Any) -> Any:
        """Change the stock model; what DeepSpeed is to be told as `mpu`."""

    def config(self) -> dict[str, Any]:
        """What DeepSpeed's configuration has more."""

    def around_step(self) -> Step:
        """A context for forward and backward of each step."""

    def loss(
        self, engine: Any, *, input_ids: torch.Tensor, position_ids: torch.Tensor, shift_labels: torch.Tensor
    ) -> torch.Tensor:
        """Mean over the labels that count."""


def way_of(kind: str, plan: JobPlan) -> Way:
    """Raises UserError for features that the way has not."""
    memory, checkpoint = plan.recipe.memory, plan.recipe.memory.activation_checkpoint
    ours = {
        "memory.tiled_norm": memory.tiled_norm is not None,
        "memory.sequence_chunks": memory.sequence_chunks is not None,
        "memory.activation_checkpoint: null": checkpoint is None,
        "keep_attention": checkpoint is not None and checkpoint.keep_attention is True,
        "layers_per_group": checkpoint is not None and checkpoint.layers_per_group != 1,
        "offload: disk": checkpoint is not None and checkpoint.offload == "disk",
        "grad_accumulation": plan.recipe.train.grad_accumulation != 1,
        f"kernel liger for {plan.model.model_type}": _wants_liger(plan) and plan.model.model_type != "llama",
    }
    if kind == "plain":
        ours |= {
            "memory.tiled_loss": memory.tiled_loss is not None,
            "memory.tiled_mlp": memory.tiled_mlp is not None,
            "offload": checkpoint is not None and checkpoint.offload is not None,
            "parallel.sp": plan.sp != 1,
        }
    if refused := [name for name, has in ours.items() if has]:
        raise UserError(f"baseline {kind}: has no {', '.join(refused)}; take a rung of the ladder that it has")
    return {"plain": Plain, "reference": Reference}[kind](plan)


def _wants_liger(plan: JobPlan) -> bool:
    loss = plan.recipe.memory.tiled_loss
    return loss is not None and loss.kernel == "liger"


class Plain:
    """Hugging Face and DeepSpeed alone."""

    def __init__(self, plan: JobPlan) -> None:
        self.attention = attention_of(plan)

    def prepare(self, model: Any) -> None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def config(self) -> dict[str, Any]:
        return {}

    def around_step(self) -> Step:
        return nullcontext

    def loss(
        self, engine: Any, *, input_ids: torch.Tensor, position_ids: torch.Tensor, shift_labels: torch.Tensor
    ) -> torch.Tensor:
        outputs = engine(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        return stock_loss(engine.module, outputs.logits, shift_labels)


class Reference(Plain):
    """ALST as DeepSpeed's tutorial wires it, as much of it as the plan has on."""

    def __init__(self, plan: JobPlan) -> None:
        super().__init__(plan)
        self._plan = plan
        memory = plan.recipe.memory
        self._tiled_loss = None if memory.tiled_loss is None else memory.tiled_loss.kernel
        self._tiled_mlp = memory.tiled_mlp is not None
        checkpoint = memory.activation_checkpoint
        self._offload = checkpoint is not None and checkpoint.offload == "cpu"
        self._sp_group: Any = None

    def prepare(self, model: Any) -> Any:
        super().prepare(model)
        if self._tiled_loss == "liger":
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama(model=model, swiglu=not self._tiled_mlp)
        if self._tiled_mlp:
            _tile_mlps(model)
        mpu = UlyssesSPAttentionHF.register_with_transformers(
            model_name_or_path=model,
            core_attn_implementation=self.attention,
            sequence_parallel_size=self._plan.sp,
            micro_batch_size=1,
            seq_length_is_variable=True,
        )
        self._sp_group = None if mpu is None else mpu.get_sequence_parallel_group()
        return mpu

    def config(self) -> dict[str, Any]:
        return {} if self._plan.sp == 1 else {"sequence_parallel_size": self._plan.sp}

    def around_step(self) -> Step:
        if not self._offload:
            return nullcontext
        manager = get_checkpoint_hidden_states_offloading_ctx_manager()
        return lambda: manager

    def loss(
        self, engine: Any, *, input_ids: torch.Tensor, position_ids: torch.Tensor, shift_labels: torch.Tensor
    ) -> torch.Tensor:
        inputs = {"input_ids": input_ids, "position_ids": position_ids}
        if self._tiled_loss == "own":
            loss = _tiled_loss(engine.module, inputs, shift_labels)
        elif self._tiled_loss == "liger":
            loss = engine(**inputs, shift_labels=shift_labels, use_cache=False).loss
        else:
            loss = super().loss(engine, **inputs, shift_labels=shift_labels)
        return loss if self._sp_group is None else _over_ranks(loss, shift_labels, self._sp_group)


def attention_of(plan: JobPlan) -> str:
    """transformers' name of the kernel that the recipe asks for; `torch` is what its sdpa calls."""
    asked = plan.recipe.model.attention
    if plan.recipe.hardware.gpu is Gpu.CPU or asked in ("torch", "cpu"):
        return "sdpa"
    if asked != "auto":
        return asked
    present = {"flash_attention_3": "flash_attn_interface", "flash_attention_2": "flash_attn"}
    return next((name for name, module in present.items() if find_spec(module) is not None), "sdpa")


def stock_loss(model: Any, logits: torch.Tensor, shift_labels: torch.Tensor) -> torch.Tensor:
    """transformers' own, of labels that are shifted already."""
    loss: torch.Tensor = model.loss_function(
        logits=logits, labels=None, shift_labels=shift_labels, vocab_size=model.config.vocab_size
    )
    return loss


def _tiled_loss(model: Any, inputs: dict[str, torch.Tensor], shift_labels: torch.Tensor) -> torch.Tensor:
    """Backbone, then head and loss a tile of tokens at a time."""
    hidden_states = model.model(**inputs, use_cache=False).last_hidden_state
    tokens = shift_labels.shape[1]
    total = sequence_tiled_compute(
        _loss_sum,
        tokens,
        max(1, math.ceil(4 * tokens * model.config.vocab_size / LOSS_TILE_BYTES)),
        {"hidden_states": hidden_states, "shift_labels": shift_labels},
        {"model": model},
        "hidden_states",
        [model.lm_head.weight],
        output_unshard_dimension=0,
        output_reduction="sum",
    )
    return total / (shift_labels != IGNORED).sum().clamp(min=1)


def _loss_sum(hidden_states: torch.Tensor, shift_labels: torch.Tensor, model: Any) -> torch.Tensor:
    logits = model.lm_head(hidden_states)
    if not (shift_labels != IGNORED).any():
        return (logits.sum() * 0.0).float()  # transformers' mean over no label is nan
    return stock_loss(model, logits, shift_labels) * (shift_labels != IGNORED).sum()


def _over_ranks(loss: torch.Tensor, shift_labels: torch.Tensor, group: Any) -> torch.Tensor:
    """The mean over the whole sequence, from each rank's mean over its shard."""
    counts = dist_nn.all_gather((shift_labels != IGNORED).sum(), group=group)
    losses = dist_nn.all_gather(loss, group=group)
    weighed = sum(one * count for one, count in zip(losses, counts, strict=True))
    total: torch.Tensor = weighed / sum(counts).clamp(min=1)
    return total


def _tile_mlps(model: Any) -> None:
    """Every MLP of the class computes in tiles; how many, all ranks agree on in every call."""
    mlp_class = type(model.model.layers[0].mlp)
    whole = mlp_class.forward

    def tiled(mlp: Any, x: torch.Tensor) -> torch.Tensor:
        tiles = torch.tensor(math.ceil(x.shape[1] / x.shape[2]), device=x.device)
        dist.all_reduce(tiles, op=dist.ReduceOp.MAX)
        weights = [mlp.down_proj.weight, mlp.gate_proj.weight, mlp.up_proj.weight]
        out: torch.Tensor = TiledMLP.apply(whole, mlp, x, int(tiles), weights)
        return out

    mlp_class.forward = tiled
