"""Every CUDA kernel of this machine against the CPU kernel's algorithm in float64, on the same inputs."""

from dataclasses import replace

import pytest
import torch

from pipeline.attention.kernels import Needs, Scoring, choose
from pipeline.attention.kernels.choice import fastest_first
from pipeline.attention.kernels.cpu import CpuKernel
from pipeline.attention.kernels.varlen import VarlenKernel
from tests.attention_parts import parts_of, random_case, run_in_parts, run_written_out, seen
from tests.gpu.support import (
    NAMES,
    RELATIVE,
    Inputs,
    assert_close,
    kernel_or_skip,
    random_inputs,
    relative_error,
    run,
    sliced_reference,
)

PACKED = (0, 1, 130, 131, 700, 1500, 2048)
PADDING = 52
SCORINGS = {
    "plain": {},
    "window1": {"window": 1},
    "window100": {"window": 100},
    "softcap": {"softcap": 30.0},
    "window100+softcap": {"window": 100, "softcap": 30.0},
}

pytestmark = pytest.mark.parametrize("name", NAMES)


def compare(name: str, inputs: Inputs, scoring: Scoring) -> None:
    """Output, lse and every gradient; then that padding is zero. Skips what this machine or kernel has not."""
    kernel = kernel_or_skip(name, needs_of_case(inputs, scoring))
    got = run(kernel, inputs, scoring)
    assert_close(got, run(CpuKernel(), inputs.double(), scoring), RELATIVE[inputs.q.dtype])
    behind = slice(inputs.segments.num_tokens, None)
    assert not any(got[part][behind].any() for part in ("out", "dq", "dk", "dv"))


def needs_of_case(inputs: Inputs, scoring: Scoring) -> Needs:
    return Needs(
        head_dim=inputs.q.shape[-1],
        value_head_dim=inputs.v.shape[-1],
        dtype=inputs.q.dtype,
        window=scoring.window is not None,
        softcap=scoring.softcap is not None,
    )


def usual(head_dim: int = 128, **changes: float) -> Scoring:
    return Scoring(scale=head_dim**-0.5, **changes)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_packed_and_padded_documents_match_in_output_and_every_gradient(name, head_dim, scoring):
    inputs = random_inputs(PACKED, dims=(head_dim, head_dim), padding=PADDING)
    compare(name, inputs, usual(head_dim, **SCORINGS[scoring]))


@pytest.mark.parametrize("heads", [(4, 4), (8, 1), (6, 2), (1, 1)], ids=str)
def test_grouped_kv_heads_match(name, heads):
    compare(name, random_inputs(PACKED, heads=heads, padding=PADDING), usual())


def test_float16_matches(name):
    compare(name, random_inputs(PACKED, dtype=torch.float16, padding=PADDING), usual())


@pytest.mark.parametrize("dims", [(20, 20), (80, 80), (192, 128)], ids=str)
def test_head_dims_that_are_padded_or_differ_match(name, dims):
    compare(name, random_inputs(PACKED, dims=dims, padding=PADDING), usual(dims[0]))


@pytest.mark.parametrize("window", [None, 128])
def test_sinks_match_with_their_own_gradient(name, window):
    inputs = random_inputs(PACKED, dims=(64, 64), padding=PADDING, with_sinks=True)
    compare(name, inputs, usual(64, window=window))


@pytest.mark.parametrize("bounds", [(0, 1), (0, 1, 2, 3), (0, 127), (0, 128, 257)], ids=str)
def test_documents_shorter_than_a_block_and_just_longer_match(name, bounds):
    compare(name, random_inputs(bounds), usual())


def test_a_later_document_does_not_change_an_earlier_ones_output_by_a_bit(name):
    kernel = kernel_or_skip(name)
    before, after = (random_inputs((0, 700, 1500)) for _ in range(2))
    for x in (after.q, after.k, after.v):
        x[700:] += 3
    outs = [kernel.forward(x.q, x.k, x.v, None, x.segments, usual())[0] for x in (before, after)]
    assert torch.equal(outs[0][:700], outs[1][:700])
    assert not torch.allclose(outs[0][700:], outs[1][700:])


def test_one_document_of_64k_tokens_matches_where_it_is_looked_at(name):
    kernel = kernel_or_skip(name)
    tokens = 65_536
    inputs = random_inputs((0, tokens), heads=(4, 1))
    got = run(kernel, inputs, usual())
    picked = torch.cat([torch.arange(0, tokens, 2_049), torch.tensor([1, 127, 128, tokens - 1])]).cuda()
    expected = sliced_reference(inputs, got["out"], got["lse"], picked, usual().scale)
    rows = {part: got[part][picked] for part in ("out", "dq")}
    keys = {part: got[part][picked, 0] for part in ("dk", "dv")}
    assert_close({**rows, **keys, "lse": got["lse"][:, picked]}, expected, RELATIVE[torch.bfloat16])


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_deterministic_backward_gives_the_same_bits_every_time(name, head_dim):
    needs = Needs(head_dim, head_dim, torch.bfloat16, deterministic=True)
    kernel = kernel_or_skip(name, needs)
    inputs = random_inputs((0, 5, 4096), dims=(head_dim, head_dim))
    first, *others = (run(kernel, inputs, usual(head_dim)) for _ in range(4))
    assert all(torch.equal(first[part], other[part]) for other in others for part in first)
    assert_close(first, run(CpuKernel(), inputs.double(), usual(head_dim)), RELATIVE[torch.bfloat16])


@pytest.mark.parametrize("limit_heads", [1, 4])
def test_calls_split_by_heads_give_what_one_call_gives(name, limit_heads):
    whole = kernel_or_skip(name)
    limit = limit_heads * 128 * (2048 + 7 * 128)
    backend = _limited(whole, limit)
    inputs = random_inputs(PACKED, padding=PADDING, with_sinks=True)
    assert_close(run(backend, inputs, usual()), run(whole, inputs, usual()), 5e-3)


def _limited(kernel: VarlenKernel, max_elements: int) -> VarlenKernel:
    """The same backend behind smaller calls."""
    limited = VarlenKernel(kernel._backend)
    limited.capabilities = replace(kernel.capabilities, max_elements=max_elements)
    return limited


CUTS = {
    "even": (0, 512, 1024, 1536, 2048),
    "uneven": (0, 1, 700, 701, 1500, 2077),
    "one query": (0, 1000, 2000, 2001),
    "few queries": (0, 129, 1300, 1363),
}


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("changes", [{}, {"window": 300}, {"window": 900}, {"softcap": 30.0}], ids=str)
@pytest.mark.parametrize("cuts", CUTS)
def test_blocks_of_earlier_keys_make_up_a_documents_attention_and_its_gradients(name, cuts, changes, head_dim):
    compare_parts(name, CUTS[cuts], usual(head_dim, **changes), dims=(head_dim, head_dim))


@pytest.mark.parametrize("changes", [{}, {"window": 900}], ids=str)
@pytest.mark.parametrize("dims", [(20, 20), (192, 128)], ids=str)
def test_blocks_of_earlier_keys_match_at_other_head_dims_with_sinks(name, dims, changes):
    compare_parts(name, CUTS["uneven"], usual(dims[0], **changes), dims=dims, with_sinks=True)


@pytest.mark.parametrize("window", [None, 100, 900])
def test_a_deterministic_backward_of_earlier_keys_ends_and_gives_the_same_bits(name, window):
    """Of a block whose first keys no query's window reaches, too: flash-attn 3 of 2.8 would wait for these."""
    scoring = usual(window=window)
    needs = Needs(128, 128, torch.bfloat16, window=window is not None, deterministic=True)
    kernel = kernel_or_skip(name, needs)
    case = random_case(512, 2048, heads=(8, 2), dims=(128, 128), dtype=torch.bfloat16, device=torch.device("cuda"))
    first, *others = (run_in_parts(kernel, case, parts_of((0, 1536, 2048), scoring, case.q.device)) for _ in range(3))
    assert all(torch.equal(first[part], other[part]) for other in others for part in first)


@pytest.mark.parametrize("window", [None, 900])
@pytest.mark.parametrize("limit_heads", [1, 4])
def test_calls_of_earlier_keys_split_by_heads_give_what_one_call_gives(name, limit_heads, window):
    whole = kernel_or_skip(name)
    scoring, device = usual(window=window), torch.device("cuda")
    case = random_case(512, 2048, heads=(8, 2), dims=(128, 128), dtype=torch.bfloat16, device=device)
    parts = parts_of((0, 1536, 2048), scoring, device)
    limited = _limited(whole, limit_heads * 128 * (1536 + 2 * 128))
    assert_close(run_in_parts(limited, case, parts), run_in_parts(whole, case, parts), 5e-3)


def compare_parts(
    name: str, cuts: tuple[int, ...], scoring: Scoring, *, dims: tuple[int, int], with_sinks: bool = False
) -> None:
    """The last chunk's attention, merged, against the definition in float64."""
    needs = Needs(
        *dims, torch.bfloat16, window=scoring.window is not None, softcap=scoring.softcap is not None, earlier_keys=True
    )
    kernel, device = kernel_or_skip(name, needs), torch.device("cuda")
    queries, keys = cuts[-1] - cuts[-2], cuts[-1]
    case = random_case(
        queries, keys, heads=(8, 2), dims=dims, dtype=torch.bfloat16, device=device, with_sinks=with_sinks
    )
    got = run_in_parts(kernel, case, parts_of(cuts, scoring, device))
    mask = seen(queries, keys, gap=-queries, window=scoring.window).to(device)
    assert_close(got, run_written_out(case.double(), mask, scoring), RELATIVE[torch.bfloat16])


def test_more_than_2_to_the_31_elements_of_queries_match_the_same_documents_alone(name):
    """524,288 + 8,192 tokens x 32 heads x 128: the last documents lie beyond what 32 bits count."""
    kernel = kernel_or_skip(name)
    gib_needed = 60
    if torch.cuda.mem_get_info()[0] < gib_needed * 2**30:
        pytest.skip(f"needs {gib_needed} GiB of free GPU memory")
    bounds = tuple(range(0, 524_288 + 8_192 + 1, 4_096))
    inputs = random_inputs(bounds, heads=(32, 8))
    assert inputs.q.numel() > 2**31
    got = run(kernel, inputs, usual())
    for start in (0, bounds[len(bounds) // 2], bounds[-2]):
        document = slice(start, start + 4_096)
        alone = replace(
            random_inputs((0, 4_096), heads=(32, 8)),
            **{part: getattr(inputs, part)[document].contiguous() for part in ("q", "k", "v", "dout")},
        )
        expected = run(kernel, alone, usual())
        for part in ("out", "dq", "dk", "dv"):
            assert relative_error(got[part][document], expected[part]) < 5e-3, (part, start)


def test_the_kernel_is_chosen_by_name_after_its_trial_and_auto_takes_the_first_that_passes(name, device):
    kernel_or_skip(name)
    assert choose(name, device=device).kernel.name == name
    auto = choose("auto", device=device)
    order = fastest_first(torch.cuda.get_device_capability(device))
    faster = order[: order.index(auto.kernel.name)]
    assert name not in faster, auto.passed_over
