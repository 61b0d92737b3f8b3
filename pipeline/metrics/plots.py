"""The training curves as one picture: loss, throughput and memory over the steps; an artifact of every run."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.metrics.console import GIB
from pipeline.metrics.rows import read_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOSS_COLOR, EVAL_COLOR, SPIKE_COLOR = "#1f4e9c", "#d1802b", "#b3541e"
SPEED_COLOR, DEVICE_COLOR, HOST_COLOR = "#1b7f4d", "#b3541e", "#7a5195"
MARKER_LIMIT = 60  # steps; beyond, the markers run into one another and the line alone reads better


def plot_training(metrics_path: Path, out: Path, *, title: str | None = None) -> None:
    """Draw metrics.jsonl to the PNG `out`; the title is the run folder's name unless given."""
    from matplotlib.figure import Figure  # the object, not pyplot: no window, no global state

    rows = read_steps(metrics_path)
    figure = Figure(figsize=(9, 8), layout="constrained")
    loss, speed, memory = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 2))
    figure.suptitle(title or metrics_path.resolve().parent.name, x=0.01, ha="left", fontsize=14, fontweight="bold")
    for axes in (loss, speed, memory):
        _dress(axes)
    _draw_loss(loss, rows)
    _draw(speed, rows, "tokens_per_second", SPEED_COLOR)
    speed.set_ylabel("tokens / s")
    speed.yaxis.set_major_formatter("{x:,.0f}")
    _draw_memory(memory, rows)
    for axes in (speed, memory):
        axes.set_ylim(bottom=0, top=axes.get_ylim()[1] * 1.08)
    memory.set_xlabel("optimizer step")
    memory.xaxis.get_major_locator().set_params(integer=True)
    if len(rows) == 1:
        memory.set_xlim(rows[0]["step"] - 1, rows[0]["step"] + 1)  # or the axis would count in hundredths of a step
    figure.align_ylabels()
    partial = out.with_name(out.name + ".partial")
    figure.savefig(partial, format="png", dpi=120)
    partial.replace(out)


def _draw_loss(axes: "Axes", rows: list[dict[str, Any]]) -> None:
    _draw(axes, rows, "loss", LOSS_COLOR, label="training")
    evaluated = [row for row in rows if row.get("eval_loss") is not None]
    spikes = [row for row in rows if row.get("loss_spike") and row["loss"] is not None]
    if evaluated:
        _draw(axes, evaluated, "eval_loss", EVAL_COLOR, label="held out")
    if spikes:
        steps, losses = [row["step"] for row in spikes], [row["loss"] for row in spikes]
        axes.scatter(steps, losses, marker="v", color=SPIKE_COLOR, zorder=3, label="spike")
    if evaluated or spikes:
        axes.legend(frameon=False, fontsize=9)
    axes.set_ylabel("loss (nats per token)")


def _draw_memory(axes: "Axes", rows: list[dict[str, Any]]) -> None:
    if any(row.get("peak_device_bytes") is not None for row in rows):
        _draw(axes, rows, "peak_device_bytes", DEVICE_COLOR, scale=GIB, label="device, largest rank")
    _draw(axes, rows, "peak_host_rss_bytes", HOST_COLOR, scale=GIB, label="host RSS, largest process")
    axes.set_ylabel("peak memory (GiB)")
    # Above the panel: a flat line may lie anywhere inside.
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, ncols=2, frameon=False, fontsize=9)


def _draw(
    axes: "Axes", rows: list[dict[str, Any]], name: str, color: str, *, scale: float = 1, label: str | None = None
) -> None:
    """One line; a step without the value (null: not finite, or unknown) is a gap."""
    values = [math.nan if row.get(name) is None else row[name] / scale for row in rows]
    marker = "o" if len(rows) <= MARKER_LIMIT else None
    axes.plot([row["step"] for row in rows], values, color=color, linewidth=1.8, marker=marker, ms=4, label=label)


def _dress(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(color="#888888", labelsize=9)
