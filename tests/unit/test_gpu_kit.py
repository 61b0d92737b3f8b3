"""The kit for a GPU machine without a network: its plan can be run there, and keeps to its time."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import gpu_kit
from benchmarks.gpu_kit import EXPERIMENTS, Experiment, Journey
from pipeline import cli
from pipeline.bench import command
from pipeline.bench.cases import Basis, Case, plan_of
from pipeline.bench.command import Options
from pipeline.bench.options import engines_of, layers_of, lengths_of, rung_names, tokens_of
from pipeline.plan.limits import load_of
from tests.unit.bench_support import H200

BENCHES = [experiment for experiment in EXPERIMENTS if experiment.module == "bench"]


@pytest.fixture
def options_of(monkeypatch, tmp_path):
    """What `alst bench` makes of arguments."""

    def parsed(arguments: tuple[str, ...]) -> Options:
        seen = []
        page = tmp_path / "page"
        page.write_text("")
        monkeypatch.setattr(command, "run_bench", lambda options, **_: seen.append(options) or page)
        done = CliRunner().invoke(cli.app, ["bench", *arguments])
        assert done.exit_code == 0, done.output
        return seen[0]

    return parsed


@pytest.mark.parametrize("experiment", BENCHES, ids=lambda experiment: experiment.name)
def test_every_experiment_can_be_planned_on_the_gpu_it_is_for(options_of, experiment):
    options = options_of(experiment.arguments)
    basis = Basis(options.recipe, H200, Path("/corpus"), options.model, options.steps, options.overrides)
    lengths = lengths_of(options.lengths) or (tokens_of(options.grain, option="--grain"),)
    for layers in layers_of(options.layers, speed=bool(options.lengths)):
        for rung in rung_names(options.rungs):
            for engine in engines_of(options.engines):
                for seq_len in lengths:
                    plan = plan_of(Case(engine, rung, seq_len, layers, "speed"), basis)
                    assert (plan.model.hidden_size, plan.world_size) == (4096, 1)
                    assert plan.recipe.zero.offload_optimizer is None, "its kernel would have to be compiled"
                    assert load_of(plan).fits or rung in ("baseline", "tiled-loss", "tiled-mlp"), (rung, seq_len)


@pytest.mark.parametrize("experiment", BENCHES, ids=lambda experiment: experiment.name)
def test_every_rehearsal_asks_for_the_same_features_of_a_tiny_model(options_of, experiment):
    real, tiny = options_of(experiment.arguments), options_of(experiment.rehearsal)
    assert (tiny.recipe, tiny.find_max) == ("tiny", real.find_max)
    assert (rung_names(tiny.rungs), engines_of(tiny.engines)) == (rung_names(real.rungs), engines_of(real.engines))


def test_the_wheels_are_those_of_the_lock():
    assert all("==" in name for name in gpu_kit._pinned([*gpu_kit.WHEELS, *gpu_kit.BUILT]))


def test_a_kit_that_would_not_travel_is_refused(tmp_path):
    with (tmp_path / "wheel").open("wb") as file:
        file.truncate(gpu_kit.MOST_BYTES - gpu_kit.TREE_BYTES + 1)
    with pytest.raises(SystemExit, match="at most 48 MiB travel with the tree; take a wheel out"):
        gpu_kit.check_size(tmp_path)


@dataclass(frozen=True)
class Faked(Journey):
    """Experiments that write one result and last as long as their program says."""

    def command(self, experiment: Experiment, minutes: float) -> list[str]:
        folder = gpu_kit.work_of(experiment)
        write = f"import pathlib, time; p = pathlib.Path({str(folder)!r}); p.mkdir(parents=True)\n"
        write += (
            f"(p / 'results.json').write_text('{{\"minutes\": {minutes}}}'); (p / 'results.md').write_text('page')\n"
        )
        return [sys.executable, "-c", write + experiment.arguments[0]]


@pytest.fixture
def journey(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_kit, "WORK", tmp_path / "work")
    monkeypatch.setattr(gpu_kit, "TELL_SECONDS", 0.2)
    monkeypatch.setattr(gpu_kit, "GRACE_SECONDS", 2.0)
    (tmp_path / "kit" / "corpus").mkdir(parents=True)
    (tmp_path / "kit" / "corpus" / "manifest.json").write_text("{}")

    def run(minutes: float, *programs: str) -> Path:
        experiments = [Experiment(f"e{n}", "whether", 1.0, (program,), ()) for n, program in enumerate(programs)]
        Faked(tmp_path / "kit", tmp_path / "out", minutes, rehearse=True).run(experiments)
        return tmp_path / "out"

    return run


def test_an_experiment_that_fails_does_not_end_the_plan(journey):
    out = journey(5, "raise SystemExit(3)", "pass")
    assert list(json.loads((out / "results.json").read_text())) == ["e0", "e1"]
    log = (out / "log.txt").read_text()
    assert "e0: ended with 3" in log
    assert "e1: ended with 0" in log
    assert len(list(out.iterdir())) <= 8, "no more comes back from a machine that is lent"


def test_results_are_there_while_an_experiment_goes_on(journey, tmp_path):
    seen = f"time.sleep(1.5); assert 'e0' in pathlib.Path({str(tmp_path / 'out' / 'results.json')!r}).read_text()"
    assert "e0: ended with 0" in (journey(5, seen) / "log.txt").read_text()


def test_nothing_is_begun_when_the_time_is_up(journey):
    out = journey((gpu_kit.LAST_SECONDS + 20) / 60, "pass", "pass")
    log = (out / "log.txt").read_text()
    assert "e0: not begun, the time is up" in log
    assert "e1: not begun, the time is up" in log


def test_an_experiment_gets_no_more_than_is_left(journey):
    out = journey((gpu_kit.LAST_SECONDS + 45) / 60, "pass")
    assert json.loads((out / "results.json").read_text())["e0"]["minutes"] == pytest.approx(0.75, abs=0.01)


def test_without_a_kit_it_says_how_to_make_one(tmp_path):
    with pytest.raises(SystemExit, match="no kit; make it with"):
        Journey(tmp_path, tmp_path / "out", 1, rehearse=True).run()


def test_the_command_runs_the_experiments_that_were_asked(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(Journey, "run", lambda self, experiments: ran.extend(one.name for one in experiments))
    monkeypatch.setattr(sys, "argv", ["gpu_kit", "run", "--minutes=1", f"--output={tmp_path}", "--only=longest"])
    gpu_kit.main()
    assert ran == ["longest"]


def test_an_unknown_experiment_is_refused():
    with pytest.raises(SystemExit, match="--only quick: no such experiment; use some of tests, same-kernel-128k"):
        gpu_kit.chosen("tests,quick")
    assert [experiment.name for experiment in gpu_kit.chosen("longest,tests")] == ["tests", "longest"]
