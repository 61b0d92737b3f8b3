"""The report: one page that needs nothing else, with the right numbers in it, in a real browser where there is one."""

import json
import math
import os
import re
import shutil
import struct
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.metrics.charts import MOST_POINTS, Series, line_chart, nice_ticks, stacked_bars
from pipeline.metrics.report import write_report
from pipeline.metrics.rows import JsonlWriter
from pipeline.plan.job import plan_job
from pipeline.plan.run_dir import RunDir
from pipeline.recipe.load import load

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--disable-sync")
START = {
    "event": "start",
    "job": "4711",
    "host": "n<1>",
    "commit": "c0ffee",
    "image_digest": "d1" * 32,
    "world_size": 8,
}
COMPARED = (("GPU memory, fullest rank", "71.20 GiB", "73.02 GiB"), ("MFU", "41.0%", "-"), ("of no GPU", "-", "1 GiB"))
RESTARTED_AT = 7
GIB = 1 << 30


def row(step: int, **changes) -> dict:
    seconds = 40 + 3 * math.sin(step)
    values = {
        "step": step,
        "loss": 2.5 + 6 * math.exp(-step / 12),
        "eval_loss": 2.6 + 6 * math.exp(-step / 12) if step % 5 == 0 else None,
        "loss_spike": step == 12,
        "tokens_per_second": 4_194_304 / seconds,
        "step_seconds": seconds,
        "data_seconds": 0.2,
        "forward_seconds": 0.25 * seconds,
        "backward_seconds": 0.5 * seconds,
        "optimizer_seconds": 2.0,
        "communication_seconds": 0.1 * seconds,
        "offload_stall_seconds": 1.5,
        "mfu": 0.41,
        "hfu": 0.55,
        "peak_device_bytes": 71 * GIB,
        "peak_device_reserved_bytes": 76 * GIB,
        "peak_host_rss_bytes": 150 * GIB,
        "host_rss_bytes": 900 * GIB,
        "offloaded_bytes": 60 * GIB,
        "disk_spill_bytes": 0,
        "consumed_tokens": 4_194_304 * step,
        "time": 1_700_000_000.0 + 45 * step,
    }
    for bucket in range(15):
        first = 0 if bucket == 0 else 128 << bucket
        values[f"loss_by_position/{first:08d}"] = values["loss"] + 0.8 * math.exp(-bucket / 3)
        values[f"loss_by_document_length/{first:08d}"] = values["loss"] - 0.02 * bucket
    return values | changes


@pytest.fixture
def run_dir(tmp_path) -> RunDir:
    run_dir = RunDir(tmp_path / "run & co")
    run_dir.path.mkdir()
    run_dir.write_plan(plan_job(load("llama8b", overrides=["train.steps=30"])))
    return run_dir


def write(run_dir: RunDir, steps: int, **changes) -> None:
    """A run that was killed after step RESTARTED_AT and went on from step 5."""
    rows, events = JsonlWriter(run_dir.metrics), JsonlWriter(run_dir.events)
    first, again = min(RESTARTED_AT, steps), range(6, steps + 1)
    events.write(START | {"time": row(0)["time"], "after_step": 0})
    for step in range(1, first + 1):
        rows.write(row(step, loss=9.0, **changes))
    shift = 45 * (RESTARTED_AT - 5)
    events.write(START | {"time": row(RESTARTED_AT)["time"] + 1, "after_step": 5, "job": "4712"})
    for step in again:
        rows.write(row(step, time=row(step)["time"] + shift + 2, **changes))
    saved = {"path": "/x", "bytes": 112 * GIB, "seconds": 31.4, "stall_seconds": 2.25, "sha256": "ab" * 32}
    for step in range(5, steps + 1, 5):
        events.write(
            {"event": "checkpoint", "time": row(step)["time"], "name": f"step-{step:06d}", "step": step, **saved}
        )
    events.write({"event": "end", "time": row(steps)["time"] + shift + 100, "status": "FINISHED"})


class Page(HTMLParser):
    """What a page shows and what it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.charts: dict[str, dict] = {}
        self.cells: list[list[str]] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        named = dict(attrs)
        self.fetched += [f"{tag} {value}" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        self.fetched += [tag] if tag in ("link", "iframe", "img", "object", "embed") else []
        if "data-chart" in named:
            self.charts[named["aria-label"]] = json.loads(named["data-chart"])
        if tag == "tr":
            self.cells.append([])
        self._open.append(tag)

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("td", "th"):
            self.cells[-1].append(data)


def page_of(run_dir: RunDir) -> str:
    write_report(run_dir, run_dir.report, compared=COMPARED)
    return run_dir.report.read_text()


def test_the_page_shows_the_numbers_of_the_run(run_dir):
    write(run_dir, 30)
    text = page_of(run_dir)
    page = Page(text)
    loss = {line["name"]: line for line in page.charts["loss over the steps"]["series"]}
    assert loss["training"]["text"] == [f"{9.0 if step < 6 else row(step)['loss']:.3f}" for step in range(1, 31)]
    assert [text for text in loss["held out"]["text"] if text] == [
        f"{row(s)['eval_loss']:.3f}" for s in range(5, 31, 5)
    ]
    assert [i + 1 for i, text in enumerate(loss["spike"]["text"]) if text] == [12]
    assert len(page.charts["Loss by position"]["at"]) == 15
    assert page.charts["Loss by position"]["at"][-1] == "2M+"
    assert {line["name"] for line in page.charts["seconds of a step"]["series"]} >= {
        "forward",
        "exchange",
        "offload stall",
    }
    assert page.charts["utilization"]["series"][0]["text"][0] == "41.0%"
    assert "30 / 30" in text and "finished" in text and "41.0%" in text
    assert ["GPU memory, fullest rank", "71.20 GiB", "73.02 GiB"] in page.cells
    assert not any(cells[:1] == ["of no GPU"] for cells in page.cells)


def test_restarts_are_told_with_what_was_done_again(run_dir):
    write(run_dir, 30)
    text = page_of(run_dir)
    starts = [cells for cells in Page(text).cells if "n<1>" in cells]
    assert [cells[2:] for cells in starts] == [
        ["4711", "n<1>", "8", "1 to 7", "0", "killed"],
        ["4712", "n<1>", "8", "6 to 30", "2", "finished"],
    ]
    assert len(re.findall(r'class="mark"', text)) == 4, "in loss, throughput and both memories"


def test_the_page_is_whole_in_itself(run_dir):
    write(run_dir, 30)
    text = page_of(run_dir)
    assert Page(text).fetched == []
    assert re.findall(r"url\(|@import|\bimport\b|fetch\(|XMLHttpRequest|https?://(?!www\.w3\.org/2000/svg)", text) == []
    assert "run &amp; co" in text and "n&lt;1&gt;" in text, "names are text, never markup"
    assert "prefers-color-scheme: dark" in text


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_a_run_that_has_just_begun_has_a_page(run_dir, steps):
    write(run_dir, steps, mfu=None, hfu=None, peak_device_bytes=None, peak_device_reserved_bytes=None)
    page = Page(page_of(run_dir))
    assert "utilization" not in page.charts
    assert "nan" not in json.dumps(page.charts).lower()


def test_rows_of_a_run_before_there_was_all_this_make_a_page_too(run_dir):
    old = ("step", "loss", "tokens_per_second", "step_seconds", "peak_host_rss_bytes", "time")
    writer = JsonlWriter(run_dir.metrics)
    for step in range(1, 4):
        writer.write({name: row(step)[name] for name in old})
    page = Page(page_of(run_dir))
    assert "Loss by position" not in page.charts
    assert "loss over the steps" in page.charts


def test_a_report_of_nothing_and_a_file_that_cannot_be_written_are_told(run_dir):
    run_dir.metrics.touch()
    with pytest.raises(UserError, match="no step yet"):
        write_report(run_dir, run_dir.report, compared=())
    write(run_dir, 2)
    with pytest.raises(UserError, match="cannot be written"):
        write_report(run_dir, Path("/proc/report.html"), compared=())


def test_many_steps_make_no_large_page_and_keep_their_spikes(run_dir):
    values = [2.0] * 20_000
    values[12_345] = 50.0
    chart = line_chart(
        list(range(20_000)), [Series("a", "c1", values)], label="x", show=str, x_label="step", from_zero=True
    )
    (told,) = Page(chart).charts.values()
    assert "50.0" in told["series"][0]["text"]
    assert len(told["x"]) <= MOST_POINTS + 2
    bars = stacked_bars(range(1, 20_001), [Series("a", "c1", values)], label="x", show=str, x_label="step")
    assert len(bars) < 40_000


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (2.13, 2.87, [2.0, 2.2, 2.4, 2.6, 2.8, 3.0]),
        (5, 5, [5, 6, 7, 8, 9, 10]),
        (-3, 0, [-3, -2, -1, 0]),
    ],
)
def test_ticks_are_round_and_hold_all_values(low, high, ticks):
    assert nice_ticks(low, high) == pytest.approx(ticks)


# In a browser


def chromium(page: Path, *options: str, folder: Path) -> str:
    """What Chromium prints of a page."""
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={folder / 'profile'}", *options, page.as_uri()]
    environment = os.environ | {"HOME": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on this machine; apt-get install chromium")


@in_chromium
def test_a_pointer_over_a_chart_reads_out_the_nearest_step(run_dir, tmp_path):
    write(run_dir, 30)
    text = page_of(run_dir)
    pointed = tmp_path / "pointed.html"
    pointed.write_text(
        text.replace(
            "</body>",
            """<script>
            const svg = document.querySelector("svg[data-chart]"), box = svg.getBoundingClientRect();
            const x = JSON.parse(svg.dataset.chart).x[9] * box.width / svg.viewBox.baseVal.width;
            svg.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + x, clientY: box.top + 50 }));
            </script></body>""",
        )
    )
    shown = chromium(pointed, "--dump-dom", folder=tmp_path)
    (tip,) = re.findall(r'<div class="tip" style="[^"]*">(.*?)</div></figure>', shown)
    read_out = unescape(re.sub(r"<[^>]+>", "|", tip))
    for expected in ("step 10", f"training  {row(10)['loss']:.3f}", f"held out  {row(10)['eval_loss']:.3f}"):
        assert expected in read_out
    assert shown.count('class="tip"') == len(Page(text).charts), "the script came to the last chart"


@in_chromium
def test_the_page_follows_the_readers_light_or_dark(run_dir, tmp_path):
    write(run_dir, 30)
    page_of(run_dir)
    grounds = {}
    for name, setting in (("light", 1), ("dark", 0)):
        picture = tmp_path / f"{name}.png"
        scheme = f"--blink-settings=preferredColorScheme={setting}"
        chromium(run_dir.report, scheme, f"--screenshot={picture}", "--window-size=1280,2000", folder=tmp_path)
        grounds[name] = corner_of(picture)
    assert min(grounds["light"]) > 230
    assert max(grounds["dark"]) < 40


def corner_of(picture: Path) -> tuple[int, ...]:
    """The colour of the first pixel."""
    from matplotlib.image import imread

    assert struct.unpack(">II", picture.read_bytes()[16:24]) == (1280, 2000)
    return tuple(round(255 * float(part)) for part in imread(picture)[0, 0, :3])
