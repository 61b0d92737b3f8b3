"""What a process of a job runs: one stage of a plan. The same for a local rank and for a task of a job."""

import os
import sys
from pathlib import Path
from typing import Literal, NoReturn

from pipeline.errors import AlstError
from pipeline.plan.job import JobPlan, read_plan
from pipeline.plan.run_dir import RunDir

Stage = Literal["pack", "tokenize", "plan", "write", "finish", "train"]


def run_stage(plan_path: Path, stage: Stage, *, task: str = "0/1") -> None:
    """Run one stage here, or task I of N of it. Raises AlstError when it fails."""
    plan, run_dir = read_plan(plan_path), RunDir(plan_path.resolve().parent)
    if stage == "train":
        _train(plan, run_dir)
    run_pack(plan, run_dir.packed(plan), stage="all" if stage == "pack" else stage, task=task)


def run_pack(plan: JobPlan, output: Path, *, stage: str = "all", task: str = "0/1") -> bool:
    """Run a stage of packing, or task I of N of it; whether the data set is complete. Raises AlstError if it fails."""
    from pipeline.data.console import console_progress
    from pipeline.data.pack import pack, task_of

    with console_progress() as progress:
        manifest = pack(
            plan.recipe,
            output,
            stage=stage,
            task=task_of(task),
            vocab_size=plan.model.vocab_size,
            progress=progress,
        )
    return manifest is not None


def _train(plan: JobPlan, run_dir: RunDir) -> NoReturn:
    """One rank's training. The process ends here: gloo and DeepSpeed abort in about one orderly exit of eight."""
    from pipeline.train.main import run

    code = 0
    try:
        run(plan, run_dir)
    except AlstError as error:
        print(f"alst: {error}", file=sys.stderr)
        code = error.exit_code
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
