"""Loss by position and by document length: every token in its bucket, whatever shard it is in."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.data.batch import IGNORE_INDEX, Batch
from pipeline.memory.tiled_loss import LogitsTransform, tiled_loss
from pipeline.metrics.buckets import bucket_edges, bucket_names
from pipeline.metrics.reduction import Gathered
from pipeline.parallel.mesh import Mesh
from pipeline.parallel.shard import Layout
from pipeline.train.token_losses import BY_DOCUMENT_LENGTH, BY_POSITION, TokenLosses, by_first_token

SEQ_LEN = 1024
LENGTHS = (200, 1, 300, 499)  # 24 tokens of padding
CPU = torch.device("cpu")


def test_buckets_double_up_to_the_full_length():
    assert bucket_edges(256) == ()
    assert bucket_edges(257) == (256,)
    assert bucket_edges(4_194_304)[-2:] == (1_048_576, 2_097_152)
    assert bucket_names("x", 1000) == ("x/00000000", "x/00000256", "x/00000512")


def boundaries() -> np.ndarray:
    return np.cumsum((0, *LENGTHS)).astype(np.int32)


def whole_sample() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions, labels and a loss for every token."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.cat([*(torch.arange(length) for length in LENGTHS), torch.zeros(SEQ_LEN - sum(LENGTHS)).long()])
    labels = torch.randint(0, 9, (SEQ_LEN,), generator=generator)
    labels[torch.tensor(boundaries()[1:] - 1).long()] = IGNORE_INDEX
    labels[sum(LENGTHS) :] = IGNORE_INDEX
    return positions, labels, torch.rand(SEQ_LEN, generator=generator) * (labels != IGNORE_INDEX)


def by_bucket(values: list[int]) -> dict[str, float]:
    """Mean loss of the counting tokens by the bucket of `values`, token by token."""
    _, labels, losses = whole_sample()
    found: dict[str, list[float]] = {}
    for value, label, loss in zip(values, labels.tolist(), losses.tolist(), strict=True):
        if label != IGNORE_INDEX:
            first = 0 if value < 256 else 2 ** int(math.log2(value))
            found.setdefault(f"{first:08d}", []).append(loss)
    return {first: sum(of) / len(of) for first, of in sorted(found.items())}


@pytest.mark.parametrize("sp", [1, 2, 4])
@pytest.mark.parametrize("cross_document", [False, True])
@pytest.mark.parametrize("chunk_tokens", [SEQ_LEN, 300])
def test_buckets_hold_the_mean_over_all_shards(sp, cross_document, chunk_tokens):
    layout = Layout(SEQ_LEN, sp, chunk_tokens)
    positions, labels, losses = whole_sample()
    if cross_document:
        positions = torch.arange(SEQ_LEN)
    ranks = []
    for rank in range(sp):
        own = torch.cat([torch.arange(part.start, part.stop) for part in layout.shards(rank)])
        batch = Batch(
            input_ids=labels[None, own],
            labels=labels[None, own],
            position_ids=positions[None, own],
            cu_seqlens=torch.tensor([0, sum(LENGTHS)]),
            n_tokens=sum(LENGTHS),
            n_valid=0,
            seq_len=SEQ_LEN,
            sample=0,
        )
        measured = TokenLosses(layout, Mesh(rank=rank, world_size=sp, sp=sp, sp_group=None), CPU)
        for _ in range(2):  # micro-batches; the same twice leaves means as they are
            measured.buffer(batch, boundaries()).copy_(losses[own])
        ranks.append(measured.metrics())
    told = Gathered(
        ranks[0],
        values=[[metric.value for metric in of] for of in ranks],
        weights=[[metric.weight for metric in of] for of in ranks],
    ).reduced()
    lengths = [length for length in LENGTHS for _ in range(length)] + [0] * (SEQ_LEN - sum(LENGTHS))
    for kind, values in ((BY_POSITION, positions.tolist()), (BY_DOCUMENT_LENGTH, lengths)):
        found = {first: loss for first, loss in by_first_token(told, kind).items() if loss is not None}
        assert found == pytest.approx(by_bucket(values)), kind
        assert len(found) > 1
    assert by_first_token(told, BY_DOCUMENT_LENGTH)["00000512"] is None, "no document is so long"


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("tile_tokens", [3, 16])
def test_the_tiled_loss_tells_the_loss_of_each_token_and_its_own_value_stays_the_same(grad, tile_tokens):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(1, 10, 4, generator=generator), torch.randn(7, 4, generator=generator)
    hidden.requires_grad_(grad)
    labels = torch.randint(0, 7, (1, 10), generator=generator)
    labels[0, 2] = IGNORE_INDEX
    options = {"tile_tokens": tile_tokens, "transform": LogitsTransform()}
    each = torch.full((10,), math.nan)
    loss = tiled_loss(hidden, weight, None, labels, token_losses=each, **options)
    assert torch.equal(loss, tiled_loss(hidden, weight, None, labels, **options))
    assert each[2] == 0
    stock = F.cross_entropy((hidden @ weight.T)[0], labels[0], ignore_index=IGNORE_INDEX, reduction="none")
    torch.testing.assert_close(each, stock.detach())
    assert loss.requires_grad is grad
    assert each.requires_grad is False
