"""A bench without a run: a machine, a basis, rows as they would come out of one."""

from pathlib import Path

from pipeline.bench.cases import Basis, Case, plan_of
from pipeline.bench.machine import Machine
from pipeline.bench.results import Asked
from pipeline.bench.trial import Measured, Outcome, Row
from pipeline.plan.hardware import GIB
from pipeline.recipe.schema import Gpu

CPU = Machine(Gpu.CPU, None, None, None, 0, "a processor", 2, 16.0)
H200 = Machine(Gpu.H200_141GB, "NVIDIA H200", "580.1", 143771, 1, "a processor", 16, 1024.0)


def basis(machine: Machine = CPU, *overrides: str, recipe: str = "tiny", model: str | None = None) -> Basis:
    return Basis(recipe, machine, Path("/corpus"), model, steps=2, overrides=overrides)


def asked(**changes) -> Asked:
    usual = {
        "recipe": "tiny",
        "overrides": (),
        "model": None,
        "lengths": (1024,),
        "rungs": ("baseline", "offload"),
        "engines": ("alst",),
        "layers": (2,),
        "repeats": 1,
        "steps": 2,
        "find_max": False,
        "most_tokens": 2**20,
        "grain_tokens": 1024,
        "full_layers": 32,
    }
    return Asked(**usual | changes)


def measured(speed: float = 100.0, **changes) -> Measured:
    usual = {
        "steps": 2,
        "step_seconds": 10.0,
        "least_step_seconds": 9.0,
        "most_step_seconds": 11.0,
        "tokens_per_second_per_gpu": speed,
        "data_seconds": 0.0,
        "forward_seconds": 3.0,
        "backward_seconds": 6.0,
        "optimizer_seconds": 0.5,
        "communication_seconds": 0.0,
        "offload_stall_seconds": 0.1,
        "mfu": 0.4,
        "hfu": 0.5,
        "peak_device_bytes": 10 * GIB,
        "peak_device_reserved_bytes": 11 * GIB,
        "peak_host_rss_bytes": 5 * GIB,
        "host_rss_bytes": 5 * GIB,
        "pinned_bytes": 0,
        "offloaded_bytes": 0,
        "first_loss": 9.0,
        "last_loss": 8.0,
    }
    return Measured(**usual | changes)


def row(case: Case, found: Measured | None = None, *, outcome: Outcome = Outcome.OK, on: Basis | None = None) -> Row:
    """A row of a run that ended so."""
    plan = plan_of(case, on or basis())
    detail = "" if outcome is Outcome.OK else "what it said"
    return Row(case, outcome, detail, "torch 2.13", found, {"gpu_bytes": 9 * GIB}, plan.to_json(), "alst", 1.0, "now")
