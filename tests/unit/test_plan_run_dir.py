"""One job at a time trains into a run folder."""

import subprocess
import sys

import pytest

from pipeline.errors import UserError
from pipeline.plan import run_dir as module
from pipeline.plan.run_dir import RunDir

HOLDS = """
import sys
from pathlib import Path
from pipeline.plan.run_dir import RunDir
RunDir(Path(sys.argv[1])).hold()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path):
    """A run folder, and the process that holds it until its input ends."""
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        yield RunDir(tmp_path), holder
        holder.kill()


def test_a_second_job_is_refused_at_once_and_told_who_is_there(held, monkeypatch):
    run_dir, holder = held
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.setattr(module.time, "sleep", lambda _: pytest.fail("it waits"))
    with pytest.raises(UserError, match=rf"another job trains into this run folder \(process {holder.pid} on "):
        run_dir.hold()


def test_a_job_that_was_started_again_waits_until_the_lock_of_its_failed_node_is_given_back(held, monkeypatch):
    run_dir, holder = held
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(module.time, "sleep", lambda _: (holder.kill(), holder.wait()))
    run_dir.hold()
    assert f"process {module.os.getpid()} on " in run_dir.lock.read_text()
