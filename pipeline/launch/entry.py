"""What a process of a job runs: one stage of a plan. The same for a local rank and for a task of a job."""

import os
import sys
from pathlib import Path
from typing import Literal, NoReturn

from pipeline.errors import AlstError
from pipeline.plan.job import read_plan
from pipeline.plan.run_dir import RunDir, packed_dir

Stage = Literal["pack", "train"]


def run_stage(plan_path: Path, stage: Stage) -> None:
    """Run one stage here. Raises AlstError when it fails."""
    plan = read_plan(plan_path)
    match stage:
        case "pack":
            from pipeline.data.console import console_progress
            from pipeline.data.pack import pack

            with console_progress() as progress:
                pack(plan.recipe, packed_dir(plan), progress=progress)
        case "train":
            _train(plan_path)


def _train(plan_path: Path) -> NoReturn:
    """One rank's training. The process ends here: gloo and DeepSpeed abort in about one orderly exit of eight."""
    from pipeline.train.main import run

    code = 0
    try:
        run(read_plan(plan_path), RunDir(plan_path.resolve().parent))
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
