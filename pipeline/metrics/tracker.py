"""Where the numbers of a run go. Rank 0 writes them into the run folder, always and at once; a thread of it brings
them into MLflow if that is wanted.

The run folder is the truth. MLflow is a view of it: no step waits for it, no failure of it ends a run, and what it
missed is told once it answers again, or by `alst track sync`.
"""

import os
import threading
from collections.abc import Mapping
from typing import Any, Literal

from pipeline.metrics.console import warn as warn_on_console
from pipeline.metrics.meter import RunClock, StepRecord
from pipeline.metrics.mirror import Mirror
from pipeline.metrics.rows import JsonlWriter, Warn, read_events, read_steps
from pipeline.metrics.store import MlflowStore, mlflow_store, redact
from pipeline.plan.run_dir import RunDir
from pipeline.recipe.schema import TrackingRecipe

FIRST_RETRY_SECONDS, MOST_RETRY_SECONDS = 1.0, 60.0
FINISH_SECONDS = 60.0  # that a run waits at its end for MLflow to hear of it
STOPPED_SECONDS = 5.0  # if it stops because its node is wanted: others wait for it

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


class LiveMirror:
    """A mirror in a thread of its own. While MLflow fails it tries again, less and less often, and says so once."""

    def __init__(self, mirror: Mirror, *, warn: Warn) -> None:
        self._mirror, self._warn = mirror, warn
        self._news, self._closing, self._done, self._given_up = (threading.Event() for _ in range(4))
        self._is_failing = False
        self.store = mirror.store.told
        threading.Thread(target=self._work, name="mlflow", daemon=True).start()

    def wake(self) -> None:
        """There is something new in the run folder."""
        self._news.set()

    def finish(self, *, stopped: bool) -> bool:
        """Tell the rest. Whether all of it is there; for a server that does not answer nobody waits long. For one that
        takes uploads a run does that has not just `stopped`."""
        self._closing.set()
        self._news.set()
        self._done.wait(STOPPED_SECONDS if stopped else FINISH_SECONDS)
        while not stopped and not self._done.is_set() and self._mirror.is_uploading and not self._is_failing:
            self._done.wait(1.0)
        self._given_up.set()
        return self._done.is_set()

    def _work(self) -> None:
        pause = FIRST_RETRY_SECONDS
        while not self._given_up.is_set():
            self._news.wait()
            self._news.clear()
            is_last = self._closing.is_set()
            try:
                self._mirror.tell()
            except Exception as error:  # whatever MLflow raises: days of training are worth more than its view of them
                self._complain(error)
                (self._given_up if is_last else self._closing).wait(pause)
                pause = min(2 * pause, MOST_RETRY_SECONDS)
                self._news.set()
                continue
            self._is_failing, pause = False, FIRST_RETRY_SECONDS
            if is_last:
                self._mirror.close()
                self._done.set()
                return

    def _complain(self, error: Exception) -> None:
        """Once per outage. The first line of why: MLflow's messages run to pages and hold URLs."""
        if not self._is_failing:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
            self._warn(
                f"MLflow at {self._mirror.store.told}: {redact(reason)}; training goes on, and what is missing there "
                "is told when it answers"
            )
        self._is_failing = True


class Tracker:
    """The one place the train loop reports to; without writers (ranks other than 0) it does nothing."""

    def __init__(
        self,
        run_dir: RunDir,
        *,
        steps: JsonlWriter | None = None,
        events: JsonlWriter | None = None,
        clock: RunClock | None = None,
        live: LiveMirror | None = None,
        warn: Warn = warn_on_console,
    ) -> None:
        self.clock = clock or RunClock()
        self.store = None if live is None else live.store
        """Where MLflow hears of the run; None where it does not."""
        self._run_dir, self._steps, self._events, self._live, self._warn = run_dir, steps, events, live, warn

    def log_start(self, values: Mapping[str, Any]) -> None:
        """A start of the run: by which job, with which code."""
        self._log_event("start", values)

    def log_step(self, record: StepRecord) -> None:
        if self._steps is not None:
            self._steps.write(record.to_row())
        self._wake()

    def log_checkpoint(self, values: Mapping[str, Any]) -> None:
        """A checkpoint that is on disk: its name, where, how large, what it cost."""
        self._log_event("checkpoint", values)

    def log_end(self, status: RunStatus) -> None:
        """The end of this start of the run."""
        self._log_event("end", {"status": status})

    def close(self, *, stopped: bool = False) -> None:
        """The last that is done; when `stopped` to go on elsewhere, nothing that takes long is waited for."""
        for writer in (self._steps, self._events):
            if writer is not None:
                writer.close()
        if self._live is not None and not self._live.finish(stopped=stopped):
            self._warn(
                f"MLflow has not heard the end of this run; `alst track sync {self._run_dir.path.name}` tells it"
            )

    def _log_event(self, event: str, values: Mapping[str, Any]) -> None:
        if self._events is not None:
            self._events.write({"event": event, "time": self.clock.now(), **values})
        self._wake()

    def _wake(self) -> None:
        if self._live is not None:
            self._live.wake()


def open_tracker(
    run_dir: RunDir, tracking: TrackingRecipe, *, experiment: str, rank: int = 0, warn: Warn = warn_on_console
) -> Tracker:
    """The run folder's writers and, if it is wanted, its mirror; ranks other than 0 get an idle tracker.

    A store that cannot be written is a UserError; a server that does not answer is a warning, once.
    """
    if rank != 0:
        return Tracker(run_dir)
    store = live_store(tracking, run_dir, warn=warn)
    clock = RunClock(after=_last_time(run_dir))
    steps, events = JsonlWriter(run_dir.metrics, warn=warn), JsonlWriter(run_dir.events, warn=warn)
    mirror = (
        None if store is None else Mirror(run_dir, store, experiment=experiment, upload=tracking.upload_checkpoints)
    )
    live = None if mirror is None else LiveMirror(mirror, warn=warn)
    return Tracker(run_dir, steps=steps, events=events, clock=clock, live=live, warn=warn)


def live_store(tracking: TrackingRecipe, run_dir: RunDir, *, warn: Warn) -> MlflowStore | None:
    """Where a run is mirrored while it goes on; None where it is not.

    A job is not to write sqlite: its file would lie on a file system that nodes share, where sqlite loses data.
    """
    if not tracking.mlflow:
        return None
    is_server = tracking.uri is not None and not tracking.uri.startswith("sqlite:")
    if "SLURM_JOB_ID" in os.environ and not is_server:
        warn(f"no MLflow server is named; `alst track sync {run_dir.path.name}` brings this run into MLflow")
        return None
    return mlflow_store(tracking.uri, run_dir.root)


def _last_time(run_dir: RunDir) -> float:
    """The newest that earlier starts have told; before all time if there was none."""
    steps = read_steps(run_dir.metrics) if run_dir.metrics.is_file() else []
    return max((row["time"] for row in (*steps, *read_events(run_dir.events))), default=float("-inf"))
