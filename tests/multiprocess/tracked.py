"""Rank 0 of a run as far as its tracker sees it: steps and ends when it is told to, on its standard input.

A worker of `test_tracking`: `python -m tests.multiprocess.tracked FOLDER URL`. After each line it says how it went.
"""

import os
import sys
from pathlib import Path

from pipeline.metrics import tracker as tracking
from pipeline.metrics.meter import StepRecord
from pipeline.plan.job import read_plan
from pipeline.plan.run_dir import RunDir

WAIT_AT_THE_END = "WAIT_AT_THE_END"
START = {"host": "n1", "commit": "abc", "image_digest": None, "world_size": 1, "after_step": 0}


def record(step: int, now: float) -> StepRecord:
    values = dict.fromkeys(StepRecord.__dataclass_fields__, 0)
    maps: dict = {"loss_by_position": {}, "loss_by_document_length": {}, "system": {}}
    return StepRecord(**values | maps | {"step": step, "loss": 10.0 - step, "time": now})


def main(folder: str, url: str) -> None:
    run_dir = RunDir(Path(folder))
    asked = read_plan(run_dir.plan).recipe.tracking.model_copy(update={"uri": url})
    tracking.FINISH_SECONDS = float(os.environ[WAIT_AT_THE_END])
    tracker = tracking.open_tracker(run_dir, asked, experiment="tiny")
    tracker.log_start({"job": str(os.getpid()), **START})
    print("started", flush=True)
    for line in sys.stdin:
        command, argument = line.split()
        if command == "step":
            tracker.log_step(record(int(argument), tracker.clock.now()))
        else:
            tracker.log_end(argument)
            tracker.close()
        print(command, flush=True)
        if command == "end":
            os._exit(0)  # as a rank ends


if __name__ == "__main__":
    main(*sys.argv[1:])
