"""The bench runs what was asked, in turns, until it is done or its time is up, and goes on where it stopped."""

import json
from dataclasses import replace

import pytest

from pipeline.bench import command
from pipeline.bench.cases import Case, plan_of
from pipeline.bench.corpus import corpus_in
from pipeline.bench.results import Asked, Longest, Results, longest_of, opened, read_results
from pipeline.bench.sweep import INTERRUPTED, Clock, Sweep, conditions_of
from pipeline.bench.trial import Bench, Outcome, Row
from pipeline.errors import UserError
from tests.unit.bench_support import CPU, asked, basis, measured, row

CONDITIONS = {"commit": "abc", "machine": CPU.to_json()}


class Trials:
    """Stands in for runs: each takes a minute, and whatever is longer than the limit has no room."""

    def __init__(self, limit: int = 2**40, raises: Exception | None = None) -> None:
        self.cases: list[Case] = []
        self.seconds = 0.0
        self.timeouts: list[float] = []
        self._limit = limit

    def __call__(self, case, plan, bench, *, timeout_seconds: float) -> Row:
        self.cases.append(case)
        self.timeouts.append(timeout_seconds)
        if timeout_seconds < 60:
            self.seconds += timeout_seconds
            return row(case, outcome=Outcome.TIMEOUT)
        self.seconds += 60
        if case.seq_len > self._limit:
            return row(case, outcome=Outcome.OUT_OF_MEMORY)
        return row(case, measured())


def sweep(what: Asked, trials: Trials, folder, *, minutes: float | None = None) -> Results:
    clock = Clock(minutes, now=lambda: trials.seconds)
    results = opened(folder, what, CONDITIONS, resume=True)
    return Sweep(results, basis(), Bench(folder), clock, 600, lambda _: None, trials).run()


def test_engines_and_rungs_take_turns_within_a_repeat_and_each_has_what_it_can(tmp_path):
    trials = Trials()
    what = asked(engines=("alst", "reference", "plain"), rungs=("baseline", "offload", "keep-attention"), repeats=2)
    results = sweep(what, trials, tmp_path)
    turn = ["alst-baseline", "reference-baseline", "plain-baseline", "alst-offload", "reference-offload"]
    turn.append("alst-keep-attention")
    assert [f"{case.engine}-{case.rung}" for case in trials.cases] == turn * 2
    assert [case.repeat for case in trials.cases] == [1] * 6 + [2] * 6
    assert results.ended == "finished"
    assert read_results(tmp_path / "results.json") == results


def test_results_are_whole_after_every_run(tmp_path):
    seen = []

    class Looking(Trials):
        def __call__(self, *arguments, **options):
            path = tmp_path / "results.json"
            seen.append(len(json.loads(path.read_text())["rows"]) if path.exists() else 0)
            return super().__call__(*arguments, **options)

    sweep(asked(lengths=(1024, 2048)), Looking(), tmp_path)
    assert seen == [0, 1, 2, 3]


def test_what_has_a_row_is_not_run_again(tmp_path):
    what = asked(lengths=(1024, 2048))
    first, second = Trials(), Trials()
    stopped = sweep(what, first, tmp_path, minutes=2.5)
    assert "--resume" in stopped.ended
    assert len(stopped.rows) == 2, "the third had less than its due, and is no row"
    done = sweep(what, second, tmp_path)
    assert [case.key for case in second.cases] == [row.key for row in done.rows[2:]]
    assert len(done.rows) == 4
    assert done.ended == "finished"


def test_no_run_is_begun_when_the_time_is_up_and_none_gets_more_than_is_left(tmp_path):
    trials = Trials()
    sweep(asked(lengths=(1024, 2048, 4096)), trials, tmp_path, minutes=3)
    assert trials.timeouts == [180, 120, 60]


def test_an_interruption_leaves_the_rows_and_says_so(tmp_path):
    class Interrupted(Trials):
        def __call__(self, case, *arguments, **options):
            if self.cases:
                raise KeyboardInterrupt
            return super().__call__(case, *arguments, **options)

    results = sweep(asked(), Interrupted(), tmp_path)
    assert (len(results.rows), results.ended) == (1, INTERRUPTED)


def test_a_plan_that_cannot_be_is_a_row(tmp_path):
    (row, *_) = sweep(asked(lengths=(1023,)), Trials(), tmp_path).rows
    assert row.outcome is Outcome.REFUSED
    assert "must be a multiple of parallel.sp = 2" in row.detail
    assert read_results(tmp_path / "results.json").rows[0] == row


def test_a_run_whose_port_was_taken_is_run_once_more(tmp_path):
    class Unlucky(Trials):
        def __call__(self, case, *arguments, **options):
            first = case not in self.cases
            found = super().__call__(case, *arguments, **options)
            taken = "DistNetworkError: The server socket has failed to listen on any local network address. port: 39723"
            return replace(found, outcome=Outcome.FAILED, detail=taken) if first else found

    trials = Unlucky()
    results = sweep(asked(rungs=("offload",)), trials, tmp_path)
    assert [row.outcome for row in results.rows] == [Outcome.OK]
    assert len(trials.cases) == 2


def test_the_longest_is_found_with_documents_of_16k(tmp_path):
    trials = Trials(limit=40_000)
    results = sweep(asked(lengths=(), find_max=True, rungs=("offload",)), trials, tmp_path)
    (found,) = longest_of(results.rows)
    assert 38_000 < found.seq_len <= 40_000
    assert found.stopped_by.startswith("out of memory at 4")
    assert {row.documents for row in results.rows if row.case.seq_len >= 16384} == {"of 16,384 tokens"}


def test_a_search_that_memory_does_not_end_says_what_did(tmp_path):
    results = sweep(asked(lengths=(), find_max=True, rungs=("offload",), most_tokens=8192), Trials(), tmp_path)
    assert [(found.seq_len, found.stopped_by) for found in longest_of(results.rows)] == [(8192, "--most")]


def test_a_search_goes_on_from_what_it_had_tried(tmp_path):
    what = asked(lengths=(), find_max=True, rungs=("offload",))
    first, second = Trials(limit=40_000), Trials(limit=40_000)
    sweep(what, first, tmp_path, minutes=3)
    sweep(what, second, tmp_path)
    assert not {case.key for case in first.cases} & {case.key for case in second.cases}


def test_nothing_is_overwritten_unless_told_to_go_on(tmp_path):
    sweep(asked(), Trials(), tmp_path)
    with pytest.raises(UserError, match="there are results already; go on with --resume"):
        opened(tmp_path, asked(), CONDITIONS, resume=False)


def test_what_is_resumed_must_ask_the_same_of_the_same_code(tmp_path):
    sweep(asked(), Trials(), tmp_path)
    with pytest.raises(UserError, match=r"must ask the same as before, and steps was 2, is 5"):
        opened(tmp_path, replace(asked(), steps=5), CONDITIONS, resume=True)
    with pytest.raises(UserError, match="rows are of commit abc, and this is def"):
        opened(tmp_path, asked(), CONDITIONS | {"commit": "def"}, resume=True)


def test_where_nothing_ran_the_longest_is_none():
    case = Case("alst", "offload", 1024, 2, "length")
    (found,) = longest_of([row(case, outcome=Outcome.OUT_OF_MEMORY)])
    assert found == Longest("alst", "offload", 2, None, "out of memory at 1,024")
    assert plan_of(case, basis()).seq_len == 1024


def test_an_interrupted_bench_has_its_page_and_ends_as_interrupted(tmp_path, monkeypatch):
    def interrupted(what, *_, **__):
        return Results(what, conditions_of(basis()), (), INTERRUPTED)

    monkeypatch.setattr(command, "start", interrupted)
    options = command.Options("tiny", (), "1K", False, "all", "alst", None, "2", 1, 1, "8M", "16K")
    with pytest.raises(KeyboardInterrupt):
        command.run_bench(
            options, data=None, output=tmp_path, minutes=None, timeout_seconds=1, resume=False, tell=lambda _: None
        )
    assert INTERRUPTED in (tmp_path / "results.md").read_text()


def test_a_model_that_a_cpu_would_train_for_hours_is_refused_before_anything_is_packed(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "machine_here", lambda: CPU)
    options = command.Options("llama8b", (), "1K", False, "all", "alst", None, "2", 1, 1, "8M", "16K")
    with pytest.raises(UserError, match="without a GPU at most 200M are measured"):
        command.run_bench(
            options, data=None, output=tmp_path, minutes=None, timeout_seconds=1, resume=False, tell=lambda _: None
        )
    assert list(tmp_path.iterdir()) == []


def test_data_that_is_no_packed_data_set_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"must be a packed data set, and has no manifest.json; make one with `alst pack`"
    ):
        corpus_in(tmp_path, root=tmp_path)
    assert corpus_in(None, root=tmp_path) == tmp_path / "corpus"
