"""Signs of life that ranks leave in the run folder, and the thread that reads them."""

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from pipeline.plan import patience
from pipeline.plan.patience import Patience
from pipeline.plan.queue import Queue
from pipeline.plan.run_dir import RunDir
from pipeline.train.heartbeat import Heartbeat
from pipeline.train.stopping import LEAVE_SECONDS, Stopping
from pipeline.train.watchdog import Sign, Watchdog, _behind, _moved_bytes, read_signs

LONG_SECONDS = 60


class Rank:
    """The only one of its job, whose stall is found after `told` seconds."""

    def __init__(self, run_dir: RunDir, *, told: float):
        self.left, self.why, self.again = threading.Event(), "", False
        self.terminated, self.seconds_left = False, 1000.0
        queue = Queue(leave=self._leave, terminated=lambda: self.terminated, seconds_left=lambda: self.seconds_left)
        self._heartbeat = Heartbeat()
        self._stopping = Stopping(queue, run_dir, saves=True, save_seconds=lambda: 0.0, rank=0)
        self._watchdog = Watchdog(self._heartbeat, Patience(told, None, looks=True), queue, run_dir, rank=0)

    def training(self) -> AbstractContextManager[None]:
        return self._watchdog.watching(self._stopping)

    def starting(self) -> AbstractContextManager[None]:
        return self._watchdog.watching()

    @property
    def beats(self) -> int:
        return self._heartbeat.beats

    def _leave(self, why: str, again: bool) -> None:
        self.why, self.again = why, again
        self.left.set()


def starts(monkeypatch, restart: int) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    monkeypatch.setenv("WORLD_SIZE", "1")


@pytest.fixture
def earlier(tmp_path, monkeypatch) -> RunDir:
    """A run folder in which rank 1 of an earlier, larger start has left a sign."""
    run_dir = RunDir(tmp_path)
    starts(monkeypatch, 0)
    with Rank(run_dir, told=1000.0).training():
        pass
    row = json.loads((run_dir.heartbeats / "rank0.json").read_text()) | {"rank": 1}
    (run_dir.heartbeats / "rank1.json").write_text(json.dumps(row))
    assert [sign.rank for sign in read_signs(run_dir.heartbeats, start=row["start"])] == [0, 1]
    starts(monkeypatch, 1)
    return run_dir


def test_a_rank_is_seen_before_the_first_look_and_those_of_earlier_starts_are_not(earlier):
    with Rank(earlier, told=1000.0).training():
        start = json.loads((earlier.heartbeats / "rank0.json").read_text())["start"]
        (sign,) = read_signs(earlier.heartbeats, start=start)
        assert (sign.rank, sign.pid) == (0, os.getpid())


def test_a_stall_is_told_of_the_ranks_there_are_and_whatever_lies_in_the_folder(earlier):
    (earlier.heartbeats / "rank2.json").write_text("{")
    rank = Rank(earlier, told=0.1)
    with rank.training():
        assert rank.left.wait(LONG_SECONDS)
    assert "rank 0 (process" in rank.why
    assert "rank 1 (" not in rank.why


@pytest.fixture
def impatient(monkeypatch) -> float:
    """Seconds after which a start that does nothing is a stall."""
    monkeypatch.setattr(patience, "LEAST_SECONDS", 3.0)
    return 3.0


def test_a_start_in_which_nothing_happens_is_a_stall(earlier, impatient):
    rank = Rank(earlier, told=0.1)
    with rank.starting():
        assert rank.left.wait(LONG_SECONDS)
    assert "stands at step 0, start" in rank.why


def test_a_start_that_reads_is_none_however_long_it_takes(earlier, impatient, tmp_path):
    weights, rank = tmp_path / "weights", Rank(earlier, told=0.1)
    weights.write_bytes(bytes(2**22))
    with rank.starting():
        ends = time.monotonic() + 3 * impatient
        while time.monotonic() < ends:
            weights.read_bytes()
            time.sleep(0.2)
        assert not rank.left.is_set()
        assert rank.beats == 1, "it got no further by that than a rank that has less to read"
        assert rank.left.wait(LONG_SECONDS), "and when it reads no more"


def test_one_watchdog_looks_at_the_start_and_then_at_the_steps(earlier):
    rank = Rank(earlier, told=0.1)
    with rank.starting():
        pass
    with rank.training():
        assert rank.left.wait(LONG_SECONDS)
    assert "stands at step 0, first step" in rank.why


def test_what_the_watchdog_itself_reads_is_no_sign_of_life(tmp_path):
    (tmp_path / "weights").write_bytes(bytes(2**22))
    before = _moved_bytes()
    (tmp_path / "weights").read_bytes()
    assert _moved_bytes() - before < 2**20 < 2**22 <= counted_by_another_thread(tmp_path / "weights")


def counted_by_another_thread(weights: Path) -> int:
    """What a watchdog sees of this thread's reading."""
    with ThreadPoolExecutor(1) as watchdog:
        before = watchdog.submit(_moved_bytes).result()
        weights.read_bytes()
        return watchdog.submit(_moved_bytes).result() - before


@pytest.mark.parametrize(
    ("terminated", "seconds_left", "again"), [(True, 1000.0, True), (False, LEAVE_SECONDS - 1, False)]
)
def test_a_start_is_left_for_a_preemption_and_before_the_job_ends(earlier, terminated, seconds_left, again):
    rank = Rank(earlier, told=1000.0)
    with rank.starting():
        rank.terminated, rank.seconds_left = terminated, seconds_left
        assert rank.left.wait(LONG_SECONDS)
    assert rank.why.startswith("the start could not end before the job does, and is lost")
    assert rank.again is again


def test_behind_are_the_ranks_that_write_no_more_or_else_those_with_the_fewest_beats():
    def sign(rank: int, *, beats: int, age_seconds: float = 0.0) -> Sign:
        return Sign(rank, "host", 1, 1, beats, 7, "layer 3", 100.0, age_seconds)

    ahead, behind, level = sign(0, beats=8), sign(1, beats=7), sign(2, beats=8)
    assert _behind([ahead, behind, level], silent_seconds=40) == [behind]
    assert _behind([ahead, level], silent_seconds=40) == [ahead, level]
    silent = sign(3, beats=9, age_seconds=41)
    assert _behind([ahead, behind, silent], silent_seconds=40) == [silent]
