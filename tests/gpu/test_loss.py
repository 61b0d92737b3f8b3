"""The loss kernels on a GPU: loss and every gradient against float64, under a factor that bfloat16 has not."""

import pytest
import torch
import torch.nn.functional as F

from pipeline.errors import RecipeError
from pipeline.memory.tiled_loss import IGNORE_INDEX, LogitsTransform, liger_loss, require_liger, tiled_loss

TOKENS, HIDDEN, VOCAB = 1000, 128, 5003
FACTOR = 8 / 777_777  # rounded to bfloat16 it would be off by 2.5e-3, and so would every gradient
RELATIVE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
UNBIASED = {torch.float32: 1e-6, torch.bfloat16: 1e-3}
"""What all gradients may have in common. Ours had 2e-4 on a CPU."""


@pytest.fixture(params=["own", "liger"])
def kernel(request):
    """(hidden, weight, bias, labels, softcap) -> loss sum."""
    if request.param == "own":

        def own(hidden, weight, bias, labels, softcap):
            transform = LogitsTransform(softcap=softcap)
            return tiled_loss(hidden, weight, bias, labels, tile_tokens=300, transform=transform)

        return own
    try:
        require_liger(LogitsTransform())
    except RecipeError as error:
        pytest.skip(f"liger: {error}")
    return lambda hidden, weight, bias, labels, softcap: liger_loss(hidden, weight, bias, labels, softcap=softcap)


def inputs(dtype: torch.dtype, with_bias: bool) -> tuple[list[torch.Tensor | None], torch.Tensor]:
    """[hidden, weight, bias], rounded to `dtype`, and labels of which every fifth is ignored."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype).requires_grad_()

    weight = (2 * HIDDEN**-0.5 * normal(VOCAB, HIDDEN).detach()).requires_grad_()
    labels = torch.randint(VOCAB, (1, TOKENS), generator=generator, device="cuda")
    labels[:, ::5] = IGNORE_INDEX
    return [normal(1, TOKENS, HIDDEN), weight, normal(VOCAB) if with_bias else None], labels


def exact(tensors: list[torch.Tensor | None], labels: torch.Tensor, softcap: float | None):
    """(loss, gradients) in float64."""
    wide = [None if x is None else x.detach().double().requires_grad_() for x in tensors]
    logits = F.linear(*wide)[0]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, labels[0], ignore_index=IGNORE_INDEX, reduction="sum")
    return loss, torch.autograd.grad(loss * FACTOR, [x for x in wide if x is not None])


@pytest.mark.parametrize("dtype", list(RELATIVE), ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_loss_and_every_gradient_are_right_under_a_factor(kernel, dtype, softcap, with_bias):
    tensors, labels = inputs(dtype, with_bias)
    expected_loss, expected = exact(tensors, labels, softcap)
    loss = kernel(*tensors, labels, softcap)
    found = torch.autograd.grad(loss * FACTOR, [x for x in tensors if x is not None])
    assert loss.dtype == torch.float32
    assert abs(loss.item() - expected_loss.item()) <= 1e-4 * expected_loss.item()
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.double() - theirs).norm() <= RELATIVE[dtype] * theirs.norm()
        assert abs((mine.double() * theirs).sum() / theirs.square().sum() - 1) <= UNBIASED[dtype]


def test_a_rank_without_labels_learns_nothing(kernel):
    tensors, labels = inputs(torch.bfloat16, True)
    loss = kernel(*tensors, torch.full_like(labels, IGNORE_INDEX), None)
    gradients = torch.autograd.grad(loss * FACTOR, tensors)
    assert not any(x.any() for x in (loss, *gradients))


def test_without_gradients_the_loss_is_the_same(kernel):
    tensors, labels = inputs(torch.bfloat16, False)
    training = kernel(*tensors, labels, None)
    with torch.no_grad():
        assert torch.allclose(kernel(*tensors, labels, None), training.detach(), rtol=1e-6, atol=0)
