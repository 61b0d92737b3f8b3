"""Each memory feature against the stock model on one rank: loss, every gradient, parameter names, bytes held."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from pipeline.errors import RecipeError, RunError
from pipeline.memory import activation_checkpoint, tiled_loss, tiled_mlp, tiled_norm
from pipeline.memory.offload import DeviceStore, HostStore
from pipeline.memory.tiled_loss import IGNORE_INDEX, LogitsTransform, logits_transform
from pipeline.memory.tiled_mlp import TiledMLP
from pipeline.memory.tiled_norm import TiledNorm
from pipeline.model.tiny import tiny_config

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


# Blocks of experts


class Experts(nn.Module):
    """Parameters of its own, a router, and a tuple for the layer: what blocks of experts do in transformers."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(8, experts, bias=False)
        self.experts = nn.ParameterList(nn.Parameter(torch.randn(8, 8)) for _ in range(experts))
        self.shared = nn.Parameter(torch.randn(8, 8))

    def forward(self, hidden_states):
        scores = self.router(hidden_states).softmax(-1)
        chosen = scores.argmax(-1)
        out = hidden_states @ self.shared
        for index, weight in enumerate(self.experts):
            taken = (chosen == index)[..., None]
            if taken.any():
                out = out + taken * scores[..., index, None] * (hidden_states @ weight)
        return out, scores


def experts() -> Experts:
    torch.manual_seed(3)
    return Experts().double()


def hidden_of_experts() -> torch.Tensor:
    return torch.randn(1, 29, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64).abs()


@pytest.mark.parametrize("tile_tokens", [1, 4, 28, 29, 100])
def test_a_tiled_block_of_experts_trains_as_the_stock_block(tile_tokens):
    stock, tiled = experts(), TiledMLP(experts(), tile_tokens=tile_tokens)
    assert [name for name, _ in tiled.named_parameters()] == [name for name, _ in stock.named_parameters()]
    results = []
    for block in (stock, tiled):
        hidden = hidden_of_experts().requires_grad_()
        out = block(hidden)[0]
        (out.square().sum() * 0.3).backward()
        results.append([out, hidden.grad, *(p.grad for p in block.parameters())])
    for mine, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if theirs is None else theirs, rtol=1e-10, atol=1e-12)


def test_what_a_block_returns_beside_its_output_is_none():
    out, scores = TiledMLP(experts(), tile_tokens=4)(hidden_of_experts())
    assert out.shape == (1, 29, 8)
    assert scores is None


def test_an_expert_that_no_token_chose_has_a_gradient_of_zero_so_that_no_rank_waits_for_it():
    block = experts()
    with torch.no_grad():
        block.router.weight[2] = -100.0  # inputs are positive
    tiled = TiledMLP(block, tile_tokens=4)
    tiled(hidden_of_experts())[0].sum().backward()
    assert torch.equal(tiled.experts[2].grad, torch.zeros(8, 8, dtype=torch.float64))
    assert all(parameter.grad is not None for parameter in tiled.parameters())


def test_frozen_parameters_of_an_mlp_stay_without_gradient():
    block = experts()
    block.shared.requires_grad_(False)
    tiled = TiledMLP(block, tile_tokens=4)
    tiled(hidden_of_experts())[0].sum().backward()
    assert tiled.shared.grad is None
    assert tiled.router.weight.grad is not None


def test_training_mode_reaches_the_mlp_inside():
    tiled = TiledMLP(experts(), tile_tokens=4)
    assert not tiled.eval().stock.training
    assert tiled.train().stock.training


def test_an_mlp_that_returns_another_dtype_keeps_it():
    class Widening(nn.Linear):
        def forward(self, x):
            return super().forward(x).double()

    tiled = TiledMLP(Widening(8, 8), tile_tokens=4)
    hidden = torch.randn(1, 9, 8, requires_grad=True)
    out = tiled(hidden)
    out.sum().backward()
    assert out.dtype == torch.float64
    assert hidden.grad.dtype == tiled.weight.grad.dtype == torch.float32


# Norms


@pytest.mark.parametrize("tile_tokens", [1, 5, SEQ_LEN - 1, SEQ_LEN, 10 * SEQ_LEN])
def test_tiled_norms_train_as_the_stock_norms_at_any_tile(tile_tokens):
    assert_same_training(lambda model: tiled_norm.attach(model, tile_tokens=tile_tokens))


def test_norms_of_hidden_states_are_tiled_and_those_of_heads_are_not():
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["qwen3"](**tiny_config("qwen3")))
    tiled_norm.attach(model, tile_tokens=4)
    layers = model.model.layers
    assert isinstance(model.model.norm, TiledNorm)
    assert all(isinstance(layer.input_layernorm, TiledNorm) for layer in layers)
    assert all(isinstance(layer.post_attention_layernorm, TiledNorm) for layer in layers)
    assert not any(isinstance(layer.self_attn.q_norm, TiledNorm) for layer in layers)


def test_a_tiled_norm_keeps_its_input_and_nothing_wider():
    """In bfloat16, where a stock norm keeps float32 copies."""
    norm = llama().bfloat16().model.norm
    hidden = torch.randn(1, 64, 32, dtype=torch.bfloat16, requires_grad=True)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    for module, is_tiled in ((norm, False), (TiledNorm(norm, tile_tokens=4), True)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            module(hidden)
        assert any(tensor.dtype == torch.float32 for tensor in kept) is not is_tiled
    assert [tensor.data_ptr() for tensor in kept] == [hidden.data_ptr()]


# What cannot be tiled


def test_recorded_router_logits_are_refused_because_they_would_get_no_gradient():
    model = llama()
    model.config.output_router_logits = True
    with pytest.raises(RecipeError, match=r"output_router_logits = True: must be false.*no gradient; set"):
        tiled_mlp.attach(model, tile_tokens=4)


def test_a_layer_without_an_mlp_of_its_own_is_refused_by_name():
    model = OPTForCausalLM(OPTConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(RecipeError, match=r"OPTDecoderLayer has no MLP of its own among .*fc1.*; set memory.tiled_mlp"):
        tiled_mlp.attach(model, tile_tokens=4)


def test_every_mlp_of_a_layer_is_tiled():
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["granitemoeshared"](**tiny_config("granitemoeshared")))
    tiled_mlp.attach(model, tile_tokens=4)
    for layer in model.model.layers:
        assert isinstance(layer.block_sparse_moe, TiledMLP)


def test_an_mlp_that_takes_more_than_hidden_states_is_refused_by_name():
    with pytest.raises(RunError, match=r"Experts takes more than hidden states; set memory.tiled_mlp: null"):
        TiledMLP(experts(), tile_tokens=4)(hidden_of_experts(), residual=hidden_of_experts())


def test_an_mlp_that_changes_the_shape_is_refused_by_name():
    with pytest.raises(RunError, match=r"Linear does not return what it takes; set memory.tiled_mlp: null"):
        TiledMLP(nn.Linear(8, 4), tile_tokens=4)(torch.randn(1, 9, 8))


# What is around the head


@pytest.mark.parametrize(
    ("model_type", "config", "expected"),
    [
        ("llama", {}, LogitsTransform()),
        ("granite", {"logits_scaling": 8.0}, LogitsTransform(1 / 8)),
        ("hyperclovax", {"logits_scaling": 8.0}, LogitsTransform(8.0)),
        ("cohere", {"logit_scale": 0.0625}, LogitsTransform(0.0625)),
        ("gemma2", {"final_logit_softcapping": 30.0}, LogitsTransform(softcap=30.0)),
        ("gemma2", {"final_logit_softcapping": None}, LogitsTransform()),
        ("minicpm3", {"hidden_size": 64, "dim_model_base": 16}, LogitsTransform(0.25)),
        ("phi", {}, LogitsTransform()),
    ],
)
def test_what_a_model_does_around_its_head_is_taken_from_its_own_forward(model_type, config, expected):
    settings = CONFIG_MAPPING[model_type](**tiny_config(model_type, config))
    with torch.device("meta"):  # no weights are needed
        model = AutoModelForCausalLM.from_config(settings)
    assert logits_transform(model) == expected


class Squared(LlamaForCausalLM):
    def forward(self, **inputs):
        out = LlamaForCausalLM.forward(self, **inputs)
        out.logits = out.logits.square()
        return out


class Tempered(LlamaForCausalLM):
    def forward(self, **inputs):
        out = LlamaForCausalLM.forward(self, **inputs)
        out.logits = out.logits / 1.01
        return out


@pytest.mark.parametrize("strange", [Squared, Tempered])
def test_logits_changed_in_a_way_that_is_not_known_are_refused_rather_than_trained_wrongly(strange):
    model = llama()
    model.__class__ = strange
    with pytest.raises(RunError, match="changes logits in a way that is not known here"):
        tiled_loss.attach(model, tile_tokens=4)


def test_hidden_states_changed_before_the_head_are_refused():
    class Shifted(LlamaForCausalLM):
        def forward(self, input_ids):
            out = self.model(input_ids=input_ids)
            out.logits = self.lm_head(out.last_hidden_state + 1)
            return out

    model = llama()
    model.__class__ = Shifted
    with pytest.raises(RunError, match="changes hidden states before its head"):
        tiled_loss.attach(model, tile_tokens=4)


@pytest.mark.parametrize("factor", [8 / 777_777, 8 / 999_999, 0.37])
def test_a_factor_on_the_loss_does_not_bias_bfloat16_gradients(factor):
    """Rounded to bfloat16, these factors are off by up to 0.24 %, and so would every gradient be."""
    torch.manual_seed(0)
    hidden = torch.randn(1, 64, 32).bfloat16().requires_grad_()
    weight = torch.randn(97, 32).bfloat16().requires_grad_()
    labels = torch.randint(97, (1, 64))

    def gradients(scale: float) -> list[torch.Tensor]:
        loss = tiled_loss.tiled_loss(hidden, weight, None, labels, tile_tokens=10, transform=LogitsTransform())
        return [grad.double() for grad in torch.autograd.grad(loss * scale, (hidden, weight))]

    for scaled, plain in zip(gradients(factor), gradients(1.0), strict=True):
        projected = float((scaled * plain).sum() / (plain * plain).sum())
        assert projected == pytest.approx(factor, rel=5e-4)


def test_liger_is_refused_where_logits_are_scaled():
    with pytest.raises(RecipeError, match=r"kernel = liger: must be own for a model that scales its logits, here by 3"):
        tiled_loss.require_liger(LogitsTransform(scale=3.0))


def test_liger_is_refused_where_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(RecipeError, match=r"kernel = liger: must be installed, .*install liger-kernel"):
        tiled_loss.attach(llama(), tile_tokens=4, kernel="liger")
