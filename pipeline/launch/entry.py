"""What a process of a job runs: one stage of a plan. The same for a local rank and for a task of a job."""

import os
import sys
from pathlib import Path
from typing import Literal, NoReturn

from pipeline.errors import AlstError
from pipeline.plan.job import JobPlan, read_plan
from pipeline.plan.run_dir import RunDir

Stage = Literal["pack", "train"]


def run_stage(plan_path: Path, stage: Stage) -> None:
    """Run one stage here. Raises AlstError when it fails."""
    plan = read_plan(plan_path)
    run_dir = RunDir(plan_path.resolve().parent)
    match stage:
        case "pack":
            from pipeline.data.console import console_progress
            from pipeline.data.pack import pack

            with console_progress() as progress:
                pack(plan.recipe, run_dir.packed(plan), progress=progress)
        case "train":
            _train(plan, run_dir)


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
