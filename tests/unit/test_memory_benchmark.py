"""Each memory feature lowers what it says it lowers, and what is published of it is what the planner predicts now."""

import json

import pytest

from benchmarks import memory


@pytest.fixture(scope="module")
def rows() -> list[memory.Row]:
    return [memory.row_of(case) for case in memory.CASES]


@pytest.mark.parametrize("name", [case.name for case in memory.CASES if case.lowers is not None])
def test_a_feature_lowers_at_least_nine_tenths_of_what_the_plan_says(rows, name):
    (row,) = [row for row in rows if row.name == name]
    predicted, measured = memory.lowered(row, rows)
    assert predicted > 0
    assert measured >= 0.9 * predicted, row


def test_what_a_row_does_not_lower_it_may_only_trade(rows):
    """What is kept of attention costs host memory; nothing else may cost more than the plan says and a tenth."""
    for row in rows:
        for room, planned in row.predicted.items():
            assert row.measured[room] <= 1.1 * planned, (row.name, room)


def test_the_committed_results_are_current():
    published = memory.rows_of(json.loads(memory.RESULTS.read_text()))
    assert [row.name for row in published] == [case.name for case in memory.CASES]
    for case, row in zip(memory.CASES, published, strict=True):
        assert memory.predicted(memory.plan_of(case)) == row.predicted, "run python -m benchmarks.memory"
    page = memory.DOCS.read_text()
    assert memory.with_table(page, published) == page, "run python -m benchmarks.memory"


def test_shown_it_says_what_it_measures_and_writes_nothing(rows, monkeypatch, capsys):
    written = [path.read_bytes() for path in (memory.RESULTS, memory.DOCS)]
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")  # it sets it where nobody has
    monkeypatch.setattr(memory, "row_of", lambda case: next(row for row in rows if row.name == case.name))
    memory.main(writes=False)
    printed = capsys.readouterr().out
    for row in rows:
        (line,) = [line for line in printed.splitlines() if line.strip().startswith(row.name.replace(" (ours)", ""))]
        assert f"{row.measured['device']:,.0f}" in line
    assert [path.read_bytes() for path in (memory.RESULTS, memory.DOCS)] == written
