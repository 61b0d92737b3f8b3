"""A signal is noted once, and the batch script, whose exit code stays that of its tasks, requeues."""

import os
import subprocess
import sys

import pytest

from pipeline.launch.stop import requeue_lines
from pipeline.plan.run_dir import RunDir

TWICE = """
import os, signal
from pipeline.launch import stop
stop.listen()
assert not stop.asked()
os.kill(os.getpid(), signal.SIGUSR2)
os.kill(os.getpid(), signal.SIGUSR2)
assert stop.asked()
"""


def test_a_signal_that_comes_twice_is_told_once():
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "asked to stop by SIGUSR2: after this step, if checkpoints are saved\n"


@pytest.mark.parametrize(("mark", "code", "asked"), [(True, 0, "requeue 7\n"), (False, 0, ""), (False, 3, "")])
def test_a_job_that_left_a_mark_is_requeued_and_a_failure_stays_one(tmp_path, mark, code, asked):
    run_dir = RunDir(tmp_path / "a run, ID")
    run_dir.slurm.mkdir(parents=True)
    if mark:
        run_dir.requeue_mark("7").touch()
    text = "\n".join([f"scontrol() {{ echo $@; }}; (exit {code})", "", "# teardown", *requeue_lines(run_dir)])
    done = subprocess.run(
        ["bash", "-c", text], env=os.environ | {"SLURM_JOB_ID": "7"}, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.returncode) == (asked, code)
    assert not run_dir.requeue_mark("7").exists()
