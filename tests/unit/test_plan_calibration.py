"""What is published of the planner's accuracy is what it predicts now."""

import json
from dataclasses import asdict

import pytest

from benchmarks import calibration
from pipeline.plan import fitted


@pytest.fixture(scope="module")
def rows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", "/nowhere")
        patch.delenv("HF_HUB_CACHE", raising=False)
        return calibration.rows()


def errors(rows, what):
    return sorted(
        abs(row.error) for row in rows if row.what == what and (what != "tokens" or row.stopped_by == "memory")
    )


def median(values):
    return values[len(values) // 2]


def test_the_committed_calibration_is_current(rows):
    assert json.loads(calibration.RESULTS.read_text()) == calibration.as_json(rows)
    page = calibration.DOCS.read_text()
    assert calibration.with_tables(page, rows) == page, "run python benchmarks/calibration.py"


def test_the_readme_compares_as_is_predicted_now(monkeypatch):
    monkeypatch.setenv("HF_HOME", "/nowhere")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    page = calibration.README.read_text()
    assert calibration.with_comparison(page) == page, "run python benchmarks/calibration.py"


def test_the_constants_are_the_fit_and_no_more_than_six():
    assert calibration.fit(calibration.REPORTED) == fitted.constants
    assert len(asdict(fitted.constants)) <= 6


@pytest.mark.parametrize("run", calibration.REPORTED, ids=lambda run: f"{run.recipe_name}-{run.length}")
def test_what_alst_ran_is_planned_as_fitting_and_half_as_much_again_as_not(run):
    assert calibration.theirs_fits(run.plan(run.length), run)
    if run.stopped_by == "memory" and not run.tokens:
        assert not calibration.theirs_fits(run.plan(3 * run.length // 2), run)


def test_steps_and_peaks_left_out_of_the_fit_are_predicted_within_15_percent(rows):
    assert len(errors(rows, "seconds")) == 8 and errors(rows, "seconds")[-1] < 0.15
    assert len(errors(rows, "GiB")) == 9 and errors(rows, "GiB")[-1] < 0.15


def test_lengths_left_out_of_the_fit_are_predicted_within_15_percent_in_the_median_and_30_at_worst(rows):
    found = errors(rows, "tokens")
    assert len(found) == 22
    assert median(found) < 0.15 and found[-1] < 0.30


def test_a_recipe_for_every_reported_run_and_no_other():
    recipes = {path.stem for path in calibration.RECIPES.glob("*.yaml")}
    assert recipes == {run.recipe_name for run in calibration.REPORTED}
    assert len(recipes) == 24
    assert {path.stem for path in calibration.with_planned_lines()} == recipes | OWN | FPDT


FPDT = {"h100-sp4-llama-8b-2m", "h100-sp32-llama-70b-4m"}
OWN = {"llama8b", "llama70b", "llama70b-disk", "qwen3-32b", "ultrachat", "ultralong"}


@pytest.mark.parametrize("recipe", calibration.with_planned_lines(), ids=lambda path: path.stem)
def test_the_head_of_a_recipe_says_what_it_is_planned_at(recipe, monkeypatch):
    monkeypatch.setenv("HF_HOME", "/nowhere")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    assert calibration.with_planned_line(recipe) == recipe.read_text(), "run python benchmarks/calibration.py"
    assert calibration.load(recipe).name == recipe.stem
