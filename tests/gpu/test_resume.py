"""On GPUs, with `train.deterministic: true`: a run that was interrupted goes on bit for bit."""

from dataclasses import replace

import pytest
import torch

from tests.gpu.support import job_variables
from tests.multiprocess.case import Case
from tests.multiprocess.test_resume import ADAM, BFLOAT16, check_equal, run

RANKS = max(1, min(torch.cuda.device_count(), 2))
DETERMINISTIC = "train.deterministic=true"
CASES = [
    *(Case(sp=RANKS, stage=stage, overrides=(ADAM, DETERMINISTIC)) for stage in range(4)),
    Case(sp=RANKS, stage=3, accumulation=3, overrides=(ADAM, BFLOAT16, DETERMINISTIC)),
    Case(sp=RANKS, stage=3, overrides=(ADAM, BFLOAT16, DETERMINISTIC, "zero.offload_optimizer=cpu")),
    Case(sp=RANKS, stage=3, overrides=(ADAM, DETERMINISTIC, "checkpoint.asynchronous=false")),
]


@pytest.fixture(scope="module")
def losses(tmp_path_factory) -> dict[str, dict[str, list[float]]]:
    gpu, variables = job_variables(RANKS, DETERMINISTIC)
    cases = [replace(case, gpu=gpu) for case in CASES]
    return run(cases, "both", ranks=RANKS, folder=tmp_path_factory.mktemp("resume"), variables=variables)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_resumed_run_goes_on_bit_for_bit(losses, case):
    check_equal(losses[case.name])
