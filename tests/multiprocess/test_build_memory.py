"""With ZeRO-3 no rank ever holds the whole model, neither when it is made up nor when it is loaded."""

import json
import sys

import pytest

from tests.multiprocess.build_memory import largest_module_bytes, model_bytes
from tests.multiprocess.ranks import ON_CPU, run_ranks

RANKS = 2
ROOM_BYTES = 24 * 2**20  # 9 MiB were seen beyond the partition and the module that is gathered
# The allocator gives every tensor back when it is freed, and what is measured does not depend on what came before.
VARIABLES = ON_CPU | {"MALLOC_MMAP_THRESHOLD_": "262144"}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, dict[str, int]]]:
    """By rank."""
    folder = tmp_path_factory.mktemp("build")
    worker = "tests.multiprocess.build_memory"
    run_ranks(worker, str(folder), ranks=RANKS, timeout=500, logs=folder, variables=VARIABLES)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which Linux has")


@pytest.mark.parametrize("weights", ["random", "pretrained"])
def test_building_takes_a_partition_and_the_largest_module(found, weights):
    most = model_bytes() / RANKS + largest_module_bytes() + ROOM_BYTES
    assert most < 0.8 * model_bytes(), "the model is too small to show anything"
    for rank in found:
        assert rank[weights]["growth"] <= most, found


@pytest.mark.parametrize("weights", ["random", "pretrained"])
def test_afterwards_each_rank_holds_its_partition_alone(found, weights):
    for rank in found:
        assert rank[weights]["held"] == pytest.approx(model_bytes() / RANKS, rel=1e-3), found


def test_a_model_that_is_not_partitioned_would_be_seen(found):
    for rank in found:
        assert rank["whole"]["held"] == model_bytes()
        assert rank["whole"]["growth"] > 0.95 * model_bytes()
