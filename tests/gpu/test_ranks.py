"""Real ranks over NCCL, one per GPU up to two: every gradient against the stock model, on the CPU and in float64.

In float32 attention is the CPU kernel's algorithm on the GPU, so that all else is held to float32; in bfloat16 it is
the kernel that a job takes.
"""

import shutil
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from tests.gpu.support import job_variables
from tests.multiprocess.case import FEATURES, Case
from tests.multiprocess.test_parity import ADAM, check, check_adam, run

RANKS = max(1, min(torch.cuda.device_count(), 2))
BFLOAT16 = "model.dtype=bfloat16"
BOTH_OFFLOADED = ("zero.offload_optimizer=cpu", "zero.offload_parameters=cpu")
LIGER = ("memory.tiled_loss.kernel=liger", "memory.tiled_loss.tile_tokens=auto")

SGD = [
    *(Case(sp=RANKS, stage=stage, accumulation=1 + 2 * (stage % 2)) for stage in range(4)),
    *(Case(sp=RANKS, stage=stage, overrides=("zero.reduce_scatter=false",)) for stage in (2, 3)),
    *(Case(sp=RANKS, overrides=overrides) for name, overrides in FEATURES.items() if name != "all"),
    Case(sp=RANKS, stage=2, overrides=("zero.offload_optimizer=cpu",)),
    Case(sp=RANKS, overrides=("zero.offload_parameters=cpu",)),
    Case(sp=RANKS, accumulation=3, overrides=BOTH_OFFLOADED),
    Case(sp=RANKS, self_check=True, overrides=("train.self_check.tolerance=1e-4",)),
    Case(sp=RANKS, accumulation=3, no_labels=True),
    Case("llama-one-kv-head", sp=RANKS),
    Case("llama-tied", sp=RANKS, accumulation=3),
    Case("gpt_oss", sp=RANKS),
    Case("qwen3_moe", sp=RANKS),
    Case(sp=RANKS, overrides=(BFLOAT16,)),
    Case("mistral", sp=RANKS, stage=1, overrides=(BFLOAT16,)),
    Case(sp=RANKS, overrides=(BFLOAT16, "optimizer.states_dtype=bfloat16")),
]
if RANKS > 1:
    SGD += [Case(dp=RANKS, stage=stage, accumulation=3 - 2 * (stage % 2)) for stage in range(4)]
if find_spec("liger_kernel") is not None:
    SGD += [Case(sp=RANKS, overrides=LIGER), Case(sp=RANKS, overrides=(BFLOAT16, *LIGER))]
ADAM_ON_GPU = [Case(sp=RANKS, stage=stage, steps=4, overrides=(ADAM,)) for stage in range(4)]
ADAM_ON_HOST = [
    Case(sp=RANKS, stage=stage, steps=4, overrides=(ADAM, "zero.offload_optimizer=cpu")) for stage in (1, 2, 3)
]
DEFAULTS = Case(sp=RANKS, overrides=(BFLOAT16, "optimizer={name: adamw, lr: 1e-5}", "zero.offload_optimizer=cpu"))


def on_gpus(cases: list[Case], folder) -> dict[str, dict]:
    """Results of all cases, in one launch with the variables that a job sets."""
    gpu, variables = job_variables(RANKS)
    return run([replace(case, gpu=gpu) for case in cases], ranks=RANKS, folder=folder, variables=variables)


@pytest.fixture(scope="module")
def on_device(tmp_path_factory) -> dict[str, dict]:
    return on_gpus([*SGD, *ADAM_ON_GPU], tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def on_host(tmp_path_factory) -> dict[str, dict]:
    if shutil.which("g++") is None:
        pytest.skip("DeepSpeed compiles its CPU Adam at first use, with g++")
    return on_gpus([*ADAM_ON_HOST, DEFAULTS], tmp_path_factory.mktemp("host"))


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", SGD, ids=lambda case: case.name)
def test_ranks_on_gpus_train_as_the_stock_model(on_device, case):
    check(on_device, case)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", ADAM_ON_GPU, ids=lambda case: case.name)
def test_adam_on_the_gpu_takes_the_steps_of_plain_torch(on_device, case):
    check_adam(on_device[case.name])


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", ADAM_ON_HOST, ids=lambda case: case.name)
def test_adam_on_the_host_takes_the_steps_of_plain_torch(on_host, case):
    check_adam(on_host[case.name])


@pytest.mark.timeout(1200)
def test_the_default_recipe_trains_as_the_stock_model(on_host):
    check(on_host, DEFAULTS)
