"""On a GPU a wait is what the computing stream stood still, whatever the host did meanwhile."""

import torch

from pipeline.parallel.waits import take_waits, waiting

CYCLES = 50_000_000  # tens of milliseconds


def test_waits_are_read_off_the_computing_stream():
    torch.zeros(1, device="cuda")
    take_waits()
    with waiting("communication"):
        torch.cuda._sleep(CYCLES)  # queued: the host goes on at once
    torch.cuda.synchronize()
    taken = take_waits()
    assert taken["communication"] > 0.005
    assert take_waits() == {"communication": 0.0, "offload_stall": 0.0}
