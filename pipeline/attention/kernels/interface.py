"""What a kernel is, what a model may need of one, and what a kernel says it can do."""

from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch

from pipeline.attention.segments import Segments
from pipeline.errors import UserError


@dataclass(frozen=True)
class Scoring:
    """How a score becomes a probability."""

    scale: float
    window: int | None = None
    """A query sees itself and the window - 1 tokens before it; None is the whole document so far."""
    softcap: float | None = None
    """Scores s become softcap * tanh(s / softcap) (gemma 2)."""


@dataclass(frozen=True)
class AttentionGrads:
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    dsinks: torch.Tensor | None


@dataclass(frozen=True)
class Capabilities:
    """What a kernel can do on one GPU generation. Sinks are not here: `sinks.py` gives them to every kernel."""

    dtypes: tuple[torch.dtype, ...]
    head_dims: tuple[tuple[int, int], ...] | None
    """(query and key dim, value dim) that it runs; others are padded with zeros to the next. None: any."""
    window: bool
    softcap_max_head_dim: int
    """Soft-capping up to this head dim; 0: none."""
    deterministic_max_head_dim: int
    """A bit-exact backward up to this head dim; 0: none."""
    max_elements: int | None
    """Largest (tokens + padding) * query heads * head dim of one call; larger calls are split. None: any."""
    max_documents: int | None = None
    """Documents of one call, which are a dimension of a CUDA grid; more are split. None: any."""

    def fitting(self, head_dim: int, value_head_dim: int) -> tuple[int, int] | None:
        """The smallest head dims it runs that hold these; None if there are none."""
        return _fitting(self.head_dims, head_dim, value_head_dim)


@dataclass(frozen=True)
class Needs:
    """What a model and its recipe ask of a kernel."""

    head_dim: int
    value_head_dim: int
    dtype: torch.dtype
    window: bool = False
    softcap: bool = False
    deterministic: bool = False
    queries_per_kv_head: int = 1
    """Decides which variants a kernel that compiles at run time compiles; nothing is refused for it."""
    earlier_keys: bool = False
    """Queries that look at blocks of earlier keys (sequence chunks): every kernel here can, its trial tries it."""


class AttentionKernel(Protocol):
    """Shapes: q, out [T, H, D]; k, v [K, J, D] with J KV heads, H a multiple of J; lse [H, T] in float32 or wider;
    sinks [H] (gpt_oss: a logit per head that takes probability and gives no value).

    K is T, except for `segments.keys`: then these are earlier keys, and the call is one part of an attention whose
    other parts the caller merges. Backward's out and lse, and so the probabilities, are those of the whole: its
    gradients are this part's share. Sinks have no share here, they count once: with the queries' own rows.
    """

    name: str
    capabilities: Capabilities

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        segments: Segments,
        scoring: Scoring,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse)."""
        ...

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        out: torch.Tensor,
        lse: torch.Tensor,
        segments: Segments,
        scoring: Scoring,
    ) -> AttentionGrads: ...


def lacks(capabilities: Capabilities, needs: Needs) -> str | None:
    """The first thing needed that is not there, in words; None if all is there."""
    head_dims = capabilities.fitting(needs.head_dim, needs.value_head_dim)
    if needs.dtype not in capabilities.dtypes:
        return f"dtype {_plain(needs.dtype)} (it has {', '.join(map(_plain, capabilities.dtypes))})"
    if head_dims is None:
        return f"head dims {needs.head_dim} and {needs.value_head_dim}"
    widest = max(head_dims)
    if needs.window and not capabilities.window:
        return "sliding windows"
    if needs.softcap and widest > capabilities.softcap_max_head_dim:
        return f"soft-capping at head dim {widest}"
    if needs.deterministic and widest > capabilities.deterministic_max_head_dim:
        return f"a deterministic backward at head dim {widest}"
    return None


def check_supported(kernel: AttentionKernel, needs: Needs) -> None:
    """Raises UserError if the kernel cannot do what the model needs."""
    missing = lacks(kernel.capabilities, needs)
    if missing is not None:
        raise UserError(
            f"attention kernel {kernel.name} lacks {missing}, which this model or recipe needs; "
            "set model.attention: auto, or name another kernel"
        )


def check_call(sinks: torch.Tensor | None, segments: Segments, scoring: Scoring) -> None:
    """Raises ValueError for earlier keys with sinks, or with a window that leaves a query without a key."""
    if sinks is not None and segments.keys is not None:
        raise ValueError("sinks with earlier keys: they would count twice; give them with the queries' own rows")
    segments.window_left(scoring.window)


def needs_of(
    config: Any, *, dtype: torch.dtype, deterministic: bool = False, sp: int = 1, earlier_keys: bool = False
) -> Needs:
    """From a transformers config (of a text model, or holding one)."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    usual = getattr(text, "head_dim", None) or text.hidden_size // heads
    widest = max(usual, getattr(text, "global_head_dim", None) or 0)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    window = getattr(text, "sliding_window", None) is not None and getattr(text, "use_sliding_window", True)
    return Needs(
        head_dim=getattr(text, "qk_head_dim", None) or widest,
        value_head_dim=getattr(text, "v_head_dim", None) or widest,
        dtype=dtype,
        window=window,
        softcap=getattr(text, "attn_logit_softcapping", None) is not None,
        deterministic=deterministic,
        queries_per_kv_head=heads // max(kv_heads, sp),
        earlier_keys=earlier_keys,
    )


@cache
def _fitting(
    head_dims: tuple[tuple[int, int], ...] | None, head_dim: int, value_head_dim: int
) -> tuple[int, int] | None:
    if head_dims is None:
        return head_dim, value_head_dim
    large_enough = [pair for pair in head_dims if pair[0] >= head_dim and pair[1] >= value_head_dim]
    return min(large_enough, key=sum, default=None)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
