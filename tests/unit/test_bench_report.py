"""What is concluded from rows: ratios, ideals, goals, extrapolations; and that the page says under which conditions."""

from dataclasses import replace

import pytest

from pipeline.bench.cases import Case
from pipeline.bench.extrapolate import extrapolated, lines_of_peaks
from pipeline.bench.goals import best_against_best, goals, ideal_keep_attention_ratio, like_against_like
from pipeline.bench.machine import Machine
from pipeline.bench.report import page_of, write_report
from pipeline.bench.results import Results, longest_of, speed_groups
from pipeline.bench.trial import Outcome, Row
from pipeline.plan.hardware import GIB
from pipeline.plan.known_models import KNOWN_MODELS
from pipeline.plan.model_shape import shape_of
from tests.unit.bench_support import CPU, H200, asked, basis, measured, row

LLAMA_8B = shape_of(KNOWN_MODELS["meta-llama/Llama-3.1-8B"])
ON_H200 = basis(H200, recipe="llama8b")


def speed(
    rung: str, found=None, *, engine: str = "alst", seq_len: int = 131072, layers: int = 2, repeat: int = 1
) -> Row:
    return row(Case(engine, rung, seq_len, layers, "speed", repeat), found or measured(), on=ON_H200)


def longest(engine: str, seq_len: int, outcome: Outcome = Outcome.OK) -> Row:
    found = measured() if outcome is Outcome.OK else None
    return row(Case(engine, "offload", seq_len, 1, "length"), found, outcome=outcome, on=ON_H200)


def results(*rows: Row, machine: Machine = H200) -> Results:
    conditions = {
        "machine": machine.to_json(),
        "commit": "abc123",
        "python": "3.12",
        "packages": {"torch": "2.13.0"},
        "began": "2026-11-28T22:00:00+0000",
        "load_before": 0.1,
        "data": "real text",
        "weights": "random",
        "command": "alst bench llama8b --lengths 128K",
    }
    return Results(asked(recipe="llama8b"), conditions, rows, "finished")


@pytest.mark.parametrize(("tokens", "ideal"), [(2**17, 1.19), (2**18, 1.23), (2**19, 1.25), (2**20, 1.27)])
def test_the_ideal_of_kept_attention_is_that_of_the_shapes(tokens, ideal):
    ratio = ideal_keep_attention_ratio(LLAMA_8B, tokens=tokens)
    assert int(100 * ratio) / 100 == ideal, "as docs/benchmarks.md has them, cut to two digits"


def test_the_head_of_a_model_of_few_layers_takes_from_the_ideal():
    few = replace(LLAMA_8B, num_layers=2)
    with_head = ideal_keep_attention_ratio(few, tokens=2**17, with_head=True)
    assert 1.1 < with_head < ideal_keep_attention_ratio(few, tokens=2**17)


def test_like_is_compared_with_like_and_best_with_best_by_medians_of_repeats():
    rows = [speed("offload", measured(speed=of), repeat=n) for n, of in enumerate((100.0, 120.0, 900.0), start=1)]
    rows += [speed("keep-attention", measured(speed=150.0)), speed("offload", measured(speed=60.0), engine="reference")]
    groups = speed_groups(rows)
    (same,) = like_against_like(groups, "reference")
    (best,) = best_against_best(groups, "reference")
    assert (same.ours.rung, same.ratio) == ("offload", 2.0)
    assert (best.ours.rung, best.ratio) == ("keep-attention", 2.5)


def test_a_repeat_that_failed_is_no_speed():
    failed = row(Case("alst", "offload", 131072, 2, "speed", 2), outcome=Outcome.TIMEOUT, on=ON_H200)
    (group,) = speed_groups([speed("offload"), failed])
    assert (group.outcome, group.speed) == (Outcome.TIMEOUT, None)


def verdicts(*rows: Row) -> list[str]:
    return [goal.verdict for goal in goals(speed_groups(rows), longest_of(rows))]


def test_goals_without_a_measurement_are_not_measured():
    assert verdicts() == ["not measured"] * 6
    assert verdicts(speed("offload", seq_len=16384)) == ["not measured"] * 6, "shorter than any goal speaks of"


def test_goals_are_met_by_what_meets_them():
    long = measured(speed=10.0, mfu=0.46, offload_stall_seconds=0.2)
    rows = [speed("tiled-norm", measured(speed=100.0)), speed("keep-attention", measured(speed=118.0))]
    rows += [speed("offload"), speed("offload", measured(speed=90.0), engine="reference")]
    rows += [speed("keep-attention", long, seq_len=2**19), longest("alst", 2**21), longest("reference", 2**20)]
    rows += [speed("layer-groups", measured(speed=100.0), seq_len=2**18)]
    rows += [speed("sequence-chunks", measured(speed=96.0), seq_len=2**18)]
    assert verdicts(*rows) == ["met"] * 6


def test_goals_are_missed_by_the_worst_figure():
    slow = measured(speed=10.0, mfu=0.44, offload_stall_seconds=0.6)
    rows = [speed("tiled-norm", measured(speed=100.0)), speed("keep-attention", measured(speed=105.0))]
    rows += [speed("offload"), speed("offload", measured(speed=101.0), engine="reference")]
    rows += [speed("keep-attention", slow, seq_len=2**19), longest("alst", 2**20), longest("reference", 2**20)]
    rows += [speed("layer-groups", measured(speed=100.0), seq_len=2**18)]
    rows += [speed("sequence-chunks", measured(speed=94.0), seq_len=2**18)]
    assert verdicts(*rows) == ["missed"] * 6


def test_two_layer_counts_are_extrapolated_along_their_line():
    rows = [
        speed("offload", measured(speed=100.0, step_seconds=10.0)),
        speed("offload", measured(speed=62.5, step_seconds=16.0), layers=4),
    ]
    (whole,) = extrapolated(speed_groups(rows), layers=32)
    assert whole.step_seconds == 16 + 28 * 3
    assert whole.tokens_per_second_per_gpu == pytest.approx(10.0)
    assert whole.how == "line through 2 and 4 layers"


def test_one_layer_count_is_extrapolated_by_flops_and_says_so():
    (whole,) = extrapolated(
        speed_groups([speed("offload", measured(speed=100.0, step_seconds=10.0, mfu=0.4))]), layers=32
    )
    assert 10 * 8 < whole.step_seconds < 10 * 16, "less than 16 times: the head is there once"
    assert whole.mfu == pytest.approx(0.4), "by the same FLOPs"
    assert whole.how == "2 layers, by model FLOPs"


def test_one_layer_is_not_extrapolated():
    assert extrapolated(speed_groups([speed("offload", layers=1)]), layers=32) == []


def test_peaks_at_two_lengths_say_where_the_gpu_would_be_full():
    peaks = {2**16: 20 * GIB, 2**17: 30 * GIB, 2**18: 50 * GIB}
    rows = [speed("offload", measured(peak_device_reserved_bytes=peak), seq_len=at) for at, peak in peaks.items()]
    (line,) = lines_of_peaks(speed_groups(rows))
    assert line.lengths == (2**16, 2**18)
    assert line.slope == 160 * 1024
    assert line.length_at(90 * GIB) == 2**19
    assert lines_of_peaks(speed_groups(rows[:1])) == []


def test_the_page_says_conditions_and_what_failed_and_judges_only_the_machine_of_the_goals():
    failed = longest("alst", 2**22, Outcome.OUT_OF_MEMORY)
    page = "\n".join(page_of(results(speed("offload"), longest("alst", 2**20), failed)))
    for told in ("NVIDIA H200", "580.1", "abc123", "torch 2.13.0", "alst bench llama8b --lengths 128K", "2026-11-28"):
        assert told in page
    for told in ("| 131,072 | 2 | offload | 100 |", "| 1,048,576 |", "out of memory at 4,194,304", "## Goals"):
        assert told in page
    elsewhere = "\n".join(page_of(results(speed("offload"), machine=CPU)))
    assert "## Goals" not in elsewhere


def test_page_and_plots_are_written(tmp_path):
    page = write_report(results(speed("offload"), speed("offload", seq_len=2**18), longest("alst", 2**20)), tmp_path)
    assert page == tmp_path / "results.md"
    for plot in ("memory.png", "speed.png"):
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")


def test_a_bench_of_nothing_but_failures_has_a_page_and_plots(tmp_path):
    page = write_report(results(longest("alst", 2**20, Outcome.FAILED)), tmp_path)
    assert "none ran" in page.read_text()
