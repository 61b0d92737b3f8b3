"""What each memory feature saves: bytes per token of a small Llama on the CPU, predicted beside measured.

    python -m benchmarks.memory [--show]

writes benchmarks/results/memory.json and the table in docs/memory.md; with --show, as `make demo-million` calls it, it
prints what it measures and writes nothing. The rows are those of ALST's ablation (its Table
1), then what this project adds; each names the row it changes and what it says it lowers. A test holds every row to
nine tenths of what the plan says.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.replay import group_of_two, measured
from pipeline.memory.offload import HostStore
from pipeline.plan.host_memory import host_bytes, scratch_bytes
from pipeline.plan.job import JobPlan, plan_job
from pipeline.plan.memory import activation_bytes
from pipeline.recipe.load import load

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "memory.json"
DOCS = ROOT / "docs" / "memory.md"
BEGIN, END = "<!-- memory: begin -->\n", "<!-- memory: end -->\n"

TOKENS = 4096
"""Of the sequence: activations are then far larger than the weights, whose gradients ZeRO would take away."""
CHECKPOINT = "memory.activation_checkpoint"
Room = Literal["device", "host", "disk"]

MODEL = (
    # The proportions of Llama-3.1-8B's layers at a thirty-second of its width; a vocabulary whose head is as small
    # beside the activations of 4,096 tokens as Llama's is at a quarter of a million.
    "model.config={vocab_size: 2048, hidden_size: 128, intermediate_size: 448, num_hidden_layers: 6}",
    "model.config={num_attention_heads: 4, num_key_value_heads: 1}",
    "model.dtype=bfloat16",
    "train.self_check=null",
    "evaluation=null",
)
OFF = ("memory.tiled_loss=null", "memory.tiled_mlp=null", "memory.tiled_norm=null", f"{CHECKPOINT}={{offload: null}}")


@dataclass(frozen=True)
class Case:
    """A row: what it changes of the row it builds on."""

    name: str
    overrides: tuple[str, ...]
    upon: str | None
    lowers: Room | None
    """What it says it lowers; None of what costs bytes and saves time."""
    sp: int = 2


CASES = (
    Case("baseline: checkpoints on the device", OFF, None, None, sp=1),
    Case("+ tiled loss", ("memory.tiled_loss={tile_tokens: 64, kernel: own}",), "baseline", "device", sp=1),
    Case("+ Ulysses on two ranks", (), "+ tiled loss", "device"),
    Case("+ tiled MLP", ("memory.tiled_mlp={tile_tokens: 128}",), "+ Ulysses", "device"),
    Case("+ tiled norms (ours)", ("memory.tiled_norm={tile_tokens: 128}",), "+ tiled MLP", "device"),
    Case(
        "+ offload of checkpoints", (f"{CHECKPOINT}={{offload: cpu, resident_groups: 0}}",), "+ tiled norms", "device"
    ),
    Case("… kept attention (ours)", (f"{CHECKPOINT}.keep_attention=true",), "+ offload", None),
    Case("… groups of two layers (ours)", (f"{CHECKPOINT}.layers_per_group=2",), "+ offload", "host"),
    Case("… two of six groups stay (ours)", (f"{CHECKPOINT}.resident_groups=2",), "+ offload", "host"),
    Case("… in fp8 (ours)", (f"{CHECKPOINT}.offload_dtype=fp8",), "+ offload", "host"),
    Case(
        "… three of six groups on disk (ours)",
        (f"{CHECKPOINT}={{offload: disk, disk_groups: 3}}",),
        "+ offload",
        "host",
    ),
)


@dataclass(frozen=True)
class Row:
    """Bytes per token of the sequence, of one rank."""

    name: str
    upon: str | None
    lowers: Room | None
    predicted: dict[Room, float]
    measured: dict[Room, float]


def overrides_of(case: Case) -> tuple[str, ...]:
    """Of the case, after those of all that it builds on."""
    return (*(overrides_of(_named(case.upon)) if case.upon else MODEL), *case.overrides)


def _named(start: str) -> Case:
    return next(case for case in CASES if case.name.startswith(start))


def plan_of(case: Case) -> JobPlan:
    mesh = (f"hardware.gpus_per_node={case.sp}", f"parallel.sp={case.sp}", f"data.seq_len={TOKENS}")
    scratch = f"hardware.scratch={tempfile.gettempdir()}"
    return plan_job(load("tiny", overrides=[*overrides_of(case), *mesh, scratch]))


def predicted(plan: JobPlan) -> dict[Room, float]:
    host = host_bytes(plan).by_name
    ranks = plan.world_size
    waiting = sum(host[name] for name in ("activation_checkpoint", "kept_attention")) / ranks
    found: dict[Room, float] = {
        "device": activation_bytes(plan),
        "host": waiting,
        "disk": scratch_bytes(plan).total / ranks,
    }
    return {room: value / TOKENS for room, value in found.items()}


def row_of(case: Case) -> Row:
    plan = plan_of(case)
    with group_of_two() if case.sp == 2 else nullcontext():
        found = measured(plan)
    store = found.attached.store
    on_host = isinstance(store, HostStore)
    seen: dict[Room, float] = {
        "device": found.peak_bytes,
        "host": store.peak_bytes if on_host else 0,
        "disk": store.disk.peak_bytes if on_host and store.disk is not None else 0,
    }
    seen = {room: value / TOKENS for room, value in seen.items()}
    return Row(case.name, case.upon and _named(case.upon).name, case.lowers, predicted(plan), seen)


def lowered(row: Row, rows: list[Row]) -> tuple[float, float] | None:
    """(predicted, measured) bytes per token that the row takes away from the one it builds on."""
    if row.lowers is None:
        return None
    (upon,) = [other for other in rows if other.name == row.upon]
    room = row.lowers
    return upon.predicted[room] - row.predicted[room], upon.measured[room] - row.measured[room]


HEAD = ("bytes per token of a rank", "device", "measured", "host", "measured", "disk", "lowers, by plan", "measured")


def _cells(row: Row, rows: list[Row]) -> list[str]:
    """Of HEAD."""
    saved = lowered(row, rows)
    told = ("", "") if saved is None else (f"{row.lowers} {saved[0]:,.0f}", f"{saved[1]:,.0f} ({_share(saved)})")
    return [
        row.name,
        *(_number(one) for one in (row.predicted["device"], row.measured["device"])),
        *(_number(one) for one in (row.predicted["host"], row.measured["host"], row.measured["disk"])),
        *told,
    ]


def as_table(rows: list[Row]) -> str:
    lines = [_line(HEAD), "|" + "---|" * len(HEAD), *(_line(_cells(row, rows)) for row in rows)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def show(rows: list[Row]) -> None:
    """On a terminal."""
    table = Table(*HEAD, box=SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*(cell.replace(" (ours)", "") for cell in _cells(row, rows)))
    print(f"what each memory feature saves, of {TOKENS:,} tokens through a small Llama, by the plan and measured now;")
    print("each row adds to the one before it, those with … to the offload of checkpoints")
    Console(width=120, highlight=False).print(table)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value else ""


def _share(saved: tuple[float, float]) -> str:
    return f"{saved[1] / saved[0]:.0%}"


def with_table(text: str, rows: list[Row]) -> str:
    """The page with its table replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{as_table(rows)}\n{END}{after}"


def rows_of(raw: dict) -> list[Row]:
    return [Row(**row) for row in raw["rows"]]


def _told(rows: list[Row]) -> Iterator[str]:
    yield f"{TOKENS:,} tokens, torch {torch.__version__}, CPU; the model: {MODEL[0].partition('=')[2]}"
    yield as_table(rows)


def main(*, writes: bool) -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler tells of every start and stop
    torch.set_num_threads(1)  # small tensors: more threads wait for each other
    rows = [row_of(case) for case in CASES]
    if not writes:
        show(rows)
        return
    conditions = {"tokens": TOKENS, "model": MODEL, "torch": torch.__version__, "device": "cpu"}
    RESULTS.write_text(json.dumps({"conditions": conditions, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    DOCS.write_text(with_table(DOCS.read_text(encoding="utf-8"), rows), encoding="utf-8")
    print("\n".join(_told(rows)))


if __name__ == "__main__":
    main(writes=sys.argv[1:] != ["--show"])
