"""The picture of a run is a readable PNG, whatever the run."""

import json
import math
import struct

import pytest

from pipeline.metrics.plots import plot_training


def write_rows(path, count, **changes):
    rows = [
        {
            "step": step,
            "loss": 4 + 6 * math.exp(-step / 20) + 0.1 * math.sin(step * 1.7),
            "tokens_per_second": 9800 + 300 * math.sin(step) - (4000 if step == 1 else 0),
            "peak_device_bytes": None,
            "peak_host_rss_bytes": int(2**30 * min(1.3, 0.9 + 0.1 * step)),
        }
        | changes
        for step in range(1, count + 1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def png_size(path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


@pytest.mark.parametrize(
    ("count", "changes"),
    [
        (30, {}),
        (1, {}),
        (200, {"peak_device_bytes": 70 << 30}),
        (3, {"loss": None}),
        (0, {}),
        (20, {"eval_loss": 5.0, "loss_spike": True}),
    ],
)
def test_plot_is_a_png_for_any_number_of_steps(tmp_path, count, changes, recwarn):
    run_dir = tmp_path / "tiny-run"
    run_dir.mkdir()
    write_rows(run_dir / "metrics.jsonl", count, **changes)
    plot_training(run_dir / "metrics.jsonl", run_dir / "training.png")
    assert png_size(run_dir / "training.png") == (1080, 960)
    assert sorted(path.name for path in run_dir.iterdir()) == ["metrics.jsonl", "training.png"]
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"loss": 3.0}, {"loss": 5.0}),
        ({}, {"eval_loss": 5.0}),
        ({"eval_loss": 5.0}, {"eval_loss": 6.0}),
        ({}, {"loss_spike": True}),
    ],
)
def test_plot_shows_the_numbers(tmp_path, one, other):
    pictures = []
    for changes in (one, other):
        write_rows(tmp_path / "metrics.jsonl", 4, **changes)
        plot_training(tmp_path / "metrics.jsonl", tmp_path / "training.png", title="same")
        pictures.append((tmp_path / "training.png").read_bytes())
    assert pictures[0] != pictures[1]
