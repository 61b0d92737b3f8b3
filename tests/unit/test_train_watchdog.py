"""Signs of life that ranks leave in the run folder, and the thread that reads them."""

import json
import os
import threading

import pytest

from pipeline.plan.patience import Patience
from pipeline.plan.queue import Queue
from pipeline.plan.run_dir import RunDir
from pipeline.train.heartbeat import Heartbeat
from pipeline.train.stopping import Stopping
from pipeline.train.watchdog import Watchdog, read_signs

LONG_SECONDS = 60


class Rank:
    """The only one of its job, whose stall is found after `told` seconds."""

    def __init__(self, run_dir: RunDir, *, told: float):
        self.left, self.why = threading.Event(), ""
        queue = Queue(leave=self._leave)
        stopping = Stopping(queue, run_dir, saves=True, save_seconds=lambda: 0.0, rank=0)
        self.watchdog = Watchdog(Heartbeat(), Patience(told, None, looks=True), stopping, queue, run_dir, rank=0)

    def _leave(self, why: str, again: bool) -> None:
        self.why = why
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
    with Rank(run_dir, told=1000.0).watchdog.watching():
        pass
    row = json.loads((run_dir.heartbeats / "rank0.json").read_text()) | {"rank": 1}
    (run_dir.heartbeats / "rank1.json").write_text(json.dumps(row))
    assert [sign.rank for sign in read_signs(run_dir.heartbeats, start=row["start"])] == [0, 1]
    starts(monkeypatch, 1)
    return run_dir


def test_a_rank_is_seen_before_the_first_look_and_those_of_earlier_starts_are_not(earlier):
    with Rank(earlier, told=1000.0).watchdog.watching():
        start = json.loads((earlier.heartbeats / "rank0.json").read_text())["start"]
        (sign,) = read_signs(earlier.heartbeats, start=start)
        assert (sign.rank, sign.pid) == (0, os.getpid())


def test_a_stall_is_told_of_the_ranks_there_are_and_whatever_lies_in_the_folder(earlier):
    (earlier.heartbeats / "rank2.json").write_text("{")
    rank = Rank(earlier, told=0.1)
    with rank.watchdog.watching():
        assert rank.left.wait(LONG_SECONDS)
    assert "rank 0 (process" in rank.why
    assert "rank 1 (" not in rank.why
