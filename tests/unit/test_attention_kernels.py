"""What stands around the CUDA kernels, on the CPU: sinks, splitting, head dims, padding, and which kernel is chosen.

No CUDA kernel runs here (tests/gpu does that): the backend below is the CPU kernel behind a backend's two calls.
"""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import transformers

from pipeline.attention.kernels import (
    Capabilities,
    Needs,
    Scoring,
    check_supported,
    choose,
    flash_attention_2,
    flash_attention_3,
    flash_attention_4,
    needs_of,
    presence,
    sinks,
    torch_cuda,
)
from pipeline.attention.kernels.choice import BACKENDS, candidates_for, fastest_first
from pipeline.attention.kernels.cpu import CpuKernel
from pipeline.attention.kernels.interface import lacks
from pipeline.attention.kernels.presence import AbsentError, Presence, installed_version
from pipeline.attention.kernels.split import DOCUMENT_PADDING, pieces
from pipeline.attention.kernels.trial import try_kernel
from pipeline.attention.kernels.varlen import VarlenKernel
from pipeline.attention.segments import rectangle, segments_of
from pipeline.errors import RunError, UserError

CPU = torch.device("cpu")
ANYTHING = CpuKernel.capabilities
FLASH_2 = flash_attention_2.capabilities_of((9, 0))
LLAMA = Needs(head_dim=128, value_head_dim=128, dtype=torch.bfloat16)


class CpuBackend:
    """The CPU kernel behind a backend's interface, which checks what a backend may rely on."""

    name = "cpu backend"

    def __init__(self, capabilities: Capabilities = ANYTHING) -> None:
        self.capabilities = capabilities
        self.calls = 0

    def forward(self, q, k, v, segments, scoring):
        self._check(q, k, v, segments, scoring)
        return CpuKernel().forward(q, k, v, None, segments, scoring)

    def backward(self, dout, q, k, v, out, lse, segments, scoring, *, deterministic):
        self._check(q, k, v, segments, scoring, dout, out, lse)
        grads = CpuKernel().backward(dout, q, k, v, None, out, lse, segments, scoring)
        return grads.dq, grads.dk, grads.dv

    def _check(self, q, k, v, segments, scoring, *others):
        self.calls += 1
        assert all(x.is_contiguous() for x in (q, k, v, *others))
        assert segments.bounds[0] == 0
        assert segments.num_tokens == q.shape[0]
        assert segments.cu_seqlens.tolist() == list(segments.bounds)
        assert segments.num_keys == k.shape[0] == v.shape[0]
        assert segments.key_cu_seqlens[-1] == k.shape[0]
        assert segments.key_cu_seqlens.dtype == torch.int32
        assert segments.first_seen(scoring.window) == 0, "no query sees some of the keys"
        assert segments.max_len == max(stop - start for start, stop in pairwise(segments.bounds))
        assert self.capabilities.fitting(q.shape[-1], v.shape[-1]) == (q.shape[-1], v.shape[-1])
        assert self.capabilities.max_elements is None or _largest(q, k) < self.capabilities.max_elements
        assert self.capabilities.max_documents is None or len(segments.bounds) - 1 <= self.capabilities.max_documents


def _largest(q, k):
    """Elements of buffers with a row per query or per key, for every query head."""
    return max(q.shape[0], k.shape[0]) * q.shape[1] * q.shape[2]


def random_case(*, bounds=(0, 5, 6, 40, 77), rows=90, heads=6, kv_heads=2, dims=(8, 8), with_sinks=False):
    """(q, k, v, sinks, dout, segments) in float64."""
    torch.manual_seed(0)
    shapes = [(rows, heads, dims[0]), (rows, kv_heads, dims[0]), (rows, kv_heads, dims[1]), (rows, heads, dims[1])]
    q, k, v, dout = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    sinks_H = torch.randn(heads, dtype=torch.float64) if with_sinks else None
    return q, k, v, sinks_H, dout, segments_of(torch.tensor(bounds, dtype=torch.int32), device=CPU)


def run(kernel, case, scoring):
    """out, lse of the documents' rows, dq, dk, dv and, with sinks, dsinks."""
    q, k, v, sinks_H, dout, segments = case
    out, lse = kernel.forward(q, k, v, sinks_H, segments, scoring)
    grads = kernel.backward(dout, q, k, v, sinks_H, out, lse, segments, scoring)
    results = (out, lse[:, : segments.num_tokens], grads.dq, grads.dk, grads.dv, grads.dsinks)
    return [x for x in results if x is not None]


def assert_same(got, expected):
    for mine, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-11, atol=1e-12)


def elements(*, tokens, documents, heads=1):
    """Of a call, as split.py counts them, at a head dim up to 64."""
    return heads * 64 * (tokens + DOCUMENT_PADDING * (documents + 1))


SCORINGS = [Scoring(0.3), Scoring(0.3, window=7), Scoring(0.3, softcap=2.0)]


# Sinks, for kernels that have none


@pytest.mark.parametrize("scoring", SCORINGS, ids=str)
@pytest.mark.parametrize("tile_elements", [sinks.TILE_ELEMENTS, 200])
def test_sinks_added_after_a_kernel_equal_sinks_inside_it_in_output_and_every_gradient(
    scoring, tile_elements, monkeypatch
):
    monkeypatch.setattr(sinks, "TILE_ELEMENTS", tile_elements)
    case = random_case(with_sinks=True)
    assert_same(run(VarlenKernel(CpuBackend()), case, scoring), run(CpuKernel(), case, scoring))


def test_a_sink_far_above_every_score_takes_all_probability_and_nothing_overflows():
    q, k, v, _, dout, segments = random_case()
    case = (q, k, v, torch.full((6,), 1e4, dtype=torch.float64), dout, segments)
    out, _, dq, *_, dsinks = run(VarlenKernel(CpuBackend()), case, Scoring(0.3))
    assert max(out.abs().max(), dq.abs().max()) < 1e-30
    assert torch.isfinite(dsinks).all()


# Splitting: the result is the same, however small the calls


@pytest.mark.parametrize("scoring", SCORINGS, ids=str)
@pytest.mark.parametrize(
    ("limits", "calls"),
    [
        ({}, 1),
        ({"max_elements": elements(tokens=77, documents=4, heads=6)}, 1),
        ({"max_elements": elements(tokens=77, documents=4, heads=5)}, 2),  # one KV head with its three query heads
        ({"max_elements": elements(tokens=77, documents=4, heads=2)}, 4),  # two and one query heads of each KV head
        ({"max_elements": elements(tokens=77, documents=4, heads=1)}, 6),
        ({"max_elements": elements(tokens=40, documents=3, heads=1)}, 12),  # 6 heads of 3 documents, and of the last
        ({"max_documents": 1}, 4),
        ({"max_documents": 3}, 2),
    ],
    ids=str,
)
def test_calls_below_a_limit_give_what_one_call_gives(limits, calls, scoring):
    case = random_case(with_sinks=True)
    backend = CpuBackend(replace(ANYTHING, **limits))
    assert_same(run(VarlenKernel(backend), case, scoring), run(CpuKernel(), case, scoring))
    assert backend.calls == 2 * calls


@pytest.mark.parametrize("heads", [(1, 1), (7, 7), (8, 1), (12, 4)], ids=str)
@pytest.mark.parametrize("limit_heads", [1, 2, 3, 5, 100])
def test_pieces_cover_every_head_of_every_document_once(heads, limit_heads):
    segments = segments_of(torch.tensor([0, 3, 4, 90, 100], dtype=torch.int32), device=CPU)
    limit = elements(tokens=100, documents=4, heads=limit_heads)
    seen = torch.zeros(100, heads[0])
    calls = pieces(replace(ANYTHING, max_elements=limit), segments, heads=heads[0], kv_heads=heads[1], head_dim=40)
    for piece in calls:
        seen[piece.tokens, piece.heads] += 1
        groups = heads[0] // heads[1]
        kv_heads_of_queries = {head // groups for head in range(piece.heads.start, piece.heads.stop)}
        assert kv_heads_of_queries == set(range(piece.kv_heads.start, piece.kv_heads.stop))
        assert (piece.heads.stop - piece.heads.start) <= limit_heads
    assert torch.equal(seen, torch.ones_like(seen))


def test_no_call_of_a_flash_kernel_reaches_2_to_the_31_elements():
    """Llama-70B's 64 heads on 8 ranks, 4M tokens; and 32 heads on one rank, 500K tokens."""
    for tokens, heads, kv_heads in [(4_000_000, 8, 1), (524_288, 32, 8)]:
        segments = segments_of(torch.tensor([0, 1000, tokens], dtype=torch.int32), device=CPU)
        calls = pieces(FLASH_2, segments, heads=heads, kv_heads=kv_heads, head_dim=128)
        assert len(calls) > 1
        for piece in calls:
            rows = piece.tokens.stop - piece.tokens.start + 3 * DOCUMENT_PADDING
            assert rows * (piece.heads.stop - piece.heads.start) * 128 < 2**31


def test_a_document_too_long_for_one_head_is_refused_with_its_length():
    segments = segments_of(torch.tensor([0, 5, 16_800_000], dtype=torch.int32), device=CPU)
    with pytest.raises(UserError, match="16,799,995 tokens"):
        pieces(FLASH_2, segments, heads=2, kv_heads=1, head_dim=128)


# Rows behind the last document, and head dims


@pytest.mark.parametrize("limits", [{}, {"max_documents": 1}], ids=str)
def test_rows_behind_the_last_document_give_zero_and_get_no_gradient(limits):
    q, k, v, sinks_H, dout, segments = random_case(with_sinks=True)
    for x in (q, k, v, dout):
        x[77:] = float("nan")
    kernel = VarlenKernel(CpuBackend(replace(ANYTHING, **limits)))
    out, _, dq, dk, dv, dsinks = run(kernel, (q, k, v, sinks_H, dout, segments), Scoring(0.3))
    assert all(torch.equal(x[77:], torch.zeros_like(x[77:])) for x in (out, dq, dk, dv))
    assert all(torch.isfinite(x).all() for x in (out, dq, dk, dv, dsinks))


def test_a_sample_without_documents_is_all_padding():
    case = random_case(bounds=(0,), with_sinks=True)
    out, _, *grads = run(VarlenKernel(CpuBackend()), case, Scoring(0.3))
    assert all(not x.any() for x in (out, *grads))


@pytest.mark.parametrize("dims", [(12, 12), (24, 16), (16, 24), (5, 3)], ids=str)
@pytest.mark.parametrize("bounds", [(0, 5, 90), (0, 5, 77)], ids=["whole", "padded"])
def test_head_dims_a_kernel_has_not_are_padded_and_the_result_is_the_same(dims, bounds):
    case = random_case(dims=dims, bounds=bounds, with_sinks=True)
    backend = CpuBackend(replace(ANYTHING, head_dims=((8, 8), (16, 16), (32, 32))))
    assert_same(run(VarlenKernel(backend), case, Scoring(0.3)), run(CpuKernel(), case, Scoring(0.3)))


def test_views_reach_the_backend_contiguous():
    q, k, v, sinks_H, dout, segments = random_case(bounds=(0, 90))
    strided = tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    got = run(VarlenKernel(CpuBackend()), (*strided, sinks_H, dout, segments), Scoring(0.3))
    assert_same(got, run(CpuKernel(), (q, k, v, sinks_H, dout, segments), Scoring(0.3)))


# What a kernel can do


def test_what_is_lacking_is_named():
    torchs = flash_attention_2.capabilities_of((9, 0), softcap=False)
    assert lacks(FLASH_2, LLAMA) is None
    assert lacks(torchs, replace(LLAMA, softcap=True)) == "soft-capping at head dim 128"
    assert lacks(FLASH_2, replace(LLAMA, dtype=torch.float32)) == "dtype float32 (it has bfloat16, float16)"
    assert lacks(FLASH_2, replace(LLAMA, head_dim=512, value_head_dim=512)) == "head dims 512 and 512"
    assert lacks(replace(FLASH_2, window=False), replace(LLAMA, window=True)) == "sliding windows"
    wide = replace(LLAMA, head_dim=256, value_head_dim=256, deterministic=True)
    assert lacks(flash_attention_3._FlashAttention3.capabilities, wide) == "a deterministic backward at head dim 256"


def test_blackwell_lacks_soft_capping_only_at_head_dim_256():
    gemma2 = replace(LLAMA, head_dim=256, value_head_dim=256, softcap=True)
    assert lacks(flash_attention_4.capabilities_of((10, 0)), gemma2) == "soft-capping at head dim 256"
    assert lacks(flash_attention_4.capabilities_of((10, 0)), replace(LLAMA, softcap=True)) is None
    assert lacks(flash_attention_4.capabilities_of((9, 0)), gemma2) is None


def test_head_dims_go_to_the_smallest_that_holds_them():
    blackwell = flash_attention_4.capabilities_of((10, 0))
    assert FLASH_2.fitting(192, 128) == (192, 192)
    assert blackwell.fitting(192, 128) == (192, 128)  # DeepSeek's own
    assert blackwell.fitting(160, 160) == (256, 256)
    assert FLASH_2.fitting(20, 20) == (24, 24)


def test_a_kernel_refuses_a_scoring_that_it_would_ignore():
    q, k, v, _, _, segments = random_case()
    backend = CpuBackend(replace(ANYTHING, softcap_max_head_dim=0))
    with pytest.raises(UserError, match="cpu backend lacks soft-capping"):
        VarlenKernel(backend).forward(q, k, v, None, segments, Scoring(0.3, softcap=2.0))
    assert backend.calls == 0


def test_check_supported_says_what_is_lacking_and_what_to_do():
    with pytest.raises(UserError, match=r"lacks dtype float32 .*set model.attention: auto"):
        check_supported(VarlenKernel(CpuBackend(FLASH_2)), replace(LLAMA, dtype=torch.float32))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (transformers.LlamaConfig(num_attention_heads=32, num_key_value_heads=8), {"queries_per_kv_head": 4}),
        (transformers.Gemma2Config(), {"head_dim": 256, "value_head_dim": 256, "window": True, "softcap": True}),
        (transformers.MistralConfig(), {"window": True}),
        (transformers.Qwen2Config(), {"window": False}),
        (transformers.GptOssConfig(), {"head_dim": 64, "value_head_dim": 64, "window": True}),
        (transformers.DeepseekV3Config(), {"head_dim": 192, "value_head_dim": 128}),
        (transformers.Gemma3Config(), {"head_dim": 256, "softcap": False}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_needs_are_read_from_a_config(config, expected):
    needs = needs_of(config, dtype=torch.bfloat16)
    assert {name: getattr(needs, name) for name in expected} == expected


def test_kv_heads_replicated_over_ranks_leave_fewer_queries_per_kv_head():
    config = transformers.LlamaConfig(num_attention_heads=64, num_key_value_heads=8)
    assert needs_of(config, dtype=torch.bfloat16, sp=32).queries_per_kv_head == 2


# Which kernel runs


def found(*present, reason="not installed"):
    """Presences as if these were on the machine."""
    return [Presence(name, FLASH_2 if name in present else None, reason) for name in BACKENDS]


@pytest.mark.parametrize(
    ("generation", "present", "expected"),
    [
        ((9, 0), ["torch", "flash_attention_2", "flash_attention_3", "flash_attention_4"], "flash_attention_3"),
        ((9, 0), ["torch", "flash_attention_2", "flash_attention_4"], "flash_attention_4"),
        ((9, 0), ["torch", "flash_attention_2"], "flash_attention_2"),
        ((9, 0), ["torch"], "torch"),
        ((10, 0), ["torch", "flash_attention_2", "flash_attention_4"], "flash_attention_4"),
        ((8, 0), ["torch", "flash_attention_2", "flash_attention_4"], "flash_attention_2"),
        ((12, 0), ["torch", "flash_attention_4"], "torch"),
    ],
    ids=str,
)
def test_auto_takes_the_fastest_present(generation, present, expected):
    candidates, passed_over = candidates_for("auto", generation, found(*present), None)
    assert candidates[0] == expected
    assert len(passed_over) == fastest_first(generation).index(expected)


def test_auto_passes_over_a_faster_kernel_that_lacks_what_the_model_needs_and_says_so():
    narrow = replace(FLASH_2, head_dims=((64, 64),))
    presences = [Presence("flash_attention_3", narrow, "3.0.0"), Presence("flash_attention_2", FLASH_2, "2.8.3")]
    candidates, passed_over = candidates_for("auto", (9, 0), presences, LLAMA)
    assert candidates == ["flash_attention_2"]
    assert "flash_attention_3: lacks head dims 128 and 128" in passed_over


def test_a_kernel_asked_for_by_name_is_taken_or_refused_never_replaced():
    assert candidates_for("torch", (9, 0), found("torch", "flash_attention_2"), LLAMA)[0] == ["torch"]
    with pytest.raises(UserError) as error:
        candidates_for("flash_attention_3", (9, 0), found("torch", reason="it is not installed; build it"), LLAMA)
    for part in ("'flash_attention_3'", "auto or to one of: torch", "it is not installed; build it"):
        assert part in str(error.value)


def test_a_machine_with_nothing_says_of_each_kernel_why():
    with pytest.raises(UserError) as error:
        candidates_for("auto", (9, 0), found(reason="libcudart.so.12: no such file"), LLAMA)
    assert str(error.value).count("libcudart.so.12") == 4
    with pytest.raises(UserError, match="unknown on a GPU"):
        candidates_for("cpu", (9, 0), found("torch"), LLAMA)


def test_the_cpu_has_its_own_kernel_and_no_other():
    assert choose("auto", device=CPU).kernel.name == "cpu"
    assert choose("cpu", device=CPU, needs=LLAMA).kernel.name == "cpu"
    with pytest.raises(UserError, match=r"'flash_attention_2' needs a CUDA GPU.*model.attention: auto"):
        choose("flash_attention_2", device=CPU)


@pytest.mark.parametrize("module", [torch_cuda, flash_attention_2, flash_attention_3, flash_attention_4])
def test_a_package_that_is_not_here_says_how_to_get_it(module, monkeypatch):
    def not_found(name):
        raise presence.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(presence.metadata, "version", not_found)
    with pytest.raises(AbsentError, match=r"is not installed; (pip install|build it)"):
        module.load((9, 0))


@pytest.mark.parametrize(
    ("here", "oldest", "taken"),
    [
        ("2.8.3.post1", "2.7.0", True),
        ("2.6.3", "2.7.0", False),
        ("4.0.0b36", "4.0.0b36", True),
        ("4.0.0b10", "4.0.0b36", False),
        ("4.0.0", "4.0.0b36", True),
        ("3.0.0b1+cu130torch2.11", "3.0.0b1", True),
        ("2.11.0+cu130", "2.11.0a0", True),
        ("2.11.0a0+5228986c39.nv25.12", "2.11.0a0", True),
        ("2.10.1", "2.11.0a0", False),
    ],
)
def test_a_version_too_old_is_absent(here, oldest, taken, monkeypatch):
    monkeypatch.setattr(presence.metadata, "version", lambda name: here)
    if taken:
        assert installed_version("a-package", oldest=oldest, install="install it") == here
        return
    with pytest.raises(AbsentError, match=f"{here} is older than {oldest}; install it"):
        installed_version("a-package", oldest=oldest, install="install it")


def test_an_old_copy_of_flash_attn_4_under_flash_attn_2_is_recognised_by_its_keywords():
    def _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0):
        """As in the copy that flash-attn 2.8.3 carries."""

    with pytest.raises(
        AbsentError, match=r"has no cu_seqlens_k, cu_seqlens_q, deterministic.*install flash-attn-4 after"
    ):
        flash_attention_4.check_keywords(_flash_attn_bwd, "deterministic")


# The trial before weights load


@pytest.mark.parametrize(
    "needs",
    [
        LLAMA,
        replace(LLAMA, window=True, softcap=True, queries_per_kv_head=4),
        replace(LLAMA, window=True, earlier_keys=True),
    ],
    ids=str,
)
def test_a_right_kernel_passes_its_trial_and_the_runs_random_numbers_stay(needs):
    before = torch.get_rng_state()
    try_kernel(CpuKernel(), needs, CPU)
    assert torch.equal(torch.get_rng_state(), before)


class OffByOne(CpuBackend):
    """A window that is one token too wide, as if the library counted otherwise."""

    def forward(self, q, k, v, segments, scoring):
        return super().forward(q, k, v, segments, replace(scoring, window=scoring.window and scoring.window + 1))


def test_a_window_one_token_too_wide_fails_the_trial_by_name():
    try_kernel(VarlenKernel(OffByOne()), LLAMA, CPU)
    with pytest.raises(RunError, match=r"cpu backend: out is off by .* window=100"):
        try_kernel(VarlenKernel(OffByOne()), replace(LLAMA, window=True), CPU)


class CausalAnyway(CpuBackend):
    """A library that hides keys behind a query's place among earlier keys, as if these were its own."""

    def forward(self, q, k, v, segments, scoring):
        if segments.keys is None:
            return super().forward(q, k, v, segments, scoring)
        rows = segments.num_tokens
        own = segments_of(torch.tensor([0, rows], dtype=torch.int32), device=CPU)
        return super().forward(q, k[-rows:].contiguous(), v[-rows:].contiguous(), own, scoring)


def test_earlier_keys_under_a_causal_mask_fail_the_trial_by_name_where_they_are_needed():
    try_kernel(VarlenKernel(CausalAnyway()), LLAMA, CPU)
    with pytest.raises(RunError, match=r"cpu backend: out is off by .* and earlier keys"):
        try_kernel(VarlenKernel(CausalAnyway()), replace(LLAMA, earlier_keys=True), CPU)


@pytest.mark.parametrize("window", [None, 4])
def test_torchs_operators_take_the_arguments_we_give_them(window):
    """On meta tensors: schemas and shapes of this torch, no computation."""
    backend = torch_cuda._TorchFlash(FLASH_2)
    q, k, v, dout = (torch.empty(90, heads, 16, dtype=torch.bfloat16, device="meta") for heads in (6, 2, 2, 6))
    segments = replace(random_case(bounds=(0, 90))[-1], cu_seqlens=torch.empty(2, dtype=torch.int32, device="meta"))
    out, lse = backend.forward(q, k, v, segments, Scoring(0.3, window=window))
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, (6, 90), torch.float32)
    grads = backend.backward(dout, q, k, v, out, lse, segments, Scoring(0.3, window=window), deterministic=True)
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("window", [None, 70])
def test_torchs_operators_take_keys_of_another_number(window):
    backend = torch_cuda._TorchFlash(FLASH_2)
    q, dout = (torch.empty(30, 6, 16, dtype=torch.bfloat16, device="meta") for _ in range(2))
    k, v = (torch.empty(50, 2, 16, dtype=torch.bfloat16, device="meta") for _ in range(2))
    segments, scoring = rectangle(30, 50, gap=5, device=torch.device("meta")), Scoring(0.3, window=window)
    out, lse = backend.forward(q, k, v, segments, scoring)
    assert (out.shape, lse.shape) == (q.shape, (6, 30))
    grads = backend.backward(dout, q, k, v, out, lse, segments, scoring, deterministic=False)
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]
