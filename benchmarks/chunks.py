"""GPU bytes per token of a layer in sequence chunks: the slope of its peak over the length, measured on the CPU.

    python benchmarks/chunks.py

writes benchmarks/results/chunks.json and the table in docs/memory.md. One layer of Llama-3.1-8B's proportions at a
thirty-second of its width, in bfloat16, and the last norm: forward and backward over one document, in chunks of 32
tokens, at several lengths. All that such a layer holds per token is as wide as the layer, so 32 times the slope is
Llama-8B's. Host memory is taken before and is not counted. A test holds every slope to its target.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.replay import peak_bytes
from pipeline.attention.function import NAME, AttentionContext, register
from pipeline.attention.kernels.cpu import CpuKernel
from pipeline.attention.segments import segments_of
from pipeline.memory.apply import attach_features
from pipeline.model.anatomy import backbone, decoder_layers
from pipeline.model.build import build_model
from pipeline.parallel.mesh import Mesh
from pipeline.parallel.shard import Layout
from pipeline.plan.documents import documents_of
from pipeline.plan.hardware import GIB
from pipeline.plan.job import JobPlan, plan_job
from pipeline.plan.limits import load_of
from pipeline.plan.time import step_seconds
from pipeline.recipe.load import load

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "chunks.json"
DOCS = ROOT / "docs" / "memory.md"
BEGIN, END = "<!-- chunks: begin -->\n", "<!-- chunks: end -->\n"

WIDTH = 32
"""Llama-8B's over the layer's that is measured."""
CHUNK_TOKENS = 32
LENGTHS = (128, 192, 256)
CHECKPOINT = "memory.activation_checkpoint"
CHUNKS = "memory.sequence_chunks"

MODEL = (
    "model.config={vocab_size: 64, hidden_size: 128, intermediate_size: 448, num_hidden_layers: 1}",
    "model.config={num_attention_heads: 4, num_key_value_heads: 1}",
    "model.dtype=bfloat16",
    "memory.tiled_mlp={tile_tokens: 64}",
    "memory.tiled_norm={tile_tokens: 64}",
    "hardware.gpus_per_node=1",
    "parallel.sp=1",
    "train.self_check=null",
    "evaluation=null",
)


@dataclass(frozen=True)
class Mode:
    """Where a layer in chunks keeps what grows with the length, and the most that it may take."""

    name: str
    hidden_states: str
    keys_values: str
    formula: str
    """Bytes per token of a rank's part, with hidden size h, KV heads J of dimension E, b bytes of the dtype."""
    target_kib: float

    @property
    def overrides(self) -> tuple[str, ...]:
        places = f"hidden_states: {self.hidden_states}, keys_values: {self.keys_values}"
        offload = "null" if self.hidden_states == "gpu" else "cpu"
        return f"{CHECKPOINT}.offload={offload}", f"{CHUNKS}={{{places}, keep_keys_values: false}}"


MODES = (
    Mode("all on the GPU", "gpu", "gpu", "2·h·b + 2·J·E·(b + 4)", 28),
    Mode("hidden states in host memory", "cpu", "gpu", "2·J·E·(b + 4)", 12),
    Mode("keys and values, too", "cpu", "cpu", "0", 1),
)


@dataclass(frozen=True)
class Slope:
    mode: str
    lengths: tuple[int, ...]
    peaks_bytes: tuple[int, ...]

    @property
    def kib(self) -> float:
        """Of Llama-8B, per token: least squares over the lengths."""
        count = len(self.lengths)
        x, y = sum(self.lengths) / count, sum(self.peaks_bytes) / count
        pairs = list(zip(self.lengths, self.peaks_bytes, strict=True))
        slope = sum((a - x) * (b - y) for a, b in pairs) / sum((a - x) ** 2 for a in self.lengths)
        return WIDTH * slope / 1024


def slope_of(mode: Mode) -> Slope:
    return Slope(mode.name, LENGTHS, tuple(peak_of(mode, tokens) for tokens in LENGTHS))


def peak_of(mode: Mode, tokens: int) -> int:
    """Bytes of one layer and the last norm, forward and backward, beside weights and gradients."""
    overrides = (*MODEL, *mode.overrides, f"{CHUNKS}.chunk_tokens={CHUNK_TOKENS}", f"data.seq_len={tokens}")
    plan = plan_job(load("tiny", overrides=overrides))
    return peak_bytes(_step(plan, on_host=mode.hidden_states == "cpu"))


def _step(plan: JobPlan, *, on_host: bool) -> Callable[[], None]:
    """Hidden states that lie in host memory are there before, like the rotary embedding of every mode."""
    register()
    model = build_model(plan.recipe.model, attention=NAME, seed=0)
    attach_features(model, plan)
    tokens, (layer,) = plan.seq_len, decoder_layers(model)
    norm, rotary = backbone(model).norm, backbone(model).rotary_emb
    shape = (1, tokens, plan.model.hidden_size)
    there = torch.zeros(shape, dtype=torch.bfloat16)
    segments = segments_of(torch.tensor([0, tokens], dtype=torch.int32), device=torch.device("cpu"))
    mesh = Mesh(rank=0, world_size=1, sp=1, sp_group=None)
    context = AttentionContext(segments, mesh, CpuKernel(), Layout(tokens, 1, plan.chunk_tokens))
    cosines_and_sines = rotary(there, torch.arange(tokens)[None])

    def step() -> None:
        for begin in model._forward_pre_hooks.values():
            begin(model, ())
        hidden = (there if on_host else torch.zeros_like(there)).detach().requires_grad_()
        out = norm(layer(hidden, position_embeddings=cosines_and_sines, attention_context=context))
        norm.states.entered(out)  # as the loss does, which keeps its gradient alone
        loss = out.sum()
        del out
        loss.backward()

    return step


def as_table(slopes: list[Slope]) -> str:
    lines = ["| | bytes per token | Llama-8B, KiB | target | measured, KiB |", "|---|---|---|---|---|"]
    for mode, slope in zip(MODES, slopes, strict=True):
        exact = _llama_kib(mode)
        lines.append(f"| {mode.name} | {mode.formula} | {exact:.0f} | ≤ {mode.target_kib:.0f} | {slope.kib:.2f} |")
    return "\n".join(lines) + "\n"


def _llama_kib(mode: Mode) -> float:
    """The formula, with h = 4096, J·E = 1024 and b = 2."""
    hidden = 2 * 4096 * 2 if mode.hidden_states == "gpu" else 0
    return (hidden + (2 * 1024 * (2 + 4) if mode.keys_values == "gpu" else 0)) / 1024


GPUS = (1, 4, 8)


def longest(gpus: int, *changes: str) -> JobPlan:
    """The longest sequence of Llama-8B by the plan."""
    mesh = (f"hardware.gpus_per_node={gpus}", f"parallel.sp={gpus}", "model.attention=flash_attention_2")
    parameters = "cpu" if gpus == 1 else "null"  # as ALST's own recipe on one
    return plan_job(load("llama8b", overrides=[*mesh, f"zero.offload_parameters={parameters}", *changes]))


def as_lengths() -> str:
    """By the plan: without chunks, with ALST's features, and each mode of chunks, in groups of layers."""
    alst = f"{CHECKPOINT}={{offload: cpu, keep_attention: false, layers_per_group: 1, resident_groups: 0}}"
    rows: list[tuple[str, tuple[str, ...]]] = [("ALST's features", (alst,))]
    for mode in MODES:
        places = f"hidden_states: {mode.hidden_states}, keys_values: {mode.keys_values}"
        asked = (
            f"{CHUNKS}={{{places}, keep_keys_values: false}}",
            f"{CHECKPOINT}={{offload: cpu, keep_attention: false}}",
        )
        rows.append((f"chunks, {mode.name}", asked))
    lines = [f"| longest, tokens | {' | '.join(f'{gpus} H100' for gpus in GPUS)} |", "|---|" + "---|" * len(GPUS)]
    for name, changes in rows:
        plans = [longest(gpus, *changes) for gpus in GPUS]
        lines.append(f"| {name} | {' | '.join(_told(plan) for plan in plans)} |")
    return "\n".join(lines) + "\n"


def _told(plan: JobPlan) -> str:
    load, seconds = load_of(plan), step_seconds(plan, documents_of(plan))
    assert seconds is not None
    return (
        f"{plan.seq_len:,} ({load.gpu.total / GIB:.0f} GiB, {load.binding} binds, {seconds.total / 3600:,.1f} h a step)"
    )


def with_table(text: str, slopes: list[Slope]) -> str:
    """The page with its tables replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{as_table(slopes)}\n{as_lengths()}\n{END}{after}"


def slopes_of(raw: dict) -> list[Slope]:
    return [Slope(row["mode"], tuple(row["lengths"]), tuple(row["peaks_bytes"])) for row in raw["slopes"]]


def main() -> None:
    slopes = [slope_of(mode) for mode in MODES]
    conditions = {"model": MODEL, "chunk_tokens": CHUNK_TOKENS, "torch": torch.__version__, "device": "cpu"}
    RESULTS.write_text(
        json.dumps({"conditions": conditions, "slopes": [asdict(one) for one in slopes]}, indent=1) + "\n"
    )
    DOCS.write_text(with_table(DOCS.read_text(encoding="utf-8"), slopes), encoding="utf-8")
    print(as_table(slopes))


if __name__ == "__main__":
    main()
