"""Chunks and a GPU: blocks and hidden states in host memory come back as they went, while the GPU computes."""

import pytest
import torch

from pipeline.memory.hidden_states import InHostMemory
from pipeline.memory.keys_values import HostBlocks

ROWS, CHUNKS = 1 << 20, 6


def busy(seconds: float = 0.02) -> None:
    """The compute stream has something to do for about so long."""
    torch.cuda._sleep(int(seconds * 1e9))


def block_of(value: float) -> torch.Tensor:
    return torch.full((ROWS, 1, 4), value, dtype=torch.bfloat16, device="cuda")


def test_blocks_of_keys_and_values_are_not_read_early_or_overwritten_late():
    """Every layer uses the same host memory, and memory of the device is freed and used again at once."""
    blocks = HostBlocks(pinned=True)
    for layer in range(3):
        for chunk in range(CHUNKS):
            busy()
            blocks.put(chunk, (block_of(chunk + 10 * layer), block_of(-chunk)))
            block_of(99)  # takes the memory that was given back
        for chunk in reversed(range(CHUNKS)):
            for earlier in range(chunk):
                blocks.start(earlier, grads=True)
                k, v = blocks.get(earlier)
                busy()
                assert (k == earlier + 10 * layer).all().item()
                assert (v == -earlier).all().item()
                blocks.add_grads(earlier, slice(0, ROWS), (block_of(1), block_of(2)))
                del k, v
                block_of(98)
            sums = blocks.take_grads(chunk)
            blocks.drop(chunk)
            if chunk == CHUNKS - 1:
                assert sums is None
            else:
                assert sums is not None
                assert (sums[0] == CHUNKS - 1 - chunk).all().item()
                assert (sums[1] == 2 * (CHUNKS - 1 - chunk)).all().item()


@pytest.mark.parametrize("reverse", [False, True])
def test_rows_of_hidden_states_travel_in_order(reverse):
    """What the next layer reads is what this one has written, also where it lies over its input."""
    states, device = InHostMemory(pinned=True), torch.device("cuda")
    shape = torch.Size((1, CHUNKS * ROWS, 4))
    rows = [slice(chunk * ROWS, (chunk + 1) * ROWS) for chunk in range(CHUNKS)][:: -1 if reverse else 1]
    whole = states.empty(shape, torch.bfloat16, device)
    for number, part in enumerate(rows):
        states.write(whole, part, torch.full((1, ROWS, 4), float(number), dtype=torch.bfloat16, device=device))
    states.settle()
    for layer in range(3):
        for number, part in enumerate(rows):
            found = states.read(whole, part, device)
            if number + 1 < CHUNKS:
                states.start(whole, rows[number + 1], device)
            busy()
            assert (found == number + layer).all().item()
            states.write(whole, part, found + 1)
            del found
            torch.full((1, ROWS, 4), -1.0, dtype=torch.bfloat16, device=device)
        states.settle()
    assert whole.is_pinned()


def test_a_device_holds_two_blocks_of_each_kind_however_many_there_are():
    size = ROWS * 4 * 2
    peaks = []
    for chunks in (4, 12):
        blocks = HostBlocks(pinned=True)
        for chunk in range(chunks):
            blocks.put(chunk, (block_of(chunk), block_of(chunk)))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for chunk in range(chunks):
            blocks.start(chunk)
            blocks.get(chunk)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= peaks[0] + size
