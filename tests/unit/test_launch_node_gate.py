"""What makes a node unfit, on this machine and on ones that are described."""

import os
import re
import stat
from pathlib import Path

import pytest

from pipeline.launch import node_gate
from pipeline.launch.node_gate import unfitness
from pipeline.plan.hardware import GIB
from pipeline.plan.job import JobPlan, plan_job
from pipeline.plan.limits import load_of
from pipeline.recipe.load import load


def planned(*overrides: str, recipe: str = "tiny") -> JobPlan:
    return plan_job(load(recipe, overrides=list(overrides)))


def test_this_machine_is_fit_for_a_tiny_run():
    assert unfitness(planned()) is None


def test_memory_that_another_holds_makes_a_node_unfit_and_a_plan_for_a_larger_one_does_not(tmp_path):
    plan = planned("hardware.host_memory_gib=64")
    needed = load_of(plan).host.total
    meminfo = tmp_path / "meminfo"

    def found(total: float, free: float) -> str | None:
        meminfo.write_text(f"MemTotal: {int(total / 1024)} kB\nMemAvailable: {int(free / 1024)} kB\n")
        return node_gate._memory(plan, meminfo)

    assert found(64 * GIB, needed) is None
    assert found(needed / 2, needed / 4) is None
    assert found(64 * GIB, 2**20).startswith("0.0 GiB of its 64.0 GiB of memory are free, ")


def test_a_full_disk_for_temporary_files_makes_a_node_unfit(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(node_gate, "LEAST_SCRATCH_BYTES", 2**60)
    assert unfitness(planned()).startswith(f"{tmp_path} has ")
    monkeypatch.setattr(node_gate, "LEAST_SCRATCH_BYTES", 0)
    monkeypatch.setattr(node_gate, "LEAST_INODES", 2**60)
    assert os.statvfs(tmp_path).f_files == 0 or "inodes free, " in unfitness(planned())


def test_a_folder_for_temporary_files_that_takes_none_makes_a_node_unfit(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "file" / "below"))
    assert unfitness(planned()) == f"{tmp_path}/file/below: Not a directory"


def test_the_disk_that_the_plan_keeps_layers_on_must_have_room_for_them(tmp_path):
    """Not that of temporary files."""
    scratch = tmp_path / "scratch"
    on_disk = "memory.activation_checkpoint={offload: disk, disk_groups: 1}"
    plan = planned(on_disk, f"hardware.scratch={scratch}")
    assert load_of(plan).scratch.total > 0
    assert unfitness(plan) is None
    assert scratch.is_dir()
    longer = planned(on_disk, f"hardware.scratch={scratch}", "data.seq_len=2147483136", "hardware.scratch_gib=1e6")
    found = node_gate._disks(longer)
    assert re.fullmatch(rf"{scratch} has [\d,]+\.\d\d GiB free, [\d,]+\.\d\d are needed", found), found
    assert node_gate._disks(planned(f"hardware.scratch={tmp_path}/nowhere")) is None, "nothing is kept there"


@pytest.mark.parametrize(
    ("said", "code", "expected"),
    [
        ("0, 0\n1, [N/A]", 0, None),
        ("0, 0", 0, "1 GPUs are there, 2 are needed"),
        ("0, 0\n1, 3", 0, "GPU 1 has 3 uncorrected ECC errors"),
        ("Unable to determine the device handle", 9, "nvidia-smi fails: Unable to determine the device handle"),
    ],
)
def test_gpus_are_counted_and_their_errors_read(tmp_path, monkeypatch, said, code, expected):
    assert of_gpus(f"echo '{said}'\nexit {code}", tmp_path, monkeypatch) == expected


def test_a_driver_that_does_not_answer_makes_a_node_unfit(tmp_path, monkeypatch):
    monkeypatch.setattr(node_gate, "ANSWER_SECONDS", 1)
    assert of_gpus("sleep 600 & exec sleep 600", tmp_path, monkeypatch) == "nvidia-smi does not answer in 1 s"


def of_gpus(script: str, folder: Path, monkeypatch) -> str | None:
    """What is found by a program of nvidia-smi's name: there is no GPU here."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return node_gate._gpus(planned("hardware.gpus_per_node=2", "data.seq_len=65536", recipe="llama8b"))
