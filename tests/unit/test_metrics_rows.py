"""metrics.jsonl through kills, full disks and restarts."""

import json
from pathlib import Path

import pytest

from pipeline.errors import DataError
from pipeline.metrics.rows import JsonlWriter, Tail, read_events, read_metrics, read_steps


def row(step: int, **changes) -> dict:
    return {"step": step, "loss": 7.0 - step, **changes}


def test_every_step_is_on_disk_as_soon_as_it_is_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    JsonlWriter(path).write(row(1))
    assert list(read_metrics(path)) == [row(1)]  # not closed: as after a kill


def test_a_torn_last_line_is_left_out_and_the_next_start_writes_on_its_own_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write(row(1))
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    tail = Tail(path)
    assert [row["step"] for row in read_metrics(path)] == [1]
    assert [row["step"] for row in tail.new()] == [1]
    writer = JsonlWriter(path)
    writer.write(row(2))
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    assert [row["step"] for row in tail.new()] == [2]


def test_a_tail_gives_each_row_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.new() == []
    writer = JsonlWriter(path)
    for step in (1, 2):
        writer.write(row(step))
    assert [row["step"] for row in tail.new()] == [1, 2]
    assert tail.new() == []
    writer.write(row(3))
    assert [row["step"] for row in tail.new()] == [3]


def test_a_broken_line_in_the_middle_is_told_with_its_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(DataError, match="line 2"):
        list(read_metrics(path))
    with pytest.raises(DataError, match="is not there"):
        list(read_metrics(tmp_path / "none.jsonl"))
    assert read_events(tmp_path / "none.jsonl") == []


def test_a_step_done_again_after_a_restart_counts_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    for each in (row(1), row(2), row(3), row(2, loss=4.5)):
        writer.write(each)
    assert [(row["step"], row["loss"]) for row in read_steps(path)] == [(1, 6.0), (2, 4.5), (3, 4.0)]


def test_what_a_full_disk_does_not_take_is_written_later(tmp_path):
    path, warnings = tmp_path / "metrics.jsonl", []
    writer = JsonlWriter(path, warn=warnings.append)
    with Path("/dev/full").open("ab", buffering=0) as full:
        file, writer._file = writer._file, full
        for step in (1, 2):
            writer.write(row(step))
        assert len(warnings) == 1 and "No space left" in warnings[0]
    writer._file = file  # there is room again
    writer.write(row(3))
    writer.close()
    assert [row["step"] for row in read_steps(path)] == [1, 2, 3]


def test_a_loss_that_is_not_finite_stays_valid_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    JsonlWriter(path).write(row(1, loss=float("nan"), grad_norm=float("inf")))

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    written = json.loads(path.read_text(), parse_constant=refuse)
    assert (written["loss"], written["grad_norm"]) == (None, None)
