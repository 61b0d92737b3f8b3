"""Each memory feature against the stock model on one rank: loss, every gradient, parameter names, bytes held."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.errors import RunError
from pipeline.memory import activation_checkpoint, tiled_loss, tiled_mlp
from pipeline.memory.offload import DeviceStore, HostStore
from pipeline.memory.tiled_loss import IGNORE_INDEX, LogitsTransform

SEQ_LEN, VOCAB = 37, 61


def llama(**overrides) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes | overrides)).double().train()


def sample() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(VOCAB, (1, SEQ_LEN), generator=generator)
    labels[:, ::5] = IGNORE_INDEX
    return {"input_ids": torch.randint(VOCAB, (1, SEQ_LEN), generator=generator), "labels": labels}


def loss_sum_of_stock(model: LlamaForCausalLM, labels: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    logits = model(use_cache=False, **inputs).logits
    return F.cross_entropy(logits[0], labels[0], ignore_index=IGNORE_INDEX, reduction="sum")


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_training(attach, **config) -> None:
    """Loss and every gradient of a model with features equal the stock model's, under a factor on the loss."""
    stock, attached = llama(**config), llama(**config)
    names = list(attached.state_dict())
    attach(attached)
    tiled_loss.attach(attached, tile_tokens=10)
    assert list(attached.state_dict()) == names, "parameter names changed"
    expected = loss_sum_of_stock(stock, **sample())
    (expected * 0.37).backward()
    loss = attached(**sample())
    (loss * 0.37).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    reference = gradients(stock)
    for name, grad in gradients(attached).items():
        torch.testing.assert_close(grad, reference[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_tiled_loss_trains_as_the_stock_loss(tied):
    assert_same_training(lambda model: None, tie_word_embeddings=tied)


@pytest.mark.parametrize("tile_tokens", [1, 5, SEQ_LEN - 1, SEQ_LEN, 10 * SEQ_LEN])
@pytest.mark.parametrize("bias", [False, True])
def test_tiled_mlp_trains_as_the_stock_mlp_at_any_tile(tile_tokens, bias):
    assert_same_training(lambda model: tiled_mlp.attach(model, tile_tokens=tile_tokens), mlp_bias=bias)


@pytest.mark.parametrize("store", [HostStore, DeviceStore])
def test_a_checkpointed_layer_trains_as_the_stock_layer(store):
    assert_same_training(lambda model: activation_checkpoint.attach(model, store=store()))


def test_all_features_together_train_as_the_stock_model():
    def attach(model):
        tiled_mlp.attach(model, tile_tokens=8)
        activation_checkpoint.attach(model, store=HostStore())

    assert_same_training(attach)


def test_the_store_holds_one_input_per_layer_and_nothing_after_backward():
    model, store = llama(), HostStore()
    activation_checkpoint.attach(model, store=store)
    tiled_loss.attach(model, tile_tokens=10)
    loss = model(**sample())
    assert store.held_bytes == 3 * SEQ_LEN * 32 * 8
    loss.backward()
    assert store.held_bytes == 0
    assert store.peak_bytes == 3 * SEQ_LEN * 32 * 8


def test_frozen_embeddings_under_checkpointing_are_refused_rather_than_training_nothing():
    model = llama()
    activation_checkpoint.attach(model, store=DeviceStore())
    tiled_loss.attach(model, tile_tokens=10)
    model.get_input_embeddings().requires_grad_(False)
    with pytest.raises(RunError, match="frozen"):
        model(**sample())


@pytest.mark.parametrize(
    "transform", [LogitsTransform(), LogitsTransform(0.25), LogitsTransform(2.0, softcap=1.5)], ids=str
)
@pytest.mark.parametrize("tile_tokens", [1, 7, SEQ_LEN, 1000])
@pytest.mark.parametrize("with_bias", [False, True])
def test_tiled_loss_and_its_gradients_equal_cross_entropy(transform, tile_tokens, with_bias):
    torch.manual_seed(0)
    hidden = torch.randn(1, SEQ_LEN, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCAB, 16, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(VOCAB, dtype=torch.float64, requires_grad=True) if with_bias else None
    labels = sample()["labels"]
    logits = F.linear(hidden, weight, bias) * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    expected = F.cross_entropy(logits[0], labels[0], ignore_index=IGNORE_INDEX, reduction="sum")
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    reference = torch.autograd.grad(expected * 3.0, inputs)

    loss = tiled_loss.tiled_loss(hidden, weight, bias, labels, tile_tokens=tile_tokens, transform=transform)
    grads = torch.autograd.grad(loss * 3.0, inputs)

    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for mine, theirs in zip(grads, reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_labels_that_are_all_ignored_give_zero_loss_and_zero_gradients():
    hidden = torch.randn(1, 9, 4, requires_grad=True)
    weight = torch.randn(11, 4, requires_grad=True)
    labels = torch.full((1, 9), IGNORE_INDEX)
    loss = tiled_loss.tiled_loss(hidden, weight, None, labels, tile_tokens=4, transform=LogitsTransform())
    loss.backward()
    assert loss.item() == 0.0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_evaluation_without_gradients_gives_the_same_loss():
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 9, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True)
    labels = torch.randint(11, (1, 9))
    options = {"tile_tokens": 4, "transform": LogitsTransform()}
    training = tiled_loss.tiled_loss(hidden, weight, None, labels, **options)
    with torch.no_grad():
        evaluation = tiled_loss.tiled_loss(hidden, weight, None, labels, **options)
    assert torch.equal(training.detach(), evaluation)
