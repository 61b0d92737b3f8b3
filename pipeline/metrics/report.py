"""A run as one page, `alst report`: all it shows comes out of the run folder, all it needs is in the page."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import replaced
from pipeline.metrics.charts import Mark, Series, legend, line_chart, stacked_bars
from pipeline.metrics.console import GIB, duration, size
from pipeline.metrics.rows import Row, read_events, read_metrics, read_steps
from pipeline.plan.job import JobPlan, read_plan
from pipeline.plan.run_dir import RunDir

STYLE, SCRIPT = (Path(__file__).with_name(name) for name in ("report.css", "report.js"))

PARTS = (
    ("forward", "c1", "forward_seconds"),
    ("backward", "c6", "backward_seconds"),
    ("optimizer", "c4", "optimizer_seconds"),
    ("exchange", "c2", "communication_seconds"),
    ("offload stall", "c5", "offload_stall_seconds"),
    ("data", "c3", "data_seconds"),
)
STATUS = {"FINISHED": "good", "FAILED": "bad"}
SHOWN_CHECKPOINTS = 8
Compared = Sequence[tuple[str, str, str]]
"""(what, seen, planned)"""


@dataclass(frozen=True)
class Run:
    """What a report is made of."""

    run_dir: RunDir
    plan: JobPlan
    steps: list[Row]
    """One row per step; of a step done again, the last."""
    told: list[Row]
    """Every row, as it was written."""
    events: list[Row]
    compared: Compared

    @property
    def starts(self) -> list[Row]:
        return [event for event in self.events if event["event"] == "start"]

    @property
    def status(self) -> str:
        """Of its last start; GOING ON if that has not ended, or was ended without a word."""
        last = next((event for event in reversed(self.events) if event["event"] in ("start", "end")), None)
        return "GOING ON" if last is None or last["event"] == "start" else str(last["status"])

    def column(self, name: str, scale: float = 1.0) -> list[float | None]:
        return [None if row.get(name) is None else row[name] / scale for row in self.steps]

    @property
    def xs(self) -> list[float]:
        return [row["step"] for row in self.steps]

    @property
    def restarts(self) -> list[Mark]:
        return [Mark(start["after_step"], "restart") for start in self.starts[1:]]


def write_report(run_dir: RunDir, out: Path, *, compared: Compared) -> None:
    """The page of a run that has done a step. Raises UserError if it cannot be written, DataError without a step."""
    steps = read_steps(run_dir.metrics)
    if not steps:
        raise UserError(f"{run_dir.metrics}: holds no step yet; a report begins with the first")
    events = read_events(run_dir.events)
    run = Run(run_dir, read_plan(run_dir.plan), steps, list(read_metrics(run_dir.metrics)), events, compared)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replaced(out) as temporary:
            temporary.write_text(page_of(run), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {out}: cannot be written ({error.strerror}); name another file") from None


def page_of(run: Run) -> str:
    """The whole page; nothing in it is fetched from anywhere."""
    name = escape(run.run_dir.path.name)
    sections = "".join(section(run) for section in SECTIONS)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{STYLE.read_text()}</style></head><body><main>"
        f'{_header(run)}{_tiles(run)}<div class="sections">{sections}</div>{_footer(run)}</main>'
        f"<script>{SCRIPT.read_text()}</script></body></html>\n"
    )


def _header(run: Run) -> str:
    plan, hardware = run.plan, run.plan.recipe.hardware
    status = f'<span class="status {STATUS.get(run.status, "")}">{escape(run.status.lower())}</span>'
    model = plan.recipe.model.name_or_path or plan.model.model_type
    facts = (
        f"{model}, {_count(plan.model.total_parameters)} parameters",
        f"samples of {plan.seq_len:,} tokens",
        f"{hardware.nodes} x {hardware.gpus_per_node} {hardware.gpu.value}",
        f"dp {plan.dp} x sp {plan.sp}",
        f"ZeRO {plan.recipe.zero.stage}",
    )
    told = " · ".join(map(escape, facts))
    return f"<header><h1>{escape(run.run_dir.path.name)} {status}</h1><p>{told}</p></header>"


def _tiles(run: Run) -> str:
    last, steps = run.steps[-1], run.plan.recipe.train.steps
    calm = run.steps[1:] or run.steps
    held_out = [row["eval_loss"] for row in run.steps if row.get("eval_loss") is not None]
    device = [row["peak_device_bytes"] for row in run.steps if row.get("peak_device_bytes") is not None]
    host = max(row["peak_host_rss_bytes"] for row in run.steps)
    mfu = [row["mfu"] for row in calm if row.get("mfu") is not None]
    tiles = [
        (f"{last['step']:,} / {steps:,}", "steps"),
        (_loss(last["loss"]), "loss, last step"),
        *[(_loss(held_out[-1]), "held-out loss") for _ in held_out[:1]],
        (f"{statistics.median(row['tokens_per_second'] for row in calm):,.0f}", "tokens / s, median"),
        *[(f"{statistics.median(mfu):.1%}", "MFU, median") for _ in mfu[:1]],
        (size(max(device)) if device else size(host), "peak, GPU" if device else "peak, largest process"),
        (_count(last.get("consumed_tokens")), "tokens trained on"),
        (duration(sum(row["step_seconds"] for row in run.told)), "in steps"),
    ]
    shown = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in tiles
    )
    return f'<div class="tiles">{shown}</div>'


def _loss_section(run: Run) -> str:
    losses = [
        Series("training", "c1", run.column("loss")),
        Series("held out", "c2", run.column("eval_loss"), joined=True),
    ]
    spikes = [None if not row.get("loss_spike") else row["loss"] for row in run.steps]
    losses.append(Series("spike", "c5", spikes))
    chart = line_chart(run.xs, losses, label="loss over the steps", show=_loss, x_label="step", marks=run.restarts)
    return _section("Loss", "nats per token; the mean over all labels of a step", chart, losses)


def _throughput_section(run: Run) -> str:
    speed = [Series("tokens / s", "c3", run.column("tokens_per_second"))]
    chart = line_chart(
        run.xs, speed, label="tokens per second", show=_count, x_label="step", from_zero=True, marks=run.restarts
    )
    return _section("Throughput", "tokens per second of the whole job, padding left out", chart, speed)


def _utilization_section(run: Run) -> str:
    shares = [Series("MFU", "c1", run.column("mfu")), Series("HFU", "c2", run.column("hfu"))]
    chart = line_chart(run.xs, shares, label="utilization", show=lambda x: f"{x:.1%}", x_label="step", from_zero=True)
    return _section("Utilization", "MFU counts the model's FLOPs, HFU also those that run again", chart, shares)


def _time_section(run: Run) -> str:
    parts = [Series(name, color, run.column(key)) for name, color, key in PARTS]
    accounted = [sum(row.get(key) or 0.0 for _, _, key in PARTS) for row in run.steps]
    rest = [max(0.0, row["step_seconds"] - known) for row, known in zip(run.steps, accounted, strict=True)]
    parts = [part for part in parts if any(part.values)] + [Series("rest, waiting for others", "c7", rest)]
    chart = stacked_bars(run.xs, parts, label="seconds of a step", show=lambda x: f"{x:,.3g} s", x_label="step")
    return _section(
        "Where a step's time goes", "mean over ranks; the whole bar is the slowest rank's step", chart, parts
    )


def _device_section(run: Run) -> str:
    lines = [
        Series("allocated", "c1", run.column("peak_device_bytes", GIB)),
        Series("reserved", "c6", run.column("peak_device_reserved_bytes", GIB)),
    ]
    return _memory(run, "GPU memory", "of the fullest rank, at its peak since the process began", lines)


def _host_section(run: Run) -> str:
    lines = [
        Series("largest process, at its peak", "c4", run.column("peak_host_rss_bytes", GIB)),
        Series("all processes", "c2", run.column("host_rss_bytes", GIB)),
        Series("waiting for backward, of a rank", "c3", run.column("offloaded_bytes", GIB)),
        Series("waiting on disk", "c5", run.column("disk_spill_bytes", GIB)),
    ]
    return _memory(run, "Host memory", "resident, and what was offloaded", lines)


def _memory(run: Run, title: str, note: str, lines: Sequence[Series]) -> str:
    lines = [line for line in lines if any(line.values)]
    chart = line_chart(run.xs, lines, label=title, show=_gib, x_label="step", from_zero=True, marks=run.restarts)
    return _section(title, note, chart, lines)


def _position_section(run: Run) -> str:
    return _place_section(
        run, "loss_by_position", "Loss by position", "by how many tokens of its document a token has before it"
    )


def _length_section(run: Run) -> str:
    return _place_section(
        run, "loss_by_document_length", "Loss by document length", "by the length of the document that a token is in"
    )


def _place_section(run: Run, kind: str, title: str, note: str) -> str:
    """A line for each third of the steps, over buckets that double: does it learn to use what is far away?"""
    names = sorted({name for row in run.steps for name in row if name.startswith(f"{kind}/")})
    names = [name for name in names if any(row.get(name) is not None for row in run.steps)]
    if not names:
        return ""
    firsts = [int(name.partition("/")[2]) for name in names]
    shown = [f"{_short(first)}+" if first else f"0 to {_short(256)}" for first in firsts]
    lines = []
    for (begin, end), color in zip(_thirds(len(run.steps)), ("c7", "c6", "c1"), strict=False):
        rows = run.steps[begin:end]
        told = f"steps {rows[0]['step']:,} to {rows[-1]['step']:,}"
        lines.append(Series(told, color, [_mean_of(rows, name) for name in names]))
    chart = line_chart(list(range(len(names))), lines, label=title, show=_loss, x_label="tokens", x_names=shown)
    return _section(title, note, chart, lines)


def _compared_section(run: Run) -> str:
    rows = [row for row in run.compared if row[1] != "-"]  # no GPU, no memory of it
    table = _table(("", "measured", "planned"), rows)
    return _section("The plan against what was measured", "steps at their median, memory at its peak", table)


def _starts_section(run: Run) -> str:
    """What became of each start, and how many steps it did that were done before."""
    rows = []
    starts = run.starts
    for number, start in enumerate(starts):
        until = starts[number + 1]["time"] if number + 1 < len(starts) else math.inf
        own = [row["step"] for row in run.told if start["time"] <= row["time"] < until]
        ended = [
            event["status"].lower()
            for event in run.events
            if event["event"] == "end" and start["time"] <= event["time"] < until
        ]
        before = [row["step"] for row in run.told if row["time"] < start["time"]]
        again = sum(step <= max(before, default=0) for step in own)
        steps = f"{own[0]:,} to {own[-1]:,}" if own else "none"
        how = ended[0] if ended else "killed" if number + 1 < len(starts) else "going on, or killed"
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start["time"]))
        rows.append(
            (
                f"{number + 1}",
                began,
                str(start["job"]),
                start["host"],
                f"{start['world_size']:,}",
                steps,
                f"{again:,}",
                how,
            )
        )
    table = _table(("start", "at", "job", "host of rank 0", "ranks", "steps", "done again", "ended"), rows)
    return _section(
        "Starts and restarts", "each time the run was started, from its newest checkpoint", table, wide=True
    )


def _checkpoints_section(run: Run) -> str:
    saved = [event for event in run.events if event["event"] == "checkpoint"]
    rows = [
        (
            event["name"],
            size(event["bytes"]),
            f"{event['seconds']:.1f} s",
            f"{event['stall_seconds']:.2f} s",
            event["sha256"][:12],
        )
        for event in saved[-SHOWN_CHECKPOINTS:]
    ]
    if not rows:
        return ""
    note = "on disk after so long, while training waited so long" + (
        f"; the last {SHOWN_CHECKPOINTS} of {len(saved)}" if len(saved) > SHOWN_CHECKPOINTS else ""
    )
    return _section("Checkpoints", note, _table(("", "size", "written in", "training waited", "SHA-256"), rows))


def _recipe_section(run: Run) -> str:
    recipe = run.run_dir.recipe.read_text(encoding="utf-8") if run.run_dir.recipe.is_file() else ""
    inner = f"<details><summary>The recipe, resolved</summary><pre>{escape(recipe)}</pre></details>"
    return f'<section class="wide">{inner}</section>' if recipe else ""


SECTIONS: tuple[Callable[[Run], str], ...] = (
    _loss_section,
    _throughput_section,
    _time_section,
    _host_section,
    _device_section,
    _utilization_section,
    _position_section,
    _length_section,
    _compared_section,
    _checkpoints_section,
    _starts_section,
    _recipe_section,
)


def _footer(run: Run) -> str:
    last = run.starts[-1] if run.starts else {}
    image = "no container" if last.get("image_digest") is None else f"image {last['image_digest'][:12]}"
    told = (f"commit {last.get('commit', 'unknown')}", image, f"run folder {run.run_dir.path}")
    return f"<footer>{escape(' · '.join(told))}</footer>"


def _section(title: str, note: str, body: str, series: Sequence[Series] = (), *, wide: bool = False) -> str:
    if not body:
        return ""
    drawn = f"<figure>{body}</figure>{legend(series)}" if series else body
    kind = ' class="wide"' if wide else ""
    return f"<section{kind}><h2>{escape(title)}</h2><p>{escape(note)}</p>{drawn}</section>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _thirds(count: int) -> list[tuple[int, int]]:
    """Ranges of the first, second and last third; fewer where there are fewer steps."""
    parts = min(3, count)
    borders = [round(count * number / parts) for number in range(parts + 1)]
    return list(pairwise(borders))


def _mean_of(rows: Sequence[Row], name: str) -> float | None:
    known = [row[name] for row in rows if row.get(name) is not None]
    return statistics.fmean(known) if known else None


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def _gib(value: float) -> str:
    return f"{value:,.0f} GiB" if value >= 100 else f"{value:.3g} GiB"


def _count(value: Any) -> str:
    """`4,525`, `1.25M`: as many digits as one reads at a glance."""
    if value is None:
        return "-"
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(value) >= unit:
            return f"{value / unit:,.3g}{name}"
    return f"{value:,.0f}"


def _short(tokens: int) -> str:
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if tokens >= unit:
            return f"{tokens / unit:g}{name}"
    return str(tokens)
