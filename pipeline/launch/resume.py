"""A run that goes on: its plan as it was, or with what may change between two starts."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import UserError
from pipeline.plan.checkpoint_dir import folder_name, step_folders
from pipeline.plan.job import JobPlan, plan_job, read_plan
from pipeline.plan.run_dir import RunDir
from pipeline.recipe.load import load

OF_THE_MOMENTS = ("optimizer.name", "optimizer.states_dtype", "optimizer.weight_decay_on")
"""What decides which moments there are, and how they are grouped. Rates and decay may change."""


def resumed_plan(run_dir: RunDir, overrides: Sequence[str] = ()) -> JobPlan:
    """The plan to go on with. Raises UserError if the folder holds no run, or if another model or data is asked for."""
    before = read_plan(run_dir.plan)
    if not overrides:
        return before
    recipe = load(str(run_dir.recipe), overrides=list(overrides))
    same_model = recipe.model == before.recipe.model
    plan = plan_job(recipe, shape=before.model if same_model else None)
    if plan.model != before.model:
        raise UserError(
            f"{run_dir.path}: its checkpoints are of another model; leave model.* as it was, or start a new run"
        )
    if (plan.packing_key, plan.sample_order) != (before.packing_key, before.sample_order):
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


def _value(plan: JobPlan, name: str) -> object:
    return getattr(plan.recipe.optimizer, name.removeprefix("optimizer."))


def check_unfinished(plan: JobPlan, run_dir: RunDir) -> None:
    """Raises UserError if the run has done all its steps."""
    newest = next(iter(step_folders(run_dir.checkpoints)), None)
    if newest is not None and newest.name == folder_name(plan.recipe.train.steps):
        raise UserError(
            f"{run_dir.path}: all {plan.recipe.train.steps} steps are done ({newest.name}); to train longer, say "
            f"train.steps=N with a larger N"
        )


def find_run(name: str, *, runs: Path) -> RunDir:
    """A run by the path of its folder, or by its name under `runs`. Raises UserError if there is none."""
    for path in (Path(name), runs / name):
        if (path / "plan.json").is_file():
            return RunDir(path.resolve())
    known = sorted(plan.parent.name for plan in runs.glob("*/plan.json"))[-5:]
    raise UserError(
        f"{name} is no run folder (it has no plan.json); the newest in {runs}: {', '.join(known) or 'none'}"
    )
