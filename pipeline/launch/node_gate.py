"""Whether a node is fit for its part of a run, looked at by its first task before anything heavy starts.

What the node has too little of now, or what is broken in it; not what a plan asks too much of, which `alst submit` has
told already. A node that is not fit is taken out of the run, and the job starts again without it.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from pipeline.plan.hardware import GIB
from pipeline.plan.job import JobPlan
from pipeline.plan.limits import load_of
from pipeline.recipe.schema import Gpu

LEAST_SCRATCH_BYTES = GIB
LEAST_INODES = 10_000
"""For compiled kernels, sockets and temporary files."""

PROBE_BYTES = 4096

ANSWER_SECONDS = 60
"""Of nvidia-smi; it hangs where a GPU has fallen off the bus."""


def unfitness(plan: JobPlan) -> str | None:
    """Why this node cannot do its part; None if it can."""
    return _memory(plan, Path("/proc/meminfo")) or _disks(plan) or _gpus(plan)


def _memory(plan: JobPlan, meminfo: Path) -> str | None:
    """Someone else holds it, if the machine as a whole has enough."""
    rows = (line.split() for line in meminfo.read_text().splitlines())
    there = {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows}
    host = load_of(plan).host
    needed = host.total - host.by_name["system"]
    total, free = there["MemTotal"], there["MemAvailable"]
    if free >= needed or total < host.total:
        return None
    return f"{free / GIB:,.1f} GiB of its {total / GIB:,.1f} GiB of memory are free, {needed / GIB:,.1f} are needed"


def _disks(plan: JobPlan) -> str | None:
    """For temporary files, where this process was told to put them, which Python's own choice passes over if it cannot;
    and for what the plan keeps on the node's disk."""
    temporary = os.environ.get("TMPDIR") or tempfile.gettempdir()
    found = _disk(Path(temporary), LEAST_SCRATCH_BYTES)
    spilled = load_of(plan).scratch.total
    return found or (_disk(Path(plan.recipe.hardware.scratch or temporary), spilled) if spilled else None)


def _disk(folder: Path, needed: int) -> str | None:
    """Whether it takes a file, and has room for so many bytes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = os.statvfs(folder)
        if (free := found.f_bavail * found.f_frsize) < needed:
            return f"{folder} has {free / GIB:,.2f} GiB free, {needed / GIB:,.2f} are needed"
        if found.f_files and found.f_favail < LEAST_INODES:  # some file systems count none
            return f"{folder} has {found.f_favail:,} inodes free, {LEAST_INODES:,} are needed"
        with tempfile.TemporaryFile(dir=folder, buffering=0) as probe:  # one that fails is mounted read-only
            probe.write(bytes(PROBE_BYTES))
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return None


def _gpus(plan: JobPlan) -> str | None:
    """Those that a driver tells of; where there is no driver's program the tasks themselves will say so."""
    program = shutil.which("nvidia-smi")
    if plan.recipe.hardware.gpu is Gpu.CPU or program is None:
        return None
    query = "--query-gpu=index,ecc.errors.uncorrected.volatile.total"
    command = [program, query, "--format=csv,noheader"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said, _ = process.communicate(timeout=ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()  # nobody waits: one that hangs in the driver would not die
        return f"nvidia-smi does not answer in {ANSWER_SECONDS} s"
    if process.returncode:
        return f"nvidia-smi fails: {said.strip()}"
    found = [[field.strip() for field in line.split(",")] for line in said.splitlines()]
    if len(found) < plan.recipe.hardware.gpus_per_node:
        return f"{len(found)} GPUs are there, {plan.recipe.hardware.gpus_per_node} are needed"
    broken = [f"GPU {index} has {errors}" for index, errors in found if errors.isdigit() and int(errors)]
    return f"{', '.join(broken)} uncorrected ECC errors" if broken else None
