"""What a run folder says of a run, where no Slurm is needed to hear it."""

import json
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.launch.submit import SubmittedJob
from pipeline.launch.watch import first_failure, job_states, read_log, steps_done
from pipeline.plan.run_dir import RunDir

JOB = SubmittedJob("train", "7", 0.0)


@pytest.fixture
def run_dir(tmp_path) -> RunDir:
    run_dir = RunDir(tmp_path / "run")
    run_dir.slurm.mkdir(parents=True)
    run_dir.jobs.write_text(json.dumps({"jobs": [vars(JOB)]}))
    return run_dir


def start(run_dir: RunDir, restart: int, *failures: tuple[float, int, str]) -> Path:
    folder = run_dir.logs(job="train-7", restart=restart)
    folder.mkdir(parents=True)
    rows = [json.dumps({"time": time, "rank": rank, "error": error}) for time, rank, error in failures]
    if rows:
        (folder / "failures.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def srun_says(run_dir: RunDir, *lines: str) -> None:
    (run_dir.slurm / "7_0_log.err").write_text("\n".join(lines) + "\n")


def test_the_first_rank_to_fail_is_shown_whatever_order_they_are_written_in(run_dir):
    start(run_dir, 0, (5.0, 0, "connection closed by peer"), (4.0, 3, "no space left"))
    srun_says(run_dir, "srun: error: n2: task 3: Exited with exit code 1", "srun: error: n1: task 0: Killed")
    assert first_failure(run_dir, JOB).text == "rank 3: no space left"


def test_a_rank_that_a_signal_ended_said_nothing_so_srun_is_heard(run_dir):
    start(run_dir, 0, (5.0, 0, "connection closed by peer"))
    srun_says(run_dir, "srun: error: n2: task 3: Out Of Memory", "srun: error: n1: task 0: Exited with exit code 1")
    assert first_failure(run_dir, JOB).text == "n2: task 3: Out Of Memory"


def test_only_the_newest_start_is_asked(run_dir):
    start(run_dir, 0, (1.0, 2, "an old story"))
    newest = start(run_dir, 10, (9.0, 1, "loss is not finite"))
    start(run_dir, 9, (5.0, 0, "another old story"))
    srun_says(
        run_dir,
        "srun: error: n1: task 0: Killed",
        "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO JOB REQUEUE ***",
        "srun: error: n1: task 1: Exited with exit code 1",
    )
    failure = first_failure(run_dir, JOB)
    assert (failure.text, failure.source) == ("rank 1: loss is not finite", newest / "rank1.log")


def test_a_task_of_an_array_is_heard_as_well(run_dir):
    start(run_dir, 0)
    (run_dir.slurm / "7_0_0_log.err").write_text("submitit INFO\n")
    (run_dir.slurm / "7_3_0_log.err").write_text("srun: error: n1: task 0: Killed\n")
    failure = first_failure(run_dir, JOB)
    assert (failure.source.name, failure.text) == ("7_3_0_log.err", "n1: task 0: Killed")


def test_a_job_that_said_nothing_has_no_failure(run_dir):
    assert first_failure(run_dir, JOB) is None


def test_a_row_that_is_being_written_is_no_step_and_one_done_again_counts_once(run_dir):
    assert steps_done(run_dir) == []
    run_dir.metrics.write_text('{"step": 1}\n{"step": 2, "loss": 9}\n{"step": 2, "loss": 8}\n{"step": 3, "lo')
    assert steps_done(run_dir) == [{"step": 1}, {"step": 2, "loss": 8}]


def test_a_log_is_that_of_the_newest_start_and_an_absent_rank_is_told(run_dir):
    (start(run_dir, 0) / "rank0.log").write_text("old\n")
    newest = start(run_dir, 1)
    for rank in (0, 11, 2):
        (newest / f"rank{rank}.log").write_text("".join(f"{rank} line {number}\n" for number in range(100)))
    lines = "".join(read_log(run_dir, rank=2, follow=False)).splitlines(keepends=True)
    assert lines == [f"2 line {number}\n" for number in range(60, 100)]
    with pytest.raises(UserError, match=r"--rank 5: .* use one of \[0, 2, 11\]"):
        list(read_log(run_dir, rank=5, follow=False))


def test_a_run_that_was_never_submitted_and_a_machine_without_slurm_are_told(run_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="squeue: not on the PATH; ask on a login node"):
        job_states(run_dir)
    run_dir.jobs.unlink()
    with pytest.raises(UserError, match="was not submitted to Slurm"):
        job_states(run_dir)
