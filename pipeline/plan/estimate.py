"""What a plan will take: bytes against limits, seconds, rates, and what to change where it does not fit."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.plan.documents import DocumentMix, documents_of
from pipeline.plan.flops import model_flops
from pipeline.plan.host_memory import NodeBytes, disk_bytes
from pipeline.plan.job import JobPlan
from pipeline.plan.limits import Load, load_of
from pipeline.plan.terms import Item
from pipeline.plan.time import StepSeconds, checkpoint_seconds, start_seconds, step_seconds


@dataclass(frozen=True)
class Estimate:
    """A plan with what it is expected to take."""

    plan: JobPlan
    load: Load
    disk: NodeBytes
    documents: DocumentMix
    seconds: StepSeconds | None
    """None on a CPU."""
    time_limit_seconds: float | None = None
    """Of a job, where a cluster is named."""

    @property
    def model_flops_per_step(self) -> int:
        plan = self.plan
        return model_flops(
            plan.model,
            tokens=plan.tokens_per_step,
            sum_len_squared=plan.samples_per_step * self.documents.sum_len_squared,
            sum_windowed=plan.samples_per_step * self.documents.sum_windowed,
        )

    @property
    def tokens_per_second(self) -> float | None:
        return None if self.seconds is None else self.plan.tokens_per_step / self.seconds.total

    @property
    def mfu(self) -> float | None:
        return self._share(self.model_flops_per_step)

    @property
    def hfu(self) -> float | None:
        """With what is recomputed."""
        return None if self.seconds is None else self._share(self.seconds.hardware_flops)

    def _share(self, flops: float) -> float | None:
        if self.seconds is None:
            return None
        return flops / (self.seconds.total * self.plan.world_size * (self.load.hardware.peak_flops or 1.0))

    @property
    def checkpoint_seconds(self) -> float | None:
        return None if self.plan.recipe.checkpoint is None else checkpoint_seconds(self.plan)

    @property
    def least_seconds(self) -> float | None:
        """Of a job that is of any use: its start, one step and one save."""
        if self.seconds is None:
            return None
        return start_seconds(self.plan) + self.seconds.total + (self.checkpoint_seconds or 0.0)

    @property
    def lost_steps(self) -> float:
        """By a failure, or a preemption in which no step can end, on average: half of those between two saves."""
        checkpoint = self.plan.recipe.checkpoint
        every = None if checkpoint is None else checkpoint.every_steps
        return min(every or self.plan.recipe.train.steps, self.plan.recipe.train.steps) / 2

    @property
    def lost_seconds(self) -> float | None:
        """The same in time, with the save that was under way and another start."""
        if self.seconds is None:
            return None
        return self.lost_steps * self.seconds.total + (self.checkpoint_seconds or 0.0) + start_seconds(self.plan)

    @property
    def steps_per_time_limit(self) -> int | None:
        """Whole steps that a job does before its limit, with a save at its end."""
        if self.seconds is None or self.time_limit_seconds is None:
            return None
        left = self.time_limit_seconds - start_seconds(self.plan) - (self.checkpoint_seconds or 0.0)
        return max(0, int(left / self.seconds.total))

    @property
    def items(self) -> dict[str, tuple[tuple[str, Item], ...]]:
        """(unit, item) by name; `--explain` looks them up here. A name may stand for bytes of several memories."""
        found: dict[str, tuple[tuple[str, Item], ...]] = {}
        rooms = [
            ("bytes of a rank's GPU", self.load.gpu.items),
            ("bytes of a node's host memory", self.load.host.items),
            ("bytes of a node's disk", self.disk.items),
            ("bytes of a node's scratch disk", self.load.scratch.items),
            ("seconds of a step", () if self.seconds is None else self.seconds.items),
        ]
        for unit, items in rooms:
            for item in items:
                found[item.name] = (*found.get(item.name, ()), (unit, item))
        return found

    def to_json(self, advice: Sequence["Advice"] = ()) -> dict[str, Any]:
        """What `alst plan --json` adds to the plan itself."""
        load = self.load
        return {
            "mesh": {"dp": self.plan.dp, "sp": self.plan.sp},
            "documents": {
                "sum_len_squared": self.documents.sum_len_squared,
                "model_flops_per_step": self.model_flops_per_step,
                "from": self.documents.told,
            },
            "gpu_bytes": _bytes(load.gpu.by_name, load.hardware.memory_bytes) | {"peak_at": load.gpu.moment},
            "host_bytes_per_node": _bytes(load.host.by_name, load.hardware.host_memory_bytes),
            "disk_bytes_per_node": {**self.disk.by_name, "total": self.disk.total},
            "scratch_bytes_per_node": _bytes(load.scratch.by_name, load.hardware.scratch_bytes),
            "seconds_per_step": None if self.seconds is None else {**self.seconds.by_name, "total": self.seconds.total},
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "hfu": self.hfu,
            "checkpoint_seconds": self.checkpoint_seconds,
            "steps_per_time_limit": self.steps_per_time_limit,
            "lost_by_a_failure": {"steps": self.lost_steps, "seconds": self.lost_seconds},
            "fits": load.fits,
            "binding": load.binding,
            "advice": [change.to_json() for change in advice],
        }


def _bytes(by_name: dict[str, int], available: int | None) -> dict[str, int | None]:
    return {**by_name, "total": sum(by_name.values()), "available": available}


@dataclass(frozen=True)
class Advice:
    """One change, made after those before it, with what it frees and what it costs."""

    changes: tuple[str, ...]
    """Overrides of the recipe."""
    frees_gpu_bytes: int
    frees_host_bytes_per_node: int
    seconds_per_token_ratio: float | None
    """GPU seconds per token after it over those before; None where no seconds are known."""
    fits: bool
    """With this and all before it."""
    instead: bool = False
    """Of the change before, not after it."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def estimate(
    plan: JobPlan,
    *,
    packed: Path | None = None,
    time_limit_seconds: float | None = None,
) -> Estimate:
    """What `plan` will take; `packed` is where its packed data set lies or will lie."""
    documents = documents_of(plan, packed)
    return Estimate(
        plan=plan,
        load=load_of(plan),
        disk=disk_bytes(plan),
        documents=documents,
        seconds=step_seconds(plan, documents),
        time_limit_seconds=time_limit_seconds,
    )
