"""What Hugging Face models call for attention, registered as `alst`: exchange, kernel, exchange back.

The layer's own forward stays stock. Which documents there are comes as a keyword through the model's forward; a
mask is never built, so nothing of size T x T exists (ALST §3.4).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from pipeline.attention.chunks import ChunkAttention, ChunkedSample
from pipeline.attention.kernels import AttentionKernel, Scoring
from pipeline.attention.kernels.interface import AttentionGrads
from pipeline.attention.segments import Segments
from pipeline.attention.tape import AttentionTape, Output
from pipeline.errors import RecipeError, RunError
from pipeline.parallel.exchange import heads_to_sequence, sequence_to_heads
from pipeline.parallel.mesh import Mesh
from pipeline.parallel.shard import Layout

NAME = "alst"
"""In config._attn_implementation. It must not contain "sdpa": transformers would build masks for it."""

HARMLESS = {"position_ids", "position_embeddings", "use_cache", "past_key_values", "output_attentions", "layer_idx"}
"""Keywords that change no score; any other that says something is refused rather than passed over."""


@dataclass(frozen=True)
class AttentionContext:
    """What every layer's attention needs to know of the sample; passed to the model as `attention_context`."""

    segments: Segments
    mesh: Mesh
    kernel: AttentionKernel
    layout: Layout | None = None
    """How the sample lies over the ranks; read by what runs layers in chunks."""
    tape: AttentionTape | None = None
    """Set by what runs a layer more than once; None asks the kernel every time."""
    chunk: ChunkAttention | None = None
    """Set by what runs a layer in chunks; None is the whole sample at once."""

    @cached_property
    def in_chunks(self) -> ChunkedSample:
        """The sample as each of its chunks sees it; made once for all layers."""
        assert self.layout is not None, "whoever runs layers in chunks says how the sample lies"
        return ChunkedSample(self.segments, self.layout)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        scoring: Scoring,
    ) -> Output:
        """(out, lse) of the kernel, or off the tape."""

        def ask_kernel() -> Output:
            if self.chunk is not None:
                return self.chunk.forward(self.kernel, q, k, v, sinks, scoring)
            return self.kernel.forward(q, k, v, sinks, self.segments, scoring)

        return ask_kernel() if self.tape is None else self.tape.play_or_record(ask_kernel)

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        out: torch.Tensor,
        lse: torch.Tensor,
        scoring: Scoring,
    ) -> AttentionGrads:
        """Of the kernel; of keys and values in earlier chunks it is added to theirs."""
        if self.chunk is not None:
            return self.chunk.backward(self.kernel, dout, q, k, v, sinks, out, lse, scoring)
        return self.kernel.backward(dout, q, k, v, sinks, out, lse, self.segments, scoring)


def register() -> None:
    """Make `alst` an attention implementation of transformers. Models choose it by name; the others are untouched."""
    AttentionInterface.register(NAME, alst_attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


def alst_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    attention_context: AttentionContext | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """[1, H, S/sp, D] queries, [1, J, S/sp, D] keys and [1, J, S/sp, E] values -> [1, S/sp, H, E].

    Raises RunError if the model dropped the context on the way, made a mask, or asks for what is not known here;
    RecipeError for attention dropout.
    """
    if attention_context is None:
        raise RunError(f"{type(module).__name__} lost attention_context on its way; this model is not supported")
    if dropout:
        raise RecipeError(f"attention dropout = {dropout}: must be 0; set model.config.attention_dropout=0.0")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    _refuse_what_is_not_known(module, query, key, attention_mask, is_causal=is_causal, others=others)
    context, mesh = attention_context, attention_context.mesh
    q_SHD, k_SJD, v_SJD = (x[0].transpose(0, 1) for x in (query, key, value))
    k_SJD, v_SJD = (_replicate_kv_heads(x, mesh.sp) for x in (k_SJD, v_SJD))
    q_SHD, k_SJD, v_SJD = (sequence_to_heads(x, mesh) for x in (q_SHD, k_SJD, v_SJD))
    scoring = Scoring(
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5, window=sliding_window, softcap=softcap
    )
    sinks = None if s_aux is None else s_aux.chunk(mesh.sp)[mesh.sp_rank]
    if context.chunk is not None:
        context.chunk.enter(k_SJD, v_SJD, sliding_window)
    out_SHD: torch.Tensor = _Attention.apply(q_SHD, k_SJD, v_SJD, sinks, context, scoring)
    return heads_to_sequence(out_SHD, mesh)[None], None


def _refuse_what_is_not_known(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    is_causal: bool,
    others: dict[str, Any],
) -> None:
    """Raises RunError if documents and a window would not say all about who sees whom, and how well."""
    unknown = sorted(name for name, value in others.items() if value is not None and name not in HARMLESS)
    trouble = None
    if attention_mask is not None:
        trouble = "built an attention mask"
    elif not is_causal:
        trouble = "attends to what follows"
    elif key.shape[2] != query.shape[2]:
        trouble = f"has {key.shape[2]} keys for {query.shape[2]} queries"
    elif query.shape[0] != 1:
        trouble = f"has {query.shape[0]} sequences in a batch, must be one"
    elif unknown:
        trouble = f"tells its attention {', '.join(unknown)}, which is not known here"
    if trouble is not None:
        raise RunError(f"{type(module).__name__} {trouble}; this model is not supported")


def _replicate_kv_heads(x_SJD: torch.Tensor, sp: int) -> torch.Tensor:
    """[S/sp, J, D] -> [S/sp, max(J, sp), D]: with fewer KV heads than SP ranks, each goes to sp / J of them."""
    kv_heads = x_SJD.shape[1]
    return x_SJD.repeat_interleave(sp // kv_heads, dim=1) if kv_heads < sp else x_SJD


class _Attention(torch.autograd.Function):
    """The kernel's pair of calls as one differentiable function."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        context: AttentionContext,
        scoring: Scoring,
    ) -> torch.Tensor:
        out, lse = context.forward(q, k, v, sinks, scoring)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.context, ctx.scoring = context, scoring
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of = ctx.context.backward(grads[0], *ctx.saved_tensors, ctx.scoring)
        return of.dq, of.dk, of.dv, of.dsinks, None, None
