"""The planner's activation bytes against CUDA's own peak, features on and off, for a small Llama in bfloat16."""

import pytest
import torch

from tests.gpu.support import gpu_of_this_machine

TOKENS = 65_536
"""Long enough that cuBLAS's workspace and the allocator's rounding are small beside the hidden states."""
TOLERANCE = 0.12

SIZES = (
    "model.config={vocab_size: 16384, hidden_size: 1024, intermediate_size: 3584, num_hidden_layers: 4}",
    "model.config={num_attention_heads: 16, num_key_value_heads: 4}",
    "model.dtype=bfloat16",
    "memory.tiled_loss={tile_tokens: 4096}",
    "memory.tiled_mlp={tile_tokens: 4096}",
    "memory.activation_checkpoint={offload: cpu, resident_groups: 0}",
    "hardware.gpus_per_node=1",
    f"data.seq_len={TOKENS}",
    "train.self_check=null",
    "evaluation=null",
)

CHUNKS = "memory.sequence_chunks={chunk_tokens: 8192, keep_keys_values: false"

CASES = {
    "every feature": (),
    "no offload": ("memory.activation_checkpoint={offload: null}",),
    "no tiled MLP": ("memory.tiled_mlp=null",),
    "no tiled loss": ("memory.tiled_loss=null",),
    "no checkpoints": ("memory.activation_checkpoint=null",),
    "no tiled norms": ("memory.tiled_norm=null",),
    "some stay": ("memory.activation_checkpoint.resident_groups=2",),
    "groups": ("memory.activation_checkpoint={layers_per_group: 2, resident_groups: 0}",),
    "kept attention": ("memory.activation_checkpoint={keep_attention: true, resident_groups: 0}",),
    "on disk": ("memory.activation_checkpoint={offload: disk, disk_groups: 2, resident_groups: 0}",),
    "in fp8": ("memory.activation_checkpoint={offload_dtype: fp8, resident_groups: 0}",),
    "in chunks": (f"{CHUNKS}, hidden_states: gpu, keys_values: gpu}}",),
    "in chunks, kept attention": (
        f"{CHUNKS}, hidden_states: gpu, keys_values: gpu}}",
        "memory.activation_checkpoint={keep_attention: true, resident_groups: 0}",
    ),
    "in chunks, hidden states on the host": (f"{CHUNKS}, hidden_states: cpu, keys_values: gpu}}",),
    "in chunks, all on the host": (f"{CHUNKS}, hidden_states: cpu, keys_values: cpu}}",),
    "as many KV heads": ("model.config={num_key_value_heads: 16}",),
}


@pytest.mark.parametrize("name", CASES)
def test_the_planned_activations_are_what_cuda_allocates(device, name):
    pytest.importorskip("pydantic")
    from pipeline.attention.function import NAME, AttentionContext, register
    from pipeline.attention.kernels.choice import choose
    from pipeline.attention.segments import segments_of
    from pipeline.memory.apply import attach
    from pipeline.model.build import build_model
    from pipeline.parallel.mesh import Mesh
    from pipeline.parallel.shard import Layout
    from pipeline.plan.job import plan_job
    from pipeline.plan.memory import activation_bytes, activation_moment
    from pipeline.plan.offload import offload_of
    from pipeline.recipe.load import load

    kernel = choose("auto", device=device).kernel
    asked = [*SIZES, f"hardware.gpu={gpu_of_this_machine()}", f"model.attention={kernel.name}", *CASES[name]]
    plan = plan_job(load("tiny", overrides=asked))
    register()
    model = build_model(plan.recipe.model, attention=NAME, seed=0).to(device)
    tiles = {f"{name}_tile_tokens": getattr(plan, f"{name}_tile_tokens") for name in ("norm", "mlp", "loss")}
    attach(  # not attach_features: this process set no allocator
        model,
        plan.recipe.memory,
        **tiles,
        local_chunk_tokens=plan.local_chunk_tokens,
        offload=offload_of(plan),
        pinned=True,
    )
    ids = torch.randint(plan.model.vocab_size, (1, TOKENS), device=device)
    bounds = torch.tensor([0, TOKENS // 3, TOKENS], dtype=torch.int32)
    layout = Layout(TOKENS, 1, plan.chunk_tokens)
    context = AttentionContext(segments_of(bounds, device=device), Mesh(0, 1, 1, None), kernel, layout)
    on_host = plan.recipe.memory.sequence_chunks is not None and "hidden_states: cpu" in str(CASES[name])
    positions = torch.arange(TOKENS, device="cpu" if on_host else device)[None]  # as the train job has it
    inputs = {"input_ids": ids, "labels": ids, "position_ids": positions}
    model(**inputs, attention_context=context).backward()  # gradients are there from now on
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()

    model(**inputs, attention_context=context).backward()

    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    assert activation_bytes(plan) == pytest.approx(peak, rel=TOLERANCE), (kernel.name, activation_moment(plan))
