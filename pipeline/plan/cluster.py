"""A cluster, as a profile says it: how jobs are asked for there, and what they find. `slurm/clusters/*.yaml`.

profile = load_cluster("infiniband")
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from pipeline.errors import RecipeError, UserError
from pipeline.plan.environment import Variable
from pipeline.plan.hub_cache import hub_cache
from pipeline.plan.run_dir import RunDir
from pipeline.recipe.findings import findings
from pipeline.recipe.load import read_yaml
from pipeline.recipe.schema import Count, Gpu, NonNegative, Section

CLUSTERS = Path(__file__).resolve().parents[2] / "slurm" / "clusters"

LOCAL = "local"
"""Names no profile: this machine, without a scheduler."""

SECRET_NAME = re.compile(
    r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|(^|_)(KEY|AUTH|PASS|PAT|JWT|DSN|USERNAME)($|_)", re.IGNORECASE
)
"""Variables of such a name do not belong into a profile or a job's text."""

_OURS = {
    "partition": "the key `partition`",
    "account": "the key `account`",
    "qos": "the key `qos`",
    "reservation": "the key `reservation`",
    "time": "the key `time`",
    "cpus-per-task": "the key `cpus_per_task`",
    "mem": "the key `mem`",
    "exclude": "the key `exclude`",
    "gpus-per-node": "train.gpus and hardware.gpus_per_node",
    "gres": "train.gpus and hardware.gpus_per_node",
    "nodes": "--nodes of the command",
    "ntasks-per-node": "hardware.gpus_per_node",
}
"""Options that have a place of their own; `extra` is for all others."""

_KEPT = {"job-name", "output", "error", "export", "dependency", "kill-on-invalid-dep", "array", "requeue", "open-mode"}
"""Options that a run stands on."""

OptionValue = str | int | bool


class EnvironmentVariable(Section):
    """A row of the environment table of this cluster's jobs."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    value: str
    reason: Annotated[str, Field(min_length=1)]

    @field_validator("name")
    @classmethod
    def _is_no_secret(cls, name: str) -> str:
        if SECRET_NAME.search(name):
            raise ValueError(
                f"= {name!r}: a profile can be read by others; put {name} into the file named by `secrets`"
            )
        return name


class JobOptions(Section):
    """How one kind of job is asked for. null asks for nothing: the cluster's own default holds."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    reservation: str | None = None
    time: Annotated[str, Field(pattern=r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$")]
    """The limit: [days-]hours:minutes:seconds."""
    cpus_per_task: Count
    mem: Annotated[str, Field(pattern=r"^\d+[KMGT]?$")] | None = None
    """Per node, as sbatch takes it: `200G`; `0` is all of the node."""
    exclude: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Nodes not to run on."""
    requeues: NonNegative = 100
    """How often a job may be started again: after a signal, a preemption, a failed node or launch, a stall."""
    extra: dict[str, OptionValue] = Field(default_factory=dict)
    """Any other option of sbatch: `constraint: ib`; true for one without a value."""

    @field_validator("extra")
    @classmethod
    def _has_no_place_of_its_own(cls, extra: dict[str, OptionValue]) -> dict[str, OptionValue]:
        for name in extra:
            plain = name.replace("_", "-")
            if plain in _OURS:
                raise ValueError(f"{name}: has a place of its own; use {_OURS[plain]}")
            if plain in _KEPT:
                raise ValueError(f"{name}: is set by `alst submit`, which relies on it; remove it")
        return extra

    @property
    def time_minutes(self) -> int:
        """The limit in whole minutes, as Slurm counts."""
        days, _, clock = self.time.rpartition("-")
        hours, minutes, seconds = (int(part) for part in clock.split(":"))
        return (int(days or 0) * 24 + hours) * 60 + minutes + (seconds > 0)


class PackOptions(JobOptions):
    """Packing: one task, or an array of them."""

    tasks: Count = 1
    """Among how many tasks tokenizing and writing are divided; each asks for all of the above."""


class GpuRequest(Section):
    """How this cluster wants its GPUs asked for."""

    option: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    type: str | None = None
    """`h100` makes `--gpus-per-node=h100:8`, `--gres=gpu:h100:8`."""


class TrainOptions(JobOptions):
    """The train job: one task per GPU."""

    gpus: GpuRequest | None = GpuRequest()
    """null asks for none: nodes that are given out whole, and nodes without GPUs."""
    least_bus_gigabytes_per_second: Annotated[float, Field(gt=0)] | None = None
    """Of an all-reduce over all ranks, before the model is built; less ends the job. null: not looked at."""


class ClusterHardware(Section):
    """What a node of the train job has; takes the place of the recipe's `hardware`."""

    gpu: Annotated[Gpu, Field(strict=False)]
    gpus_per_node: Count
    """Ranks per node; on `cpu`, processes."""
    host_memory_gib: Annotated[float, Field(gt=0)] | None = None
    fabric_gigabytes_per_second: Annotated[float, Field(gt=0)] | None = None
    disk_gigabytes_per_second: Annotated[float, Field(gt=0)] | None = None
    scratch_gib: Annotated[float, Field(gt=0)] | None = None
    scratch_gigabytes_per_second: Annotated[float, Field(gt=0)] | None = None
    """As in a recipe; null is the GPU's profile in `plan/hardware.py`."""


class ContainerProfile(Section):
    """The Apptainer image that jobs run in."""

    image: Annotated[str, Field(pattern=r"^/")]
    """Path of the .sif from the root on, seen by every node."""
    runtime: Literal["apptainer", "none"] = "apptainer"
    """What starts it; `none` leaves the section without effect."""
    binds: Annotated[
        tuple[Annotated[str, Field(pattern=r"^/[^:]*(:/[^:]*(:r[ow])?)?$")], ...], Field(strict=False)
    ] = ()
    """`/source[:/target[:ro]]`, beside what a run needs, which is bound without being named (docs/containers.md)."""
    options: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Further options of `apptainer exec`."""


class ClusterProfile(Section):
    """A cluster. Made by `load_cluster`."""

    hardware: ClusterHardware
    pack: PackOptions
    train: TrainOptions
    max_array_size: Count = 1001
    """Slurm's MaxArraySize here: `scontrol show config` tells it; 1001 is Slurm's default."""
    shared: Annotated[tuple[str, ...], Field(strict=False)] | None = None
    """Folders that every node sees under the same path; the folder of runs must lie in one. null: not checked."""
    scratch: str | None = None
    """A folder of each node's own, for temporary files and for what is offloaded to disk."""
    umask: Annotated[str, Field(pattern=r"^0?[0-7]{3}$")] | None = None
    group: str | None = None
    """The group that run folders belong to."""
    container: ContainerProfile | None = None
    """null: jobs run in the Python that submits, which must lie on a shared folder."""
    modules: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """`module load` of each, in order."""
    setup: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Lines of shell, after the modules and before the tasks start."""
    environment: Annotated[tuple[EnvironmentVariable, ...], Field(strict=False)] = ()
    secrets: str | None = None
    """A file of NAME=value lines that only you can read; each task reads it itself."""
    tracking_uri: str | None = None
    """Of an MLflow server; null leaves the recipe's tracking.uri."""

    @model_validator(mode="after")
    def _array_is_not_too_long(self) -> "ClusterProfile":
        if self.pack.tasks >= self.max_array_size:
            raise ValueError(
                f"pack.tasks = {self.pack.tasks}: must be less than max_array_size = {self.max_array_size}; use "
                f"pack.tasks: {max(1, self.max_array_size - 1)}"
            )
        return self

    def overrides(self, *, nodes: int | None) -> list[str]:
        """What the cluster says in place of the recipe, as overrides of it."""
        hardware = self.hardware.model_dump(mode="json").items()
        said = [f"hardware.{name}={'null' if value is None else value}" for name, value in hardware]
        said += [f"hardware.scratch='{self.scratch}'"] if self.scratch else []
        said += [f"hardware.nodes={nodes}"] if nodes is not None else []
        return said + ([f"tracking.uri='{self.tracking_uri}'"] if self.tracking_uri else [])

    def hub_cache(self) -> Path:
        """Where jobs look for what is on the hub: as here, unless `environment` says otherwise."""
        return hub_cache(os.environ | {row.name: row.value for row in self.environment})

    def variables(self) -> list[Variable]:
        """Rows of the environment table."""
        rows = [Variable(row.name, row.value, row.reason) for row in self.environment]
        if self.scratch is not None:
            rows.append(Variable("TMPDIR", self.scratch, "temporary files stay on the node"))
        return rows


def cluster_names() -> list[str]:
    return sorted(path.stem for path in CLUSTERS.glob("*.yaml"))


def default_cluster() -> str:
    """$ALST_CLUSTER, else `default`."""
    return os.environ.get("ALST_CLUSTER") or "default"


def load_cluster(name: str) -> ClusterProfile:
    """The profile of that name under slurm/clusters/, or at that path.

    Raises UserError naming each bad value, the rule and the remedy.
    """
    path = _find(name)
    try:
        raw: dict[str, Any] = read_yaml(path)
        return ClusterProfile.model_validate(raw)
    except ValidationError as error:
        raise UserError("\n".join(f"{path}: {line}" for line in findings(error, raw, ClusterProfile))) from None
    except RecipeError as error:
        raise UserError(f"{error}") from None


def cluster_of(run_dir: RunDir, *, named: str | None) -> ClusterProfile | None:
    """Where a run goes on: on the cluster that is named, else where it was submitted to; None is this machine."""
    if named == LOCAL:
        return None
    if named is not None:
        return load_cluster(named)
    if not run_dir.cluster.is_file():
        return None
    return ClusterProfile.model_validate_json(run_dir.cluster.read_text(encoding="utf-8"))


def _find(name: str) -> Path:
    for path in (Path(name), CLUSTERS / f"{name}.yaml"):
        if path.is_file():
            return path
    raise UserError(
        f"cluster {name!r}: no such file, nor a name under slurm/clusters/; give a path, or one of: "
        f"{', '.join([*cluster_names(), LOCAL])}"
    )
