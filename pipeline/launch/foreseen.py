"""What the plan foresees will not work on a cluster, refused before submission unless the user insists."""

from datetime import timedelta
from math import ceil

from pipeline.errors import UserError
from pipeline.plan.advice import advise
from pipeline.plan.cluster import ClusterProfile
from pipeline.plan.estimate import estimate
from pipeline.plan.hardware import GIB
from pipeline.plan.job import JobPlan
from pipeline.plan.limits import load_of
from pipeline.plan.run_dir import packed_folder, runs_root


def check_foreseen(plan: JobPlan, profile: ClusterProfile) -> None:
    """Raises UserError for a plan that does not fit into memory, or a time limit in which no step can end."""
    _check_fits(plan)
    _check_lasts(plan, profile)


def _check_fits(plan: JobPlan) -> None:
    load = load_of(plan)
    if load.fits:
        return
    taken = [
        ("a node's host memory", load.host.total, load.hardware.host_memory_bytes),
        ("a node's scratch disk", load.scratch.total, load.hardware.scratch_bytes),
    ]
    if load.hardware.memory_bytes is not None:
        taken.insert(0, ("a GPU", load.gpu.total, load.hardware.memory_bytes))
    short = [f"{what} needs {need / GIB:,.1f} of {there / GIB:,.1f} GiB" for what, need, there in taken if need > there]
    changes = [" ".join(advice.changes) for advice in advise(plan) if not advice.instead]
    raise UserError(
        f"the plan does not fit: {', '.join(short)}; set {' and '.join(changes) or 'a shorter data.seq_len'} "
        "(`alst plan` tells what each frees and costs), or submit it all the same with --force"
    )


def _check_lasts(plan: JobPlan, profile: ClusterProfile) -> None:
    packed = packed_folder(runs_root(), plan)
    least, limit = estimate(plan, packed=packed).least_seconds, 60 * profile.train.time_minutes
    if least is not None and least > limit:
        raise UserError(
            f"train.time = {profile.train.time}: must last for the start, one step and one save, and they take "
            f"{timedelta(seconds=ceil(least))} by the plan; raise it in the cluster's profile, shorten data.seq_len, "
            "or submit it all the same with --force"
        )
