"""What is published of the planner's accuracy is what it predicts now."""

import json

import pytest

from benchmarks import calibration


@pytest.fixture(scope="module")
def rows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", "/nowhere")
        patch.delenv("HF_HUB_CACHE", raising=False)
        return calibration.rows()


def test_the_committed_calibration_is_current(rows):
    assert json.loads(calibration.RESULTS.read_text()) == calibration.as_json(rows)
    page = calibration.DOCS.read_text()
    assert calibration.with_tables(page, rows) == page, "run python benchmarks/calibration.py"


def test_steps_that_alst_measured_are_predicted_within_a_tenth(rows):
    errors = [row.error for row in rows if row.what == "seconds"]
    assert len(errors) == 8
    assert all(abs(error) < 0.10 for error in errors)


def test_peaks_that_alst_measured_are_predicted_within_an_eighth(rows):
    errors = [row.error for row in rows if row.what == "GiB"]
    assert len(errors) == 5
    assert all(abs(error) < 0.125 for error in errors)
