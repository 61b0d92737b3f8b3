"""DeepSpeed-Ulysses' claim, counted: what a rank sends stays the same when tokens and ranks grow together."""

import json

import pytest

from tests.multiprocess.ranks import run_ranks

HEADS, KV_HEADS, HEAD_DIM, LOCAL_SEQ_LEN = 8, 2, 4, 6  # as in the worker


@pytest.fixture(scope="module")
def sent(tmp_path_factory) -> dict[int, dict[str, int]]:
    folder = tmp_path_factory.mktemp("volume")
    run_ranks("tests.multiprocess.volume", str(folder), ranks=4, timeout=120, logs=folder)
    return {int(sp): counted for sp, counted in json.loads((folder / "results.json").read_text()).items()}


@pytest.mark.parametrize("sp", [1, 2, 4])
def test_a_rank_sends_what_the_formula_says(sent, sp):
    """(N/P) x head_dim x (2 x heads + 2 x max(KV heads, P)) x (P - 1) / P elements per layer and direction."""
    expected = LOCAL_SEQ_LEN * HEAD_DIM * (2 * HEADS + 2 * max(KV_HEADS, sp)) * (sp - 1) // sp
    assert sent[sp] == {"forward": expected, "backward": expected}


def test_what_a_rank_sends_per_token_of_its_own_does_not_grow_with_the_ranks(sent):
    """Up to the share that stays at home and the KV heads that must be replicated beyond their number."""
    without_replication = dict.fromkeys((2, 4), LOCAL_SEQ_LEN * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS))
    share = {sp: sent[sp]["forward"] * sp / (sp - 1) / without_replication[sp] for sp in (2, 4)}
    assert share[2] == 1.0
    assert share[4] == pytest.approx((2 * HEADS + 2 * 4) / (2 * HEADS + 2 * KV_HEADS))
