"""What is printed: the step line, the bar, tables that survive a pipe, the summary."""

import io
import json

import pytest

from pipeline.errors import RunError
from pipeline.metrics.console import ProgressLine, binding, duration, gib, print_table, step_line
from pipeline.metrics.meter import StepRecord
from pipeline.metrics.summary import print_summary, summarize


def make_record(**changes) -> StepRecord:
    values = dict.fromkeys(StepRecord.__dataclass_fields__, 0) | {
        "step": 12,
        "loss": 6.2131,
        "grad_norm": 1.034,
        "learning_rate": 2.9e-3,
        "tokens_per_second": 9812.4,
        "mfu": None,
        "peak_device_bytes": None,
        "peak_host_rss_bytes": round(1.31 * 2**30),
        "eta_seconds": 72.2,
        "loss_spike": False,
        "eval_loss": None,
        "eval_seconds": None,
        "forward_seconds": 2.0,
        "backward_seconds": 6.5,
        "optimizer_seconds": 0.5,
        "communication_seconds": 1.0,
    }
    return StepRecord(**(values | changes))


def test_step_line_reads_as_documented():
    assert " ".join(step_line(make_record(), 30).split()) == (
        "step 12/30 loss 6.213 |g| 1.03 lr 2.9e-03 9,812 tok/s peak 1.31 GiB MFU - compute 90% ETA 0:01:12"
    )


def test_columns_keep_their_place():
    first = step_line(make_record(step=1, loss=10.4, grad_norm=1234.5, tokens_per_second=123.0, mfu=0.0512), 30)
    other = step_line(make_record(loss=0.5, grad_norm=1.2e-5, peak_device_bytes=123 << 30), 30)
    assert first.index("ETA") == other.index("ETA")
    assert first.index("tok/s") == other.index("tok/s")
    assert "5.1%" in first
    assert "1.2e-05" in other
    assert "123.00 GiB" in other  # the device's peak, not the host's 1.31


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "compute 90%"),
        ({"offload_stall_seconds": 10.0}, "offload 50%"),
        ({"communication_seconds": 27.0}, "comm 75%"),
        ({"data_seconds": 90.0}, "data 90%"),
        (dict.fromkeys(("forward_seconds", "backward_seconds", "optimizer_seconds", "communication_seconds"), 0), "-"),
    ],
)
def test_what_binds_is_what_most_time_goes_into(changes, told):
    assert binding(make_record(**changes)) == told
    assert step_line(make_record(**changes), 30).index("ETA") == step_line(make_record(), 30).index("ETA")


def test_line_survives_what_is_unknown_or_not_finite():
    line = step_line(make_record(loss=float("nan"), grad_norm=None, eta_seconds=None), 30)
    assert "nan" in line
    assert line.endswith("ETA -")


def test_what_only_some_steps_have_stands_behind_the_columns():
    plain = step_line(make_record(), 30)
    told = step_line(make_record(eval_loss=7.5124, eval_seconds=3.21, loss_spike=True), 30)
    assert told == plain + "  held-out loss 7.512 in 3.2 s  LOSS SPIKE"


def test_a_pipe_gets_plain_whole_lines(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    stream = io.StringIO()
    progress = ProgressLine(30, stream=stream)
    progress.step(make_record())
    progress.note("[saved] step 12")
    assert stream.getvalue() == step_line(make_record(), 30) + "\n[saved] step 12\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3661, "1:01:01"), (90_061, "1d 01:01:01"), (None, "-")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_gib_has_two_digits_and_thousands():
    assert gib(1234 * 2**30 + 2**29) == "1,234.50 GiB"


def test_a_table_in_a_pipe_folds_no_path(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    stream = io.StringIO()
    path = "/scratch/" + "very-long-folder/" * 20 + "[1]"
    print_table("where", [("run", path)], stream=stream)
    assert path in stream.getvalue()
    assert all(line == line.rstrip() for line in stream.getvalue().splitlines())


def write_rows(run_dir, losses):
    rows = [
        {"step": i, "loss": loss, "tokens_per_second": 1000 * i, "peak_host_rss_bytes": (5 - i) << 30}
        for i, loss in enumerate(losses, start=1)
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_summary_takes_median_speed_without_the_first_step_and_the_largest_peak(tmp_path):
    write_rows(tmp_path, [10.0, 9.0, 8.0, 7.5])
    summary = summarize(
        tmp_path, samples=1234, fill_fraction=0.9876, paths={"run": str(tmp_path)}, next_steps=["make mlflow"]
    )
    assert (summary.first_loss, summary.last_loss, summary.steps) == (10.0, 7.5, 4)
    assert summary.tokens_per_second == 3000
    assert summary.peak_rss_bytes == 4 << 30
    stream = io.StringIO()
    print_summary(summary, stream=stream)
    for text in ("1,234 (98.8% filled)", "10.000 -> 7.500", "3,000", "4.00 GiB", str(tmp_path), "make mlflow"):
        assert text in stream.getvalue()


def test_summary_tells_the_first_and_the_last_held_out_loss(tmp_path):
    found = [None, 8.25, None, 7.125]
    rows = [{"step": i, "loss": 9.0, "eval_loss": loss} for i, loss in enumerate(found, start=1)]
    costs = {"tokens_per_second": 1000, "peak_host_rss_bytes": 1}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row | costs) + "\n" for row in rows))
    stream = io.StringIO()
    print_summary(summarize(tmp_path, samples=1, fill_fraction=1.0), stream=stream)
    (line,) = [line for line in stream.getvalue().splitlines() if "held-out loss" in line]
    assert line.endswith("8.250 -> 7.125")


def test_summary_of_one_step_and_of_none(tmp_path):
    write_rows(tmp_path, [10.0])
    assert summarize(tmp_path, samples=1, fill_fraction=1.0).tokens_per_second == 1000
    write_rows(tmp_path, [])
    with pytest.raises(RunError, match="holds no step"):
        summarize(tmp_path, samples=1, fill_fraction=1.0)
