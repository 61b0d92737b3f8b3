"""Layers in chunks: what runs, what waits where, what is given back, and what is refused."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from pipeline.attention.chunks import ChunkedSample
from pipeline.attention.function import NAME as ALST_ATTENTION
from pipeline.attention.function import AttentionContext, register
from pipeline.attention.kernels.cpu import CpuKernel
from pipeline.attention.kernels.interface import AttentionGrads
from pipeline.attention.segments import segments_of
from pipeline.errors import RecipeError, RunError
from pipeline.memory import sequence_chunks
from pipeline.memory.apply import Attached, attach
from pipeline.memory.hidden_states import InHostMemory, OnDevice
from pipeline.memory.keys_values import DeviceBlocks, HostBlocks
from pipeline.memory.offload import DeviceStore
from pipeline.model.anatomy import decoder_layers
from pipeline.model.parity import BOUNDS, NothingBelowFloat64, build_tiny, sample, train_stock
from pipeline.parallel.mesh import Mesh
from pipeline.parallel.shard import Layout
from pipeline.recipe.load import load
from pipeline.train.optimizer import parameter_groups
from tests.architectures import ARCHITECTURES

LAYERS, CHUNK_TOKENS = 5, 9
CHECKPOINT = "memory.activation_checkpoint"
ON_DEVICE, ON_HOST = ("gpu", "gpu"), ("cpu", "cpu")


class CountingKernel(CpuKernel):
    """Knows how many pairs of query and key it has looked at, forward and backward."""

    def __init__(self) -> None:
        self.forward_pairs = self.backward_pairs = 0

    def forward(self, q, k, v, sinks, segments, scoring):
        self.forward_pairs += pairs_of(segments)
        return super().forward(q, k, v, sinks, segments, scoring)

    def backward(self, dout, q, k, v, sinks, out, lse, segments, scoring):
        self.backward_pairs += pairs_of(segments)
        return super().backward(dout, q, k, v, sinks, out, lse, segments, scoring)


def pairs_of(segments) -> int:
    if segments.keys is not None:
        return segments.num_tokens * segments.keys.tokens
    return sum((stop - start) * (stop - start + 1) // 2 for start, stop in pairwise(segments.bounds))


ALL_PAIRS = sum((stop - start) * (stop - start + 1) // 2 for start, stop in pairwise(BOUNDS))


def tiny(name: str = "llama", **overrides) -> PreTrainedModel:
    config = ARCHITECTURES[name] | {"num_hidden_layers": LAYERS} | overrides
    register()
    return build_tiny(config.pop("model_type"), config, attention=ALST_ATTENTION)


def in_chunks(
    model: PreTrainedModel, places: tuple[str, str] = ON_DEVICE, *settings: str, chunk_tokens: int = CHUNK_TOKENS
) -> Attached:
    chunks = f"chunk_tokens: {chunk_tokens}, hidden_states: {places[0]}, keys_values: {places[1]}"
    memory = load(
        "tiny",
        overrides=[
            f"memory.sequence_chunks={{{chunks}, keep_keys_values: false}}",
            f"{CHECKPOINT}={{resident_groups: 0, disk_groups: 0}}",
            *settings,
        ],
    ).memory
    tiles = {"norm_tile_tokens": 5, "mlp_tile_tokens": 4, "loss_tile_tokens": 11}
    return attach(model, memory, **tiles, local_chunk_tokens=chunk_tokens)


def loss_of(model: PreTrainedModel, kernel: CpuKernel | None = None, *, chunk_tokens: int = CHUNK_TOKENS):
    segments = segments_of(torch.tensor(BOUNDS, dtype=torch.int32), device=torch.device("cpu"))
    mesh, layout = Mesh(rank=0, world_size=1, sp=1, sp_group=None), Layout(BOUNDS[-1], 1, chunk_tokens)
    context = AttentionContext(segments, mesh, kernel or CpuKernel(), layout)
    return model(**sample(model.config.vocab_size), attention_context=context)


def assert_trained_as_stock(
    model: PreTrainedModel, stock: PreTrainedModel, *, chunk_tokens: int = CHUNK_TOKENS
) -> None:
    with NothingBelowFloat64():
        loss_of(model, chunk_tokens=chunk_tokens).backward()
    expected = train_stock(stock, mode=NothingBelowFloat64)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected.gradients[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("places", [ON_DEVICE, ON_HOST])
@pytest.mark.parametrize(("layers_per_group", "keep_attention"), [(1, False), (2, False), (1, True), (2, True)])
def test_attention_looks_at_every_pair_once_a_run_and_never_a_third_time(places, layers_per_group, keep_attention):
    model, kernel = tiny(), CountingKernel()
    kept = f"{CHECKPOINT}={{keep_attention: {str(keep_attention).lower()}, layers_per_group: {layers_per_group}}}"
    in_chunks(model, places, kept)
    loss = loss_of(model, kernel)
    assert kernel.forward_pairs == LAYERS * ALL_PAIRS, "blocks that share no document are skipped"
    loss.backward()
    assert kernel.forward_pairs == (1 if keep_attention else 2) * LAYERS * ALL_PAIRS
    assert kernel.backward_pairs == LAYERS * ALL_PAIRS


def matmul_flops(model: PreTrainedModel, *, keep_keys_values: bool | None) -> int:
    """Of the layers' linear maps, in a forward and backward; None is without chunks."""
    if keep_keys_values is None:
        memory = load("tiny", overrides=[f"{CHECKPOINT}={{offload: null, resident_groups: 0, disk_groups: 0}}"]).memory
        memory = memory.model_copy(update={"tiled_mlp": None})
        attach(model, memory, norm_tile_tokens=61, mlp_tile_tokens=61, loss_tile_tokens=61)
    else:
        kept = f"memory.sequence_chunks.keep_keys_values={str(keep_keys_values).lower()}"
        in_chunks(model, ON_DEVICE, kept, "memory.tiled_mlp=null", f"{CHECKPOINT}={{keep_attention: true}}")
    with Matmuls() as counter:
        loss_of(model, NoAttention()).backward()
    return counter.flops


class Matmuls(TorchDispatchMode):
    """Counts the FLOPs of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.flops += 2 * args[0].numel() * args[1].shape[1]
        return func(*args, **(kwargs or {}))


class NoAttention(CpuKernel):
    """Costs nothing."""

    def forward(self, q, k, v, sinks, segments, scoring):
        return q.new_zeros(*q.shape[:2], v.shape[-1]), q.new_zeros(q.shape[1], q.shape[0])

    def backward(self, dout, q, k, v, sinks, out, lse, segments, scoring):
        return AttentionGrads(torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), None)


LLAMA_8B = {"hidden_size": 64, "intermediate_size": 224, "num_attention_heads": 8, "num_key_value_heads": 2}
"""The proportions of a layer of Llama-3.1-8B; a head dim of 8."""


def test_keys_and_values_are_rebuilt_for_less_than_four_percent_of_a_layers_matmuls():
    model = tiny(**LLAMA_8B, head_dim=8)
    layer = decoder_layers(model)[0]
    parameters = sum(module.weight.numel() for module in layer.modules() if isinstance(module, nn.Linear))
    stock = matmul_flops(model, keep_keys_values=None)
    kept = matmul_flops(tiny(**LLAMA_8B, head_dim=8), keep_keys_values=True)
    rebuilt = matmul_flops(tiny(**LLAMA_8B, head_dim=8), keep_keys_values=False)
    forward = 2 * LAYERS * parameters * BOUNDS[-1]
    assert stock > 4 * forward, "forward, once more, and a backward of two"
    assert kept == stock, "full recompute, and no more"
    assert 0 < (rebuilt - kept) / forward < 0.04


@pytest.mark.parametrize("settings", [(), (f"{CHECKPOINT}={{layers_per_group: 2}}",)])
def test_after_backward_everything_is_given_back(settings):
    model = tiny()
    attached = in_chunks(model, ON_HOST, *settings, f"{CHECKPOINT}.keep_attention=true")
    for _ in range(2):
        loss_of(model).backward()
        peaks = [arena.peak_bytes for arena in attached.arenas]
        assert attached.store.held_bytes == 0
    assert [arena.peak_bytes for arena in attached.arenas] == peaks, "the second step takes no more than the first"


def test_in_host_memory_a_layers_output_is_the_next_ones_checkpoint():
    """Beside the groups' inputs three more: the last layer's and the last norm's output and its gradient, or two
    gradients. In a group that is live its layers' inputs; outputs lie over inputs in forward."""
    one = BOUNDS[-1] * ARCHITECTURES["llama"]["hidden_size"] * 8
    for layers_per_group in (1, 2, LAYERS):
        model = tiny()
        attached = in_chunks(model, ON_HOST, f"{CHECKPOINT}={{layers_per_group: {layers_per_group}}}")
        loss_of(model).backward()
        groups = -(-LAYERS // layers_per_group)
        assert attached.arenas[0].peak_bytes / one == pytest.approx(groups + max(3, layers_per_group), abs=0.1)


@pytest.mark.parametrize("places", [ON_DEVICE, ON_HOST])
def test_evaluation_runs_in_chunks_too_and_leaves_nothing(places):
    model = tiny()
    attached = in_chunks(model, places)
    trained = loss_of(model).detach()
    model.eval()
    with torch.no_grad():
        before = [arena.peak_bytes for arena in attached.arenas]
        assert torch.equal(loss_of(model), trained)
        assert [arena.peak_bytes for arena in attached.arenas] == before
    model.train()


@pytest.mark.parametrize("places", [ON_DEVICE, ON_HOST])
@pytest.mark.parametrize("chunk_tokens", [BOUNDS[-1], 10 * BOUNDS[-1]])
def test_one_chunk_is_the_whole_sequence(places, chunk_tokens):
    model, stock = (
        tiny(),
        build_tiny("llama", ARCHITECTURES["llama"] | {"num_hidden_layers": LAYERS}, attention="eager"),
    )
    in_chunks(model, places, chunk_tokens=chunk_tokens)
    assert_trained_as_stock(model, stock, chunk_tokens=chunk_tokens)


class Skipping(nn.Module):
    """A layer with a path around it, whose gradient is the same tensor as the layer's own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: torch.Tensor, **others) -> torch.Tensor:
        return hidden_states + self.layer(hidden_states, **others)


@pytest.mark.parametrize("places", [ON_DEVICE, ON_HOST])
def test_a_gradient_that_others_need_is_not_overwritten(places):
    model, stock = (
        tiny(),
        build_tiny("llama", ARCHITECTURES["llama"] | {"num_hidden_layers": LAYERS}, attention="eager"),
    )
    in_chunks(model, places)
    for changed in (model, stock):
        changed.model.layers[1] = Skipping(changed.model.layers[1])
        changed.model.layers[3] = Skipping(changed.model.layers[3])
    assert_trained_as_stock(model, stock)


class Adding(nn.Module):
    """A layer and two sums behind it: the second may lie where the layer's output lay."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: torch.Tensor, **others) -> torch.Tensor:
        out = self.layer(hidden_states, **others)
        out = out + hidden_states
        return out + hidden_states


@pytest.mark.parametrize("places", [ON_DEVICE, ON_HOST])
def test_an_address_that_is_used_again_is_not_taken_for_the_same_tensor(places):
    model, stock = (
        tiny(),
        build_tiny("llama", ARCHITECTURES["llama"] | {"num_hidden_layers": LAYERS}, attention="eager"),
    )
    in_chunks(model, places)
    for changed in (model, stock):
        for number in (1, 3):
            changed.model.layers[number] = Adding(changed.model.layers[number])
    assert_trained_as_stock(model, stock)


@pytest.mark.parametrize("places", [ON_DEVICE, ON_HOST])
def test_a_forward_without_gradients_may_come_between_forward_and_backward(places):
    model, other = tiny(), tiny()
    for attached in (model, other):
        in_chunks(attached, places, f"{CHECKPOINT}={{keep_attention: true, layers_per_group: 2}}")
    loss_of(other).backward()
    loss = loss_of(model)
    with torch.no_grad():
        loss_of(model)
    loss.backward()
    for (name, one), same in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, same.grad), name


@pytest.mark.parametrize("places", [ON_DEVICE, ON_HOST])
def test_a_step_that_failed_leaves_nothing_to_the_next(places):
    class Failing(CpuKernel):
        calls = 0

        def backward(self, *args):
            self.calls += 1
            if self.calls == 6:
                raise ZeroDivisionError
            return super().backward(*args)

    model, other = tiny(), tiny()
    for attached in (model, other):
        in_chunks(attached, places)
    with pytest.raises(ZeroDivisionError):
        loss_of(model, Failing()).backward()
    model.zero_grad()
    for attached in (model, other):
        loss_of(attached).backward()
    for (name, one), same in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, same.grad), name


def test_a_shorter_sample_before_takes_no_memory_from_the_next():
    """The self-check's."""
    peaks = []
    for shorter in (False, True):
        model = tiny()
        attached = in_chunks(model, ON_HOST)
        if shorter:
            short(model).backward()
        loss_of(model).backward()
        peaks.append([arena.peak_bytes for arena in attached.arenas])
    assert peaks[0] == peaks[1]


def short(model: PreTrainedModel) -> torch.Tensor:
    """The loss of the first document alone."""
    stop = BOUNDS[1]
    segments = segments_of(torch.tensor([0, stop], dtype=torch.int32), device=torch.device("cpu"))
    mesh = Mesh(rank=0, world_size=1, sp=1, sp_group=None)
    context = AttentionContext(segments, mesh, CpuKernel(), Layout(stop, 1, 8))
    inputs = {name: tensor[:, :stop] for name, tensor in sample(model.config.vocab_size).items()}
    return model(**inputs, attention_context=context)


class Watching(HostBlocks):
    """Knows how many blocks of keys are on the device."""

    most = 0

    def add_grads(self, chunk, rows, grads):
        super().add_grads(chunk, rows, grads)
        there = sum(handle.resident is not None for (_, kind), handle in self._there.items() if kind == "k")
        self.most = max(self.most, there)


def test_of_blocks_in_host_memory_the_device_holds_the_next_one_alone():
    blocks = Watching(pinned=False)
    for chunk in range(6):
        blocks.put(chunk, (torch.ones(4, 1, 2), torch.ones(4, 1, 2)))
    for chunk in reversed(range(6)):
        for earlier in range(chunk):
            blocks.get(earlier)
            if earlier + 1 < chunk:
                blocks.start(earlier + 1, grads=True)
            blocks.add_grads(earlier, slice(0, 4), (torch.ones(4, 1, 2), torch.ones(4, 1, 2)))
        blocks.take_grads(chunk)
        blocks.drop(chunk)
    assert blocks.most == 1


@pytest.mark.parametrize("layers_per_group", [2, LAYERS])
@pytest.mark.parametrize("places", [ON_DEVICE, ON_HOST])
def test_what_is_kept_of_attention_is_looked_at_where_it_waits_when_a_group_runs_again(places, layers_per_group):
    model = tiny()
    attached = in_chunks(model, places, f"{CHECKPOINT}={{keep_attention: true, layers_per_group: {layers_per_group}}}")
    loss = loss_of(model)
    waiting = attached.store.peak_bytes
    loss.backward()
    assert attached.store.peak_bytes == waiting


def test_a_model_that_changes_hidden_states_between_its_layers_is_not_grouped():
    model = tiny()
    in_chunks(model, ON_DEVICE, f"{CHECKPOINT}={{layers_per_group: 2}}")
    model.model.layers[0] = Skipping(model.model.layers[0])
    with pytest.raises(RunError, match=r"changes hidden states between its layers.*layers_per_group: 1"):
        loss_of(model)


def test_a_layer_that_asks_for_attention_twice_is_refused_by_name():
    model = tiny("diffllama")
    in_chunks(model)
    with pytest.raises(RunError, match=r"DiffLlamaDecoderLayer cannot run in chunks.*2 times.*sequence_chunks: null"):
        loss_of(model)


def test_frozen_embeddings_and_recorded_router_logits_are_refused():
    model = tiny()
    model.get_input_embeddings().requires_grad_(False)
    in_chunks(model)
    with pytest.raises(RunError, match="input needs no gradient"):
        loss_of(model)
    model = tiny("mixtral", num_hidden_layers=2)
    model.config.output_router_logits = True
    waiting = sequence_chunks.Waiting(OnDevice(), DeviceBlocks(), DeviceStore(), DeviceStore(), DeviceStore())
    with pytest.raises(RecipeError, match="output_router_logits"):
        sequence_chunks.attach(model, waiting)


def test_embeddings_in_host_memory_do_not_decay():
    model = tiny()
    names = {parameter: name for name, parameter in model.named_parameters()}
    before = [[names[p] for p in group["params"]] for group in parameter_groups(model, weight_decay=0.1, on="matrices")]
    in_chunks(model, ON_HOST)
    after = [[names[p] for p in group["params"]] for group in parameter_groups(model, weight_decay=0.1, on="matrices")]
    assert before == after
    assert list(dict(model.named_parameters())) == list(names.values())


def test_a_host_block_keeps_its_place_from_layer_to_layer():
    blocks = HostBlocks(pinned=False)
    for layer in range(3):
        for chunk in range(4):
            block = torch.full((5, 1, 2), float(10 * layer + chunk))
            blocks.put(chunk, (block, 2 * block))
        for chunk in reversed(range(4)):
            k, v = blocks.get(chunk)
            assert float(k[0, 0, 0]) == 10 * layer + chunk
            assert float(v[0, 0, 0]) == 2 * (10 * layer + chunk)
            blocks.add_grads(chunk, slice(1, 3), (torch.ones(2, 1, 2), torch.ones(2, 1, 2)))
            blocks.add_grads(chunk, slice(0, 5), (torch.ones(5, 1, 2), torch.ones(5, 1, 2)))
            dk, _ = blocks.take_grads(chunk)
            assert dk[:, 0, 0].tolist() == [1, 2, 2, 1, 1]
            blocks.drop(chunk)
    assert blocks.arena.peak_bytes == 4 * 4 * 512, "k, v, dk and dv of four chunks, each on a border of 512 bytes"


def test_rows_in_host_memory_are_read_and_written_and_memory_is_used_again():
    states = InHostMemory(pinned=False)
    device, shape = torch.device("cpu"), torch.Size((1, 6, 3))
    first, second = (states.empty(shape, torch.float32, device) for _ in range(2))
    assert first.data_ptr() != second.data_ptr()
    assert not first._is_view()
    states.write(first, slice(2, 5), torch.ones(1, 3, 3))
    states.settle()
    states.start(first, slice(2, 5), device)
    assert states.read(first, slice(2, 5), device).tolist() == torch.ones(1, 3, 3).tolist()
    address, view = first.data_ptr(), first[:, 1:]
    del first
    assert states.empty(shape, torch.float32, device).data_ptr() != address, "a view of it is held"
    del view
    assert states.empty(shape, torch.float32, device).data_ptr() == address
    del second
    states.begin()
    wider = states.empty(torch.Size((1, 12, 3)), torch.float32, device)
    assert wider.data_ptr() == address, "nothing is lent: the memory of one shape serves another"


# Broken on purpose: what the comparison with the stock model must see


def without_the_first_block(self, chunk, window, right=ChunkedSample.earlier):
    return right(self, chunk, window)[1:]


def sums_that_forget(self, chunk, rows, grads):
    self._sums[chunk] = tuple(torch.zeros_like(x) for x in self._blocks[chunk])


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [(ChunkedSample, "earlier", without_the_first_block), (DeviceBlocks, "add_grads", sums_that_forget)],
)
def test_what_is_broken_on_purpose_is_seen(monkeypatch, owner, name, broken):
    monkeypatch.setattr(owner, name, broken)
    model = tiny()
    in_chunks(model)
    stock = build_tiny("llama", ARCHITECTURES["llama"] | {"num_hidden_layers": LAYERS}, attention="eager")
    with pytest.raises(AssertionError):
        assert_trained_as_stock(model, stock)
