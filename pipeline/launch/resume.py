"""A run that goes on: its plan as it was, or with what may change between two starts."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.errors import DataError, UserError
from pipeline.plan.checkpoint_dir import damage, folder_name, read_checkpoint, step_folders
from pipeline.plan.job import JobPlan, plan_job, read_plan
from pipeline.plan.resumable import check_resumable
from pipeline.plan.run_dir import RunDir
from pipeline.recipe.load import load

OF_THE_MOMENTS = ("optimizer.name", "optimizer.states_dtype", "optimizer.weight_decay_on")
"""What decides which moments there are, and how they are grouped. Rates and decay may change."""


def resumed_plan(run_dir: RunDir, overrides: Sequence[str] = ()) -> JobPlan:
    """The plan to go on with. Raises UserError if the folder holds no run, or if another model or data is asked for."""
    before = replace(read_plan(run_dir.plan), image=None)  # the next jobs' image is for `alst submit` to name
    if not overrides:
        return before
    recipe = load(str(run_dir.recipe), overrides=list(overrides))

    def same(name: str) -> bool:
        return bool(getattr(recipe.model, name) == getattr(before.recipe.model, name))

    plan = plan_job(recipe, shape=before.model)
    if changed := [name for name in type(recipe.model).model_fields if name != "attention" and not same(name)]:
        told = ", ".join(f"model.{name}" for name in changed)
        raise UserError(
            f"{run_dir.path}: its checkpoints are of another model; leave {told} as it was, or start a new run"
        )
    if _data(plan) != _data(before):
        raise UserError(
            f"{run_dir.path}: its place in the data means nothing in other samples or another order "
            f"({plan.sample_order}; before: {before.sample_order}); leave data.* and "
            "evaluation.samples as they were, or start a new run"
        )
    if changed := [name for name in OF_THE_MOMENTS if _value(plan, name) != _value(before, name)]:
        raise UserError(
            f"{run_dir.path}: its moments are of another optimizer; leave {', '.join(changed)} as it was, or export "
            "the weights and start a new run"
        )
    return plan


def _data(plan: JobPlan) -> tuple[str, str, bool]:
    return plan.packing_key, plan.sample_order, plan.recipe.data.cross_document_attention


def _value(plan: JobPlan, name: str) -> object:
    return getattr(plan.recipe.optimizer, name.removeprefix("optimizer."))


def check_can_go_on(plan: JobPlan, run_dir: RunDir) -> None:
    """Raises UserError if the run has done all its steps, or if the plan cannot go on from its newest checkpoint.

    Damage is for the ranks to find: one that looks damaged here is passed over.
    """
    for path in step_folders(run_dir.checkpoints):
        try:
            checkpoint = read_checkpoint(path)
            if damage(checkpoint, checksums=False) is not None:
                continue
        except (DataError, OSError):
            continue
        if checkpoint.record.step >= plan.recipe.train.steps:
            raise UserError(
                f"{run_dir.path}: all {plan.recipe.train.steps} steps are done ({path.name}); to train longer, say "
                "train.steps=N with a larger N"
            )
        check_resumable(checkpoint, plan)
        return


def is_done(plan: JobPlan, run_dir: RunDir) -> bool:
    """Whether a checkpoint of the last step is there; damage is for the ranks to find."""
    newest = next(iter(step_folders(run_dir.checkpoints)), None)
    return newest is not None and newest.name == folder_name(plan.recipe.train.steps)


def find_run(name: str, *, runs: Path) -> RunDir:
    """A run by the path of its folder, or by its name under `runs`. Raises UserError if there is none."""
    for path in (Path(name), runs / name):
        if (path / "plan.json").is_file():
            return RunDir(path.resolve())
    known = sorted(plan.parent.name for plan in runs.glob("*/plan.json"))[-5:]
    raise UserError(
        f"{name} is no run folder (it has no plan.json); the newest in {runs}: {', '.join(known) or 'none'}"
    )
