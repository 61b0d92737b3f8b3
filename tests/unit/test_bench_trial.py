"""Whatever becomes of a run is a row: real processes that end well, badly, or not at all."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

from pipeline.bench import trial
from pipeline.bench.cases import Case, plan_of
from pipeline.bench.trial import Bench, Outcome, Row, attention_of, measured_in, outcome_of, run_trial
from tests.unit.bench_support import basis

CASE = Case("alst", "baseline", 1024, 2, "speed")
TRAINS = """
import json, os, sys
from pathlib import Path
folder = Path(os.environ["ALST_RUNS"]) / "alst-baseline-1024-2l-r1-20260101-000000"
folder.mkdir(parents=True)
parts = ("data", "forward", "backward", "optimizer", "communication", "offload_stall")
with (folder / "metrics.jsonl").open("w") as file:
    for step, seconds in ((1, 9.0), (2, 2.0), (3, 4.0)):
        row = {"step": step, "loss": 9.0 - step, "step_seconds": seconds, "tokens_per_second_per_gpu": 1024 / seconds}
        row |= {f"{part}_seconds": seconds / 8 for part in parts} | {"peak_host_rss_bytes": 100 * step}
        row |= {"host_rss_bytes": 50, "pinned_bytes": 0, "offloaded_bytes": 0, "mfu": None, "hfu": None}
        file.write(json.dumps(row) + "\\n")
print("attention: passed over flash_attention_3: not installed")
print("attention: cpu (torch 2.13.0)")
"""


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Runs a program in place of the training job; the row."""

    def run(program: str, *, seconds: float = 60) -> Row:
        monkeypatch.setattr(trial, "command_of", lambda case, recipe: [sys.executable, "-c", program])
        return run_trial(CASE, plan_of(CASE, basis()), Bench(tmp_path), timeout_seconds=seconds)

    return run


def test_a_run_that_ends_well_is_measured_without_its_first_step(ran):
    row = ran(TRAINS)
    assert row.outcome is Outcome.OK, row.detail
    assert row.detail == ""
    found = row.measured
    assert (found.steps, found.step_seconds, found.least_step_seconds, found.most_step_seconds) == (2, 3.0, 2.0, 4.0)
    assert found.forward_seconds == 0.375
    assert found.peak_host_rss_bytes == 300, "a peak is that of all steps"
    assert found.peak_device_bytes is None
    assert (found.first_loss, found.last_loss) == (8.0, 6.0)
    assert row.attention == "cpu (torch 2.13.0)"
    assert row.plan["seq_len"] == 1024


@pytest.mark.parametrize(
    ("program", "outcome", "detail"),
    [
        ("raise MemoryError('no room')", Outcome.OUT_OF_MEMORY, "MemoryError: no room"),
        (
            "raise SystemExit('torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB')",
            Outcome.OUT_OF_MEMORY,
            "Tried to allocate 9 GiB",
        ),
        (
            "raise SystemExit('CUDA error: an illegal memory access was encountered')",
            Outcome.ILLEGAL_ACCESS,
            "illegal memory access",
        ),
        ("raise SystemExit('alst: train: rank 1 was ended by SIGKILL; the others')", Outcome.OUT_OF_MEMORY, "SIGKILL"),
        ("import sys; print('alst: sp = 3: must divide 4'); sys.exit(2)", Outcome.REFUSED, "sp = 3: must divide 4"),
        ("raise ValueError('what is this')", Outcome.FAILED, "ValueError: what is this"),
        ("pass", Outcome.FAILED, "it said nothing"),
    ],
)
def test_a_run_that_ends_badly_is_a_row_that_says_how(ran, program, outcome, detail):
    row = ran(program)
    assert row.outcome is outcome
    assert detail in row.detail
    assert row.measured is None


def test_a_run_without_an_end_is_ended_with_all_that_it_started(ran, tmp_path):
    mark = tmp_path / "child"
    program = (
        "import os, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(mark)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    began = time.monotonic()
    row = ran(program, seconds=8)  # long enough for a busy machine to start the child
    assert row.outcome is Outcome.TIMEOUT
    assert row.detail == "no end after 8 s"
    assert time.monotonic() - began < 60
    assert not _lives(int(mark.read_text()))


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_row_comes_back_from_json_as_it_was(ran):
    row = ran(TRAINS)
    assert Row.of_json(json.loads(json.dumps(row.to_json()))) == row


def test_fewer_steps_than_asked_are_no_success():
    assert outcome_of(0, "", steps=2, asked=3) is Outcome.FAILED
    assert outcome_of(None, "out of memory", steps=0, asked=3) is Outcome.TIMEOUT


def test_a_run_that_never_stepped_has_nothing_measured():
    assert measured_in([]) is None
    assert attention_of("attention: passed over x: y") is None
