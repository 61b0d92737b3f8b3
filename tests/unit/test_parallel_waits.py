"""What was waited for is counted by what it was, once."""

import time

import pytest

from pipeline.parallel.waits import take_waits, waiting


@pytest.fixture(autouse=True)
def nothing_before():
    take_waits()


def test_waits_are_counted_by_what_was_waited_for_and_taken_once():
    @waiting("communication")
    def exchange() -> int:
        time.sleep(0.02)
        return 3

    assert [exchange(), exchange()] == [3, 3]
    with waiting("offload_stall"):
        time.sleep(0.01)
    taken = take_waits()
    assert taken["communication"] >= 0.04
    assert taken["offload_stall"] >= 0.01
    assert take_waits() == {"communication": 0.0, "offload_stall": 0.0}


def test_what_fails_raises_and_counts_for_nothing():
    with pytest.raises(OSError, match="gone"), waiting("communication"):
        raise OSError("gone")
    assert take_waits()["communication"] == 0.0
