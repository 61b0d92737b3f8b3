"""Whether there is time for another step, by the clock and by what steps and saves took."""

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist

from pipeline.errors import UserError
from pipeline.plan.queue import Queue, Request
from pipeline.plan.run_dir import RunDir
from pipeline.train.stopping import LEAVE_SECONDS, MARGIN, Stopping

CPU = torch.device("cpu")


class Job:
    """A rank of a job with a clock that is turned by hand, and an end."""

    def __init__(
        self,
        tmp_path,
        *,
        ends_at: float | None = None,
        saves: bool = True,
        before: tuple[float, ...] = (),
        costs: Sequence[float] = (),
        evaluates_every: int = 1000,
    ):
        self.now, self.asked, self.terminated, self.ends_at = 0.0, False, False, ends_at
        self.queue = Queue(
            asked_to_requeue=lambda: self.asked,
            seconds_left=lambda: None if self.ends_at is None else self.ends_at - self.now,
            terminated=lambda: self.terminated,
        )
        self.run_dir = RunDir(tmp_path)
        self.stopping = Stopping(
            self.queue, self.run_dir, saves=saves, save_seconds=lambda: 10.0, rank=0, clock=lambda: self.now,
            step_seconds=list(enumerate(before, start=1)), done=len(before),
            cost=lambda step: costs[step - 1] if costs else 1.0,
            evaluates=lambda step: step % evaluates_every == 0,
        )  # fmt: skip

    def steps(self, *seconds: float) -> list[Request]:
        found = []
        for one in seconds:
            self.stopping.before_step()
            self.now += one
            found.append(self.stopping.after_step())
        return found

    def evaluates(self, seconds: float) -> Request:
        self.now += seconds
        return self.stopping.after_evaluation(seconds, CPU)


@pytest.fixture(autouse=True, scope="module")
def _one_rank(tmp_path_factory):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('gloo')}/f", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_no_step_is_begun_that_could_not_end_with_a_save_before_the_job_does(tmp_path):
    job = Job(tmp_path, ends_at=1000.0)
    assert job.stopping.at_start(CPU) is Request.NOTHING
    # The first compiled for 200 s and counts no more once there is another: 4/3 of 100 + 10 s are needed after it.
    assert job.steps(200, 100, 100, 100, 100, 100, 100) == [Request.NOTHING] * 7
    assert 1000 - job.now > MARGIN * 110
    assert job.steps(100) == [Request.REQUEUE]


def test_the_longest_of_the_recent_steps_counts_and_what_follows_a_step_is_part_of_it(tmp_path):
    job = Job(tmp_path, ends_at=1000.0)
    job.stopping.at_start(CPU)
    job.steps(10, 10, 400, 10)
    assert job.stopping.needed_seconds == MARGIN * 410
    assert job.steps(100) == [Request.REQUEUE]


def test_a_step_whose_documents_cost_more_is_given_the_time_they_take(tmp_path):
    """The third costs four times the others, and after it comes one that costs half."""
    job = Job(tmp_path, ends_at=1000.0, costs=(1, 1, 4, 0.5, 1))
    job.stopping.at_start(CPU)
    job.steps(300)
    job.steps(100)
    assert job.stopping.needed_seconds == pytest.approx(MARGIN * (4 * 100 + 10))
    assert job.stopping.longest_seconds == 410
    assert job.steps(400) == [Request.REQUEUE]
    assert job.stopping.needed_seconds == pytest.approx(MARGIN * 410), "what was as long may be so again"
    job = Job(tmp_path, ends_at=600.0, costs=(1, 1, 4))
    job.stopping.at_start(CPU)
    assert job.steps(50, 100) == [Request.NOTHING, Request.REQUEUE], "450 s are left, 4/3 of 410 are needed"


def test_what_is_known_of_earlier_starts_is_compared_by_the_costs_of_their_own_steps(tmp_path):
    job = Job(tmp_path, ends_at=130.0, before=(100.0, 20.0), costs=(5, 1, 1))
    assert job.stopping.needed_seconds == pytest.approx(MARGIN * 110)
    job = Job(tmp_path, ends_at=130.0, before=(20.0,), costs=(1, 5))
    with pytest.raises(UserError, match="one and its save take 147 s, by those before"):
        job.stopping.at_start(CPU)


def test_without_an_end_or_without_checkpoints_steps_go_on(tmp_path):
    assert set(Job(tmp_path).steps(10, 10)) == {Request.NOTHING}
    assert set(Job(tmp_path, ends_at=25.0, saves=False).steps(10, 10)) == {Request.NOTHING}


def test_a_job_in_which_no_step_can_end_is_told_so_before_the_first(tmp_path):
    with pytest.raises(UserError, match=r"one and its save take 80 s, by those before; give the job more time"):
        Job(tmp_path, ends_at=70.0, before=(50.0,)).stopping.at_start(CPU)
    job = Job(tmp_path, ends_at=70.0, before=(50.0,))
    job.asked = job.terminated = True
    assert job.stopping.at_start(CPU) is Request.REQUEUE, "whoever has to go anyway is started again"


def test_a_signal_that_comes_before_the_first_step_waits_for_it(tmp_path):
    job = Job(tmp_path, ends_at=1000.0)
    job.asked = True
    assert job.stopping.at_start(CPU) is Request.NOTHING
    assert job.steps(10) == [Request.REQUEUE]


@pytest.mark.parametrize(
    ("signal", "files", "request_"),
    [
        (False, (), Request.NOTHING),
        (True, (), Request.REQUEUE),
        (False, ("save",), Request.SAVE),
        (True, ("save",), Request.REQUEUE),
        (True, ("save", "stop"), Request.STOP),
    ],
)
def test_of_several_requests_the_one_that_goes_furthest_is_done(tmp_path, signal, files, request_):
    job = Job(tmp_path)
    job.asked = job.terminated = signal
    for name in files:
        (tmp_path / name).touch()
    assert job.stopping.after_step() is request_
    assert job.stopping.at_start(CPU) is request_
    job.stopping.saved()
    assert not (tmp_path / "save").exists()


def test_after_sigterm_with_less_grace_than_the_step_needs_the_process_leaves_at_once(tmp_path):
    job = Job(tmp_path)
    job.stopping.at_start(CPU)
    job.steps(100, 100, 100)
    job.stopping.before_step()
    job.now += 40  # 60 of the step and 10 of its save are left
    assert not job.stopping.is_in_vain()
    job.terminated, job.ends_at = True, job.now + 71
    assert not job.stopping.is_in_vain()
    job.ends_at = job.now + 69
    assert job.stopping.is_in_vain()


def test_what_a_preempted_job_saves_between_two_steps_is_given_all_of_the_grace(tmp_path):
    job = Job(tmp_path)
    job.stopping.at_start(CPU)
    job.steps(100, 100)
    job.stopping.before_step()
    job.now += 90
    job.asked, job.terminated, job.ends_at = True, True, job.now + 40
    assert not job.stopping.is_in_vain()
    job.now += 10
    assert job.stopping.after_step() is Request.REQUEUE
    assert not job.stopping.is_in_vain(), "there is no next step, whose 100 s would not fit into 30"
    job.now = job.ends_at - LEAVE_SECONDS - 1
    assert not job.stopping.is_in_vain()
    job.now += 2
    assert job.stopping.is_in_vain()


def test_of_a_step_that_ended_before_the_signal_came_nobody_leaves_until_the_next_begins(tmp_path):
    job = Job(tmp_path)
    job.stopping.at_start(CPU)
    assert job.steps(100, 100) == [Request.NOTHING] * 2
    job.asked, job.terminated, job.ends_at = True, True, job.now + 30
    assert not job.stopping.is_in_vain(), "another rank may have heard of it in time"
    job.stopping.before_step()
    assert job.stopping.is_in_vain()


def test_shortly_before_the_end_every_process_leaves(tmp_path):
    job = Job(tmp_path, ends_at=1000.0)
    job.stopping.at_start(CPU)
    job.now = 1000 - LEAVE_SECONDS - 1
    assert not job.stopping.is_in_vain()
    job.now += 2
    assert job.stopping.is_in_vain()
    assert not job.stopping.got_on


def test_what_is_asked_for_during_an_evaluation_is_done_after_it(tmp_path):
    job = Job(tmp_path, evaluates_every=2)
    job.stopping.at_start(CPU)
    assert job.steps(10, 10) == [Request.NOTHING] * 2
    assert job.evaluates(30) is Request.NOTHING
    assert job.steps(10, 10) == [Request.NOTHING] * 2
    job.asked = True
    assert job.evaluates(30) is Request.REQUEUE


def test_an_evaluation_that_leaves_no_time_for_a_step_is_followed_by_the_end(tmp_path):
    job = Job(tmp_path, ends_at=1000.0, evaluates_every=2)
    job.stopping.at_start(CPU)
    assert job.steps(100, 100) == [Request.NOTHING] * 2
    assert job.evaluates(600) is Request.NOTHING, "200 s are left, 4/3 of 110 are needed"
    assert job.stopping.needed_seconds == MARGIN * 110, "an evaluation is no part of a step"
    job = Job(tmp_path, ends_at=940.0, evaluates_every=2)
    job.stopping.at_start(CPU)
    assert job.steps(100, 100) == [Request.NOTHING] * 2
    assert job.evaluates(600) is Request.REQUEUE


def test_no_evaluation_is_begun_that_could_not_end_with_a_step_and_a_save(tmp_path):
    job = Job(tmp_path, ends_at=1000.0, evaluates_every=2)
    job.stopping.at_start(CPU)
    job.steps(100, 100)
    job.evaluates(200)
    assert job.steps(100) == [Request.NOTHING], "500 s are left"
    assert job.steps(100) == [Request.REQUEUE], "400 s are left, 4/3 of 310 are needed"
