"""After each step: go on, save, or end. What one rank knows of it; the ranks agree in the step's own collective."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pipeline.errors import UserError
from pipeline.plan.queue import Queue, Request
from pipeline.plan.run_dir import RunDir

RECENT_STEPS = 20
LEAVE_SECONDS = 10.0
"""Before it is killed a process leaves by itself, so that the batch script has time to put the job into the queue."""

MARGIN = 4 / 3
"""On what the next step is foreseen to take, with a save."""


@dataclass(frozen=True)
class _Step:
    """One that has ended."""

    seconds: float
    cost: float


class Stopping:
    """The questions of one rank to the queue, to the run folder and to the clock."""

    def __init__(
        self,
        queue: Queue,
        run_dir: RunDir,
        *,
        saves: bool,
        save_seconds: Callable[[], float],
        step_seconds: Sequence[tuple[int, float]] = (),
        done: int = 0,
        cost: Callable[[int], float] = lambda step: 1.0,
        evaluates: Callable[[int], bool] = lambda step: False,
        rank: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`save_seconds` tells what a save takes, `step_seconds` what steps, by number, took before this start, which
        goes on after `done` of them, `cost` what a step costs beside others, by its documents, and `evaluates`
        whether an evaluation follows it; without checkpoints, `saves`, no end is worth more than another."""
        self._queue = queue
        self._run_dir = run_dir
        self._saves = saves
        self._save_seconds = save_seconds
        self._recent = deque([_Step(seconds, cost(step)) for step, seconds in step_seconds], maxlen=RECENT_STEPS)
        self._rank = rank
        self._clock = clock
        self._done = done
        self._cost = cost
        self._evaluates = evaluates
        self._evaluation_seconds = 0.0
        """Of the last one."""
        self._is_to_evaluate = False
        """Before the next step."""
        self._steps = 0
        self._first: _Step | None = None
        self.cost = cost(done + 1)
        """Of the step under way, or of the next one between two steps."""
        self._began: float | None = None
        """The step under way, with whatever followed the one before."""
        self._is_under_way = False
        """Between two steps the ranks agree, evaluate and save; whether there is another step is not known yet."""

    @property
    def needed_seconds(self) -> float | None:
        """Of the next step and a save, with an evaluation that comes first; None before there was a step."""
        if not self._foreseen:
            return None
        evaluation = self._evaluation_seconds if self._is_to_evaluate else 0.0
        return MARGIN * (evaluation + self._foreseen + self._save_seconds())

    @property
    def _foreseen(self) -> float:
        """Seconds of the step under way, or of the next one: the longest of the recent steps, each made longer by as
        much as this one's documents cost more. The first of a start, which also compiles, only where there is no other.
        """
        known = self._recent or ([self._first] if self._first else [])
        return max((step.seconds * max(1.0, self.cost / step.cost) for step in tuple(known)), default=0.0)

    def at_start(self, device: torch.device) -> Request:
        """Before the first step, agreed. Raises UserError, on every rank, if no step can end before the job does.

        USR2 alone waits for that step: it may come early, and every start is to get further than the one before.
        """
        short, asked = self._is_short(), self._asked()
        if asked is Request.REQUEUE and not self._queue.terminated():
            asked = Request.NOTHING
        mine = torch.tensor([asked, short], dtype=torch.float64, device=device)
        dist.all_reduce(mine, op=dist.ReduceOp.MAX)
        if mine[1] and mine[0] < Request.REQUEUE:
            needed = f"{self.needed_seconds:,.0f} s" if short else "longer"
            raise UserError(
                f"no step can end before this job does: one and its save take {needed}, by those before; give the job "
                "more time (train.time in the cluster's profile), then `alst resume`"
            )
        self._began = self._clock()
        return Request(int(mine[0]))

    def before_step(self) -> None:
        """There is another step, and it begins."""
        self._is_under_way = True

    def after_step(self) -> Request:
        """What this rank asks for, once at the end of each step."""
        now = self._clock()
        if self._began is not None and self._steps == 0:
            self._first = _Step(now - self._began, self.cost)
        elif self._began is not None:
            self._recent.append(_Step(now - self._began, self.cost))
        self._began = now
        self._is_under_way = False
        self._steps += 1
        self.cost = self._cost(self._done + self._steps + 1)
        self._is_to_evaluate = self._evaluates(self._done + self._steps)
        return self._wanted()

    def after_evaluation(self, seconds: float, device: torch.device) -> Request:
        """What any rank asks for when an evaluation, which took so long, has ended. Collective."""
        self._evaluation_seconds, self._is_to_evaluate = seconds, False
        if self._began is not None:
            self._began += seconds
        wanted = torch.tensor([self._wanted()], dtype=torch.float64, device=device)
        dist.all_reduce(wanted, op=dist.ReduceOp.MAX)
        return Request(int(wanted[0]))

    def saved(self) -> None:
        """What the switch file `save` asked for is done."""
        if self._rank == 0:
            with suppress(OSError):  # a disk that is full, or read-only for a while: then it is saved once more
                self._run_dir.save_switch.unlink(missing_ok=True)

    def is_in_vain(self) -> bool:
        """Whether the step under way, or the save after it, cannot end before this process is killed. Asked from a
        thread."""
        left = self._queue.seconds_left()
        if left is None or self._began is None or not (self._saves or self._queue.terminated()):
            return False
        if left < LEAVE_SECONDS:
            return True
        if not self._is_under_way or not self._queue.terminated():
            return False
        remaining = self._foreseen - (self._clock() - self._began)
        return left < remaining + self._save_seconds()

    @property
    def longest_seconds(self) -> float | None:
        """That the step under way may take with a save, by recent ones; None for the first of this start, which is
        longer than others."""
        return self._foreseen + self._save_seconds() if self.got_on else None

    @property
    def got_on(self) -> bool:
        """A step has ended since this start, so that another start gets further."""
        return self._steps > 0

    def _wanted(self) -> Request:
        return max(self._asked(), Request.REQUEUE if self._is_short() else Request.NOTHING)

    def _asked(self) -> Request:
        found = Request.REQUEUE if self._saves and self._queue.asked_to_requeue() else Request.NOTHING
        if self._rank == 0:
            if self._run_dir.stop_switch.exists():
                return Request.STOP
            if self._run_dir.save_switch.exists():
                return max(found, Request.SAVE)
        return found

    def _is_short(self) -> bool:
        left, needed = self._queue.seconds_left(), self.needed_seconds
        return self._saves and left is not None and needed is not None and left < needed
