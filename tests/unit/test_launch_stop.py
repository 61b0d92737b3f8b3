"""A signal is noted once and at once, and the batch script decides what becomes of the job.

Slurm's commands are shell functions here, which answer what a case needs; tests/cluster runs the real ones.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.launch import stop
from pipeline.launch.jobs import JOB_SHELL
from pipeline.plan.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[2]

TWICE = """
import os, signal
from pipeline.launch import stop
stop.listen()
assert not stop.asked()
os.kill(os.getpid(), signal.SIGUSR2)
os.kill(os.getpid(), signal.SIGUSR2)
assert stop.asked()
assert stop.terminated_at() is None
"""

WHILE_PYTHON_DOES_NOT_RUN = """
import ctypes, os, signal, threading
from pipeline.launch import stop
stop.listen()
mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
threading.Timer(1.0, lambda: os._exit(0 if stop.terminated_at() is not None else 1)).start()
lock(mutex), lock(mutex)  # in C for ever, as when it waits for a GPU: no signal wakes it
"""

SLURM = """
squeue() {{ case "$*" in *%e*) echo 2026-01-01T00:00:00 ;; *) echo {state} ;; esac; }}
scontrol() {{
    case "$*" in
    "show partition"*) echo "   MaxTime=UNLIMITED GraceTime=15 Hidden=NO" ;;
    "show job"*) echo "   PreemptTime={preempted}"; echo "   ReqNodeList=(null) ExcNodeList=n9" ;;
    "show node n2"*) echo "NodeName=n2 State=DOWN* BootTime=2020-01-01T00:00:00 Reason=x" ;;
    "show node"*) echo "NodeName=n1 State=IDLE BootTime=2020-01-01T00:00:00 Reason=it was DOWN*" ;;
    "show hostnames"*) echo "$3" | tr , "\\n" ;;
    *) echo "scontrol $*" ;;
    esac
}}
"""


def run_job(run_dir: RunDir, tasks: str, *, requeues: int = 2, state: str = "RUNNING", preempted: str = "None", **env):
    """The code, the words and the commands of a batch script whose tasks are `tasks`."""
    text = f"""{SLURM.format(state=state, preempted=preempted)}
source {ROOT / JOB_SHELL}
before_tasks "{run_dir.path}" {requeues}
({tasks})
after_tasks "$?"
"""
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_PARTITION": "p", "SLURM_JOB_NODELIST": "n1,n3", "TZ": "UTC"} | env
    errors = run_dir.path / "err"
    with errors.open("a") as file:
        done = subprocess.run(
            ["bash", "-c", text],
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            check=False,
        )
    return done.returncode, errors.read_text(), done.stdout.splitlines()


@pytest.fixture
def run_dir(tmp_path) -> RunDir:
    run_dir = RunDir(tmp_path / "a run, ID")
    run_dir.slurm.mkdir(parents=True)
    return run_dir


def test_a_signal_that_comes_twice_is_told_once():
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "asked to stop by SIGUSR2: after this step, if checkpoints are saved\n"


def test_a_signal_is_noted_while_the_main_thread_does_not_run_python():
    subprocess.run([sys.executable, "-c", WHILE_PYTHON_DOES_NOT_RUN], timeout=60, check=True)


@pytest.mark.parametrize(
    ("why", "code", "asked"), [("told so", 0, ["scontrol requeue 7"]), (None, 0, []), (None, 3, [])]
)
def test_a_job_that_left_a_mark_is_requeued_and_a_failure_stays_one(run_dir, monkeypatch, why, code, asked):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    if why is not None:
        stop.leave_mark(run_dir, why)
    assert run_job(run_dir, f"exit {code}")[::2] == (code, asked)
    assert not run_dir.requeue_mark("7").exists()
    assert run_dir.requeues.exists() is (why is not None)
    if why is not None:
        assert run_dir.requeues.read_text().endswith(" job 7: told so\n")


def test_a_launch_that_failed_is_requeued_and_one_of_an_earlier_start_is_not_meant(run_dir):
    failed = "echo 'srun: error: Application launch failed: Zero Bytes were transmitted or received' >&2; exit 1"
    code, _, asked = run_job(run_dir, failed, SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="3")
    assert (code, asked) == (1, ["scontrol requeue 5_3"]), "of an array, that task alone"
    assert run_job(run_dir, "exit 1")[::2] == (1, [])


def test_requeues_end_at_their_number_with_the_reason_and_the_remedy(run_dir):
    mark = f"echo slow > '{run_dir.requeue_mark('7')}'"
    assert run_job(run_dir, mark, SLURM_RESTART_COUNT="1")[::2] == (0, ["scontrol requeue 7"])
    code, errors, asked = run_job(run_dir, mark, SLURM_RESTART_COUNT="2")
    assert (code, asked) == (1, [])
    assert "alst: slow; requeues = 2 in the cluster's profile, and this job was started again 2 times" in errors
    assert "raise it there, and go on with `alst resume a run, ID`" in errors


@pytest.mark.parametrize(
    ("state", "preempted", "why", "asked"),
    [
        ("COMPLETING", "None", "asked to stop by SIGUSR2", False),
        ("RUNNING", "None", stop.PREEMPTED, False),
        ("RUNNING", "2026-01-01T00:00:00", stop.PREEMPTED, True),
    ],
)
def test_a_job_that_was_cancelled_or_failed_does_not_come_back(run_dir, state, preempted, why, asked):
    mark = f"echo {why} > '{run_dir.requeue_mark('7')}'; exit 75"
    code, _, commands = run_job(run_dir, mark, state=state, preempted=preempted)
    assert (code, bool(commands)) == (75, asked)


def test_a_node_that_failed_is_not_used_again(run_dir):
    """Slurm ended the start before; one of its nodes is down now."""
    run_job(run_dir, "kill -9 $$", SLURM_JOB_NODELIST="n1,n2")
    code, _, commands = run_job(run_dir, "exit 0", SLURM_RESTART_COUNT="1")
    assert (code, commands) == (0, []), "this start has other nodes"
    assert run_dir.excluded_nodes() == ["n2"]
    run_job(run_dir, "kill -9 $$")
    code, _, commands = run_job(run_dir, "exit 0", SLURM_RESTART_COUNT="1", SLURM_JOB_NODELIST="n1,n2")
    assert commands == ["scontrol requeue 7", "scontrol update JobId=7 ExcNodeList=n9,n2"]


def test_a_node_that_srun_lost_is_not_used_again_though_it_is_back(run_dir):
    run_job(run_dir, "echo 'srun: error: Node failure on n1' >&2; kill -9 $$")
    code, _, commands = run_job(run_dir, "exit 0", SLURM_RESTART_COUNT="1")
    assert (code, commands) == (1, ["scontrol requeue 7", "scontrol update JobId=7 ExcNodeList=n9,n1"])
    assert run_dir.excluded_nodes() == ["n1"]
    assert run_job(run_dir, "exit 0", SLURM_JOB_NODELIST="n3")[::2] == (0, [])


def test_tasks_are_told_until_when_they_may_run(run_dir):
    code, _, told = run_job(run_dir, 'echo "$ALST_JOB_END $ALST_GRACE_SECONDS"')
    assert (code, told) == (0, ["1767225600 15"])
