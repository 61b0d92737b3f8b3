"""How a task starts inside an image: the exec line, what it sees of the host, and whether the image fits this side.

The code comes from the run's snapshot, read-only, so that a change of code needs no new image. Pure but for
`check_container`, which tries the image; what a job then does in it is in `launch.entry`.
"""

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.errors import UserError
from pipeline.launch.deadline import GRACE_SECONDS, JOB_END, KILL_SECONDS
from pipeline.launch.entry import VERIFY_IMAGE, Stage
from pipeline.plan.cluster import ClusterProfile, ContainerProfile
from pipeline.plan.environment import Variable
from pipeline.plan.hub_cache import hub_needs
from pipeline.plan.image import identify
from pipeline.plan.job import JobPlan
from pipeline.plan.run_dir import RunDir
from pipeline.recipe.schema import Gpu

START_SECONDS = 300  # a large image on a cold disk, unpacked by an ordinary user

NODE_SCRATCH = "/tmp"
"""Where a profile names no scratch: a node's own, as a rule."""

LISTED: tuple[str, ...] = (
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "LANG",
    "LC_ALL",
    "TERM",
    "SUBMITIT_EXECUTOR",
    "SLURM_CONF",
)
LISTED += ("MASTER_ADDR", "MASTER_PORT", "HF_HOME", "HF_HUB_CACHE", "ALST_RUNS", VERIFY_IMAGE, "APPTAINER_UNSQUASH")
LISTED += (JOB_END, GRACE_SECONDS, KILL_SECONDS)
"""Variables that reach a task in a container, beside the job's table and Slurm's own."""

UNPACK = (
    "# Not root: a process of its own serves the image from /dev/fuse, and where Slurm does not track by cgroup, a",
    "# signal to the job would end it. Then the image is unpacked for each task.",
    'if [ "$(id -u)" != 0 ] && { [ ! -w /dev/fuse ] || ! scontrol show config | grep -q proctrack/cgroup; }; then',
    "    export APPTAINER_UNSQUASH=1",
    "fi",
)

_CAP_SYS_RESOURCE = 1 << 24
_PROBE = (
    "import importlib.metadata as m, json, sys; print(json.dumps([list(sys.version_info[:2]), m.version('submitit')]))"
)


@dataclass(frozen=True)
class Bind:
    """A path of the host that a task sees under the same name."""

    path: Path
    writable: bool

    def option(self) -> str:
        return f"--bind={self.path}" if self.writable else f"--bind={self.path}:{self.path}:ro"


def container_of(profile: ClusterProfile) -> ContainerProfile | None:
    """None where jobs run in the Python that submits."""
    return profile.container if profile.container is not None and profile.container.runtime != "none" else None


def lines(profile: ClusterProfile) -> tuple[str, ...]:
    """Of the batch script, before its tasks: whether every node has the image, and how it is mounted there."""
    container = container_of(profile)
    if container is None:
        return ()
    image = shlex.quote(container.image)
    told = f"alst: container.image = {container.image}: not on every node of this job; copy it to a folder they share"
    return (
        f'srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 test -r {image} || '
        f"{{ launch_failed || echo {shlex.quote(told)} >&2; after_tasks 1; }}",
        *UNPACK,
    )


def python_line(plan: JobPlan, profile: ClusterProfile, run_dir: RunDir, stage: Stage) -> str:
    """How a task of a stage starts Python, as a shell reads it: this Python, or the image's."""
    container = container_of(profile)
    if container is None:
        return shlex.quote(sys.executable)
    # Relative paths of a recipe mean the folder it is submitted from; it is there if something in it is bound.
    folder = run_dir.path if all(path.is_absolute() for path in _local_paths(plan)) else Path.cwd()
    line = ["apptainer", "exec", "--no-home", "--no-mount=cwd,tmp", f"--pwd={folder}"]
    line += [bind.option() for bind in binds(plan, profile, run_dir)]
    line += [f"--bind={bind}" for bind in container.binds]
    if stage in ("train", "check") and profile.hardware.gpu is not Gpu.CPU:
        line.append("--nv")
    return shlex.join([*line, *container.options, container.image, "python"])


def binds(plan: JobPlan, profile: ClusterProfile, run_dir: RunDir) -> list[Bind]:
    """What a task sees of the host: later ones lie over earlier ones."""
    container = profile.container
    assert container is not None
    found = [Bind(run_dir.root, writable=True), Bind(run_dir.code, writable=False), Bind(Path(container.image), False)]
    found.append(Bind(Path(profile.scratch or NODE_SCRATCH), writable=True))
    found += [Bind(path, writable=True) for path in _hub_caches(plan, profile)]
    if profile.secrets is not None:
        found.append(Bind(Path(profile.secrets).expanduser(), writable=False))
    return found + [Bind(path.absolute(), writable=False) for path in _local_paths(plan)]


def _hub_caches(plan: JobPlan, profile: ClusterProfile) -> list[Path]:
    """Where model, tokenizer and data were staged; writable, because data sets leave locks beside what they read."""
    named = [os.environ[name] for name in ("HF_HOME", "HF_HUB_CACHE") if os.environ.get(name)]
    staged = [profile.hub_cache()] if hub_needs(plan.recipe) else []
    return list(dict.fromkeys([*(Path(name).expanduser() for name in named), *staged]))


def _local_paths(plan: JobPlan) -> list[Path]:
    """What the recipe names on a disk: sources, model, tokenizer, held-out samples."""
    recipe = plan.recipe
    said: list[object] = [source.path for source in recipe.data.sources]
    said += [recipe.model.name_or_path, recipe.data.tokenizer, recipe.evaluation and recipe.evaluation.packed]
    paths = [Path(name).expanduser() for name in said if isinstance(name, str)]
    return list(dict.fromkeys(path for path in paths if path.exists()))


def variables(profile: ClusterProfile, table: tuple[Variable, ...]) -> tuple[Variable, ...]:
    """Rows for a job in a container, behind the others: caches on the node, and the list of what reaches a task."""
    if container_of(profile) is None:
        return ()
    cache = f"{profile.scratch or NODE_SCRATCH}/alst-{os.getuid()}"
    rows = [
        Variable("TORCH_EXTENSIONS_DIR", f"{cache}/torch", "compiled on the node it runs on; no home folder is there"),
        Variable("TRITON_CACHE_DIR", f"{cache}/triton", "kernels are compiled once a node, not once a job"),
        Variable("MPLCONFIGDIR", f"{cache}/matplotlib", "no home folder is there"),
    ]
    if os.geteuid() == 0 and not _capabilities() & _CAP_SYS_RESOURCE:
        rows.append(Variable("APPTAINER_DROP_CAPS", "CAP_SYS_RESOURCE", "this root cannot hand on what it has not"))
    names = [*LISTED, *(variable.name for variable in (*table, *rows) if variable.name != "SLURM_EXPORT_ENV")]
    listed = ",".join(dict.fromkeys(names))
    return (*rows, Variable("SLURM_EXPORT_ENV", listed, "this and Slurm's own is all that a container gets"))


# Whether the image fits this side


def with_image(plan: JobPlan, profile: ClusterProfile) -> JobPlan:
    """The plan with the image its jobs run in, as it is now. Raises UserError if they could not run in it."""
    container = container_of(profile)
    if container is None:
        return replace(plan, image=None)
    image = identify(Path(container.image))
    _check_binds(container)
    _check_python(container)
    return replace(plan, image=image)


def _check_binds(container: ContainerProfile) -> None:
    for bind in container.binds:
        source = bind.partition(":")[0]
        if not Path(source).exists():
            raise UserError(f"container.binds = {bind}: {source} is not there; make it, or correct the profile")


def _check_python(container: ContainerProfile) -> None:
    """Raises UserError unless the image starts here, with this side's Python and submitit."""
    program = shutil.which("apptainer")
    if program is None:
        raise UserError(
            "apptainer: not on the PATH; install it or load its module, here and on the nodes, or set "
            "container.runtime: none"
        )
    command = [program, "exec", "--no-home", "--no-mount=cwd", "--pwd=/", container.image, "python", "-c", _PROBE]
    try:
        done = subprocess.run(
            command, env=apptainer_environment(), capture_output=True, text=True, timeout=START_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"container.image = {container.image}: did not start in {START_SECONDS} s; is its disk in order?"
        ) from None
    if done.returncode:
        raise UserError(f"container.image = {container.image}: does not start here: {_reason(done.stderr)}")
    (major, minor), submitit = json.loads(done.stdout.splitlines()[-1])
    here, there = f"{sys.version_info.major}.{sys.version_info.minor}", f"{major}.{minor}"
    if here != there:
        raise UserError(
            f"container.image = {container.image}: has Python {there}, this side {here}, and what submitit writes on "
            f"one is read by the other; submit with Python {there} (make setup PYTHON=python{there}), or build the "
            "image anew"
        )
    if submitit != (ours := importlib.metadata.version("submitit")):
        raise UserError(
            f"container.image = {container.image}: has submitit {submitit}, this side {ours}; install "
            f"submitit=={submitit} here, or build the image anew"
        )


def apptainer_environment() -> dict[str, str]:
    """For Apptainer on this side."""
    own = (
        {} if os.geteuid() != 0 or _capabilities() & _CAP_SYS_RESOURCE else {"APPTAINER_DROP_CAPS": "CAP_SYS_RESOURCE"}
    )
    if os.geteuid() != 0 and not os.access("/dev/fuse", os.W_OK):
        own["APPTAINER_UNSQUASH"] = "1"
    return os.environ | own


def _capabilities() -> int:
    """Of this process, as a bit mask."""
    (mask,) = re.findall(r"^CapEff:\s*(\w+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(mask, 16)


def _reason(stderr: str) -> str:
    """Apptainer's last complaint, without its colours."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in stderr.splitlines()]
    told = [line for line in lines if line.startswith(("FATAL", "ERROR"))] or lines or ["it says nothing"]
    return told[-1]
