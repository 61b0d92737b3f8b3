"""A tiny model trained once as stock and once with everything attached, in float64, and how far the two lie apart.

The stock model runs eager, one document at a time. Ours runs all documents packed, with every memory feature on and
tiles that divide nothing.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from pipeline.attention.function import AttentionContext
from pipeline.attention.kernels import AttentionKernel
from pipeline.attention.kernels.cpu import CpuKernel
from pipeline.attention.segments import segments_of
from pipeline.errors import RunError
from pipeline.memory.apply import attach
from pipeline.model.anatomy import decoder_layers
from pipeline.parallel.mesh import Mesh
from pipeline.parallel.shard import Layout
from pipeline.recipe.load import load

BOUNDS = (0, 23, 24, 61)
"""Documents of 23 tokens, of one, and of 37, which is longer than the windows of tiny models."""

LOSS_TILE_TOKENS, MLP_TILE_TOKENS, NORM_TILE_TOKENS = 11, 13, 17


@dataclass(frozen=True)
class Training:
    """What a model makes of the sample: the loss sum, and every parameter's gradient."""

    loss: float
    gradients: dict[str, torch.Tensor | None]


@dataclass(frozen=True)
class Difference:
    """Between two trainings, relative."""

    loss: float
    gradient: float
    """Of the worst tensor: relative to its norm, or to 1e-4 of the global norm if that is larger."""
    tensor: str
    not_zero: tuple[str, ...]
    """Parameters whose gradient is absolutely zero in the reference and not in the other."""


class NothingBelowFloat64(TorchDispatchMode):
    """What asks for float32 gets float64, in backward too.

    Stock code runs norms, router gates and eager softmax in float32 whatever the model's dtype is, and so cannot be
    compared closer than 1e-7. In here the same code is exact to 1e-15.
    """

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*map(_widened, args), **{name: _widened(value) for name, value in (kwargs or {}).items()})


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def build_tiny(model_type: str, config: dict[str, Any], *, attention: str) -> PreTrainedModel:
    """The same float64 weights every time: large enough that attention is far from uniform, and nothing is zero."""
    settings = CONFIG_MAPPING[model_type](**config)
    settings._experts_implementation = "eager"  # the fused one takes no float64
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(settings, attn_implementation=attention).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(4.0)
            else:  # norms, biases, sinks
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model.train()


def sample(vocab_size: int) -> dict[str, torch.Tensor]:
    """Three documents in one sequence [1, 61]; labels are shifted, and one of five is ignored."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, vocab_size, (1, BOUNDS[-1]), generator=generator)
    labels = torch.randint(3, vocab_size, (1, BOUNDS[-1]), generator=generator)
    labels[:, ::5] = -100
    position_ids = torch.cat([torch.arange(stop - start) for start, stop in pairwise(BOUNDS)])[None]
    return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}


def train_stock(model: PreTrainedModel, *, mode: Callable[[], AbstractContextManager[Any]]) -> Training:
    """The stock model, one document at a time; `mode` is entered around forward and backward."""
    tokens = sample(model.config.get_text_config().vocab_size)
    total = 0.0
    for start, stop in pairwise(BOUNDS):
        document = {name: tensor[:, start:stop] for name, tensor in tokens.items()}
        labels = document.pop("labels")
        with mode():
            logits = model(use_cache=False, **document).logits
            loss = F.cross_entropy(logits[0].double(), labels[0], reduction="sum")
            loss.backward()
        total += float(loss.detach())
    return Training(total, _gradients(model))


def train_attached(
    model: PreTrainedModel,
    *,
    mode: Callable[[], AbstractContextManager[Any]],
    kernel: AttentionKernel | None = None,
    features: Sequence[str] = (),
) -> Training:
    """Every feature on, all documents packed; `features` are further overrides of the recipe.

    Raises RunError if a layer's attention does not come to our function.
    """
    layers = len(decoder_layers(model))
    memory = load(
        "tiny", overrides=["memory.activation_checkpoint={offload: cpu, resident_groups: 0, disk_groups: 0}", *features]
    ).memory
    chunk_tokens = BOUNDS[-1] if memory.sequence_chunks is None else memory.sequence_chunks.resolved.chunk_tokens
    attach(
        model,
        memory,
        norm_tile_tokens=NORM_TILE_TOKENS,
        mlp_tile_tokens=MLP_TILE_TOKENS,
        loss_tile_tokens=LOSS_TILE_TOKENS,
        local_chunk_tokens=chunk_tokens,
    )
    counting = _CountingKernel(kernel or CpuKernel())
    segments = segments_of(torch.tensor(BOUNDS, dtype=torch.int32), device=torch.device("cpu"))
    mesh, layout = Mesh(rank=0, world_size=1, sp=1, sp_group=None), Layout(BOUNDS[-1], 1, chunk_tokens)
    context = AttentionContext(segments, mesh, counting, layout)
    with mode():
        loss = model(**sample(model.config.get_text_config().vocab_size), attention_context=context)
        in_chunks = memory.sequence_chunks is not None  # which counts for itself
        if counting.calls == 0 or (counting.calls % layers and not in_chunks):
            raise RunError(f"{counting.calls} calls of attention that can be replaced in {layers} layers")
        loss.backward()
    return Training(float(loss.detach()), _gradients(model))


class _CountingKernel:
    """A kernel that knows how often it was asked."""

    name = "counting"

    def __init__(self, kernel: AttentionKernel) -> None:
        self.calls = 0
        self.capabilities = kernel.capabilities
        self.backward = kernel.backward
        self._kernel = kernel

    def forward(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        return self._kernel.forward(*args)


def _gradients(model: PreTrainedModel) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def compare(ours: Training, stock: Training) -> Difference:
    """How far `ours` is from `stock`."""
    norms = [float(grad.norm()) for grad in stock.gradients.values() if grad is not None]
    floor = 1e-4 * float(torch.tensor(norms).norm())
    differences, not_zero = {"": 0.0}, []
    for name, expected in stock.gradients.items():
        mine = ours.gradients[name]
        if expected is None or not expected.any():
            if mine is not None and mine.any():
                not_zero.append(name)
        elif mine is None:
            differences[name] = float("inf")
        else:
            differences[name] = float((mine - expected).norm()) / max(float(expected.norm()), floor)
    worst = max(differences, key=differences.__getitem__)
    loss = abs(ours.loss - stock.loss) / abs(stock.loss)
    return Difference(loss=loss, gradient=differences[worst], tensor=worst, not_zero=tuple(not_zero))
