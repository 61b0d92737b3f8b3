"""A signal is noted once and at once, and the batch script decides what becomes of the job.

Slurm's commands are shell functions here, which answer what a case needs; tests/cluster runs the real ones.
"""

import os
import signal
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

ASKED = """
import os, sys, time
from pipeline.launch import deadline, stop
stop.listen()
for number in sys.argv[1:]:
    os.kill(os.getpid(), int(number))
    time.sleep(0.1)
print(deadline.seconds_left())
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

LEAVES = """
import sys
from pathlib import Path
from pipeline.launch import entry
from pipeline.plan.run_dir import RunDir
entry._leave(RunDir(Path(sys.argv[1])), "stalled", True)
"""

SLURM = """
sleep() {{ :; }}
silent() {{ [ "{state}" = SILENT ]; }}
squeue() {{ case "$*" in *%e*) echo 2026-01-01T00:00:00 ;; *) if silent; then return 1; fi; echo {state} ;; esac; }}
sacctmgr() {{ case "$*" in *"show qos low format=GraceTime") echo {qos_grace} ;; esac; }}
scontrol() {{
    case "$*" in
    requeue*) echo "scontrol $*"; if silent && [ ! -e asked ]; then touch asked; return 1; fi ;;
    "show partition"*) echo "   MaxTime=UNLIMITED GraceTime={partition_grace} Hidden=NO" ;;
    "show config")
        printf '%s\\n' "KillWait                = 30 sec" "PreemptType             = {preempt_type}" \\
            "SlurmctldParameters     = {controller}" ;;
    "show job"*)
        printf '   %s\\n' StartTime=2026-01-01T00:00:00 PreemptTime={preempted} "ReqNodeList=(null) ExcNodeList=n9" ;;
    "show node n4"*) echo "NodeName=n4 State=DOWN+DRAIN BootTime=2020-01-01T00:00:00" ;;
    "show node r"*) echo "NodeName=$3 State=IDLE+POWERED_DOWN BootTime=2100-01-01T00:00:00" ;;
    "show node n2"*) echo "NodeName=n2 State=DOWN* BootTime=2020-01-01T00:00:00 Reason=x" ;;
    "show node"*) echo "NodeName=n1 State=IDLE BootTime=2020-01-01T00:00:00 Reason=it was DOWN*" ;;
    "show hostnames"*) echo "$3" | tr , "\\n" ;;
    *) echo "scontrol $*" ;;
    esac
}}
"""


CLUSTER = {
    "state": "RUNNING", "preempted": "None", "preempt_type": "preempt/partition_prio",
    "partition_grace": "15", "qos_grace": "00:00:00", "controller": "(null)",
}  # fmt: skip


def run_job(run_dir: RunDir, tasks: str, *, requeues: int = 2, **said):
    """The code, the words and the commands of a script whose tasks are `tasks`; what Slurm `said`, and variables."""
    env = {name: value for name, value in said.items() if name not in CLUSTER}
    text = f"""{SLURM.format(**CLUSTER | {name: value for name, value in said.items() if name in CLUSTER})}
source {ROOT / JOB_SHELL}
before_tasks "{run_dir.path}" {requeues}
({tasks})
after_tasks "$?"
"""
    variables = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_PARTITION": "p",
        "SLURM_JOB_QOS": "low",
        "SLURM_JOB_NODELIST": "n1,n3",
        "TZ": "UTC",
    } | env
    errors = run_dir.path / "err"
    with errors.open("a") as file:
        done = subprocess.run(
            ["bash", "-c", text],
            cwd=run_dir.path,
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            check=False,
        )
    return done.returncode, errors.read_text(), done.stdout.splitlines()


def mark(run_dir: RunDir, why: str) -> str:
    return f"echo {why} > '{run_dir.requeue_mark('7')}'"


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
def test_a_job_that_left_a_mark_is_requeued_and_a_failure_stays_one(run_dir, why, code, asked):
    run_dir.requeue_mark("7").write_text("of a start that Slurm ended")
    assert run_job(run_dir, f"{mark(run_dir, why) if why else ':'}; exit {code}")[::2] == (code, asked)
    assert not run_dir.requeue_mark("7").exists()
    assert run_dir.requeues.exists() is (why is not None)
    if why is not None:
        assert run_dir.requeues.read_text().endswith(" job 7: told so\n")


def test_the_first_who_leaves_says_why(run_dir, monkeypatch):
    """Slurm ends the others then; they take that for a preemption."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for why in ("stalled", stop.PREEMPTED):
        stop.leave_mark(run_dir, why)
    assert run_dir.requeue_mark("7").read_text() == "stalled\n"


def test_a_task_that_preemption_ended_unheard_comes_back(run_dir):
    """One of packing: it leaves no mark."""
    later = "2026-01-01T00:00:09"
    assert run_job(run_dir, "exit 143", preempted=later)[::2] == (143, ["scontrol requeue 7"])
    assert run_job(run_dir, "exit 0", preempted=later)[::2] == (0, [])


def test_a_controller_that_does_not_answer_is_asked_again(run_dir):
    code, _, asked = run_job(run_dir, mark(run_dir, "stalled"), state="SILENT")
    assert (code, asked) == (0, ["scontrol requeue 7"] * 2)


def test_a_job_that_gets_no_further_is_given_up_and_one_that_was_preempted_is_not(run_dir):
    def again(why: str) -> tuple[bool, str]:
        code, errors, asked = run_job(run_dir, mark(run_dir, why), requeues=100, preempted="2026-02-01T00:00:00")
        assert code == (0 if asked else 1)
        return bool(asked), errors

    assert [again("stalled")[0] for _ in range(4)] == [True, True, True, False]
    assert "alst: stalled; this job was started again 3 times, and no checkpoint is newer than step-0" in again("x")[1]
    assert "job.sh: line" not in (run_dir.path / "err").read_text()
    assert again(stop.PREEMPTED)[0]
    assert again("stalled")[0], "the last three are not all its own"
    run_dir.requeues.unlink()
    for step in range(8, 12):
        (run_dir.checkpoints / f"step-{step:08}").mkdir(parents=True)
        assert again("stalled")[0], "it got on"
    assert run_dir.requeues.read_text().splitlines()[0].endswith(" step-00000008 job 7: stalled")


def test_a_launch_that_failed_is_requeued_and_one_of_an_earlier_start_is_not_meant(run_dir):
    failed = "echo 'srun: error: Application launch failed: Zero Bytes were transmitted or received' >&2; exit 1"
    code, _, asked = run_job(run_dir, failed, SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="3")
    assert (code, asked) == (1, ["scontrol requeue 5_3"]), "of an array, that task alone"
    assert run_job(run_dir, "exit 1")[::2] == (1, [])


def test_requeues_end_at_their_number_with_the_reason_and_the_remedy(run_dir):
    assert run_job(run_dir, mark(run_dir, "slow"), SLURM_RESTART_COUNT="1")[::2] == (0, ["scontrol requeue 7"])
    code, errors, asked = run_job(run_dir, mark(run_dir, "slow"), SLURM_RESTART_COUNT="2")
    assert (code, asked) == (1, [])
    assert "alst: slow; requeues = 2 in the cluster's profile, and this job was started again 2 times" in errors
    assert "raise it there, and go on with `alst resume a run, ID`" in errors


@pytest.mark.parametrize(
    ("state", "preempted", "why", "asked"),
    [
        ("COMPLETING", "None", "asked to stop by SIGUSR2", False),
        ("RUNNING", "None", stop.PREEMPTED, False),
        ("RUNNING", "2026-01-01T00:00:00", stop.PREEMPTED, True),
        ("RUNNING", "2025-12-31T00:00:00", stop.PREEMPTED, False),  # an earlier start was
    ],
)
def test_a_job_that_was_cancelled_or_failed_does_not_come_back(run_dir, state, preempted, why, asked):
    code, _, commands = run_job(run_dir, f"{mark(run_dir, why)}; exit 75", state=state, preempted=preempted)
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


def test_a_node_that_failed_is_avoided_by_a_job_that_never_ran_on_it(run_dir):
    """The next of a chain was submitted before."""
    run_dir.exclude("n3", "failed under job 6")
    assert run_job(run_dir, "exit 0")[2] == ["scontrol requeue 7", "scontrol update JobId=7 ExcNodeList=n9,n3"]


@pytest.mark.parametrize(
    ("nodes", "excluded"),
    [
        ("r1,r2,n1", []),  # maintenance: most have started anew
        ("r1,n1", []),
        ("r1,n1,n3", ["r1"]),
        ("n2,n4,n1", []),  # a switch, or power
        ("n2,n1,n3,n5,n4", ["n2", "n4"]),
        ("n4", ["n4"]),
    ],
)
def test_nodes_that_fail_together_are_not_excluded(run_dir, nodes, excluded):
    run_job(run_dir, "kill -9 $$", SLURM_JOB_NODELIST=nodes)
    run_job(run_dir, "exit 0", SLURM_RESTART_COUNT="1", SLURM_JOB_NODELIST="n7")
    assert run_dir.excluded_nodes() == excluded


@pytest.mark.parametrize(("nodes", "unfit", "comes_back"), [("n1,n3", "n1", True), ("n1,n3,n5", "n1 n3", False)])
def test_nodes_that_are_unfit_together_are_not_excluded_and_the_job_fails(run_dir, nodes, unfit, comes_back):
    run_dir.exclude("n8", "failed under job 6")
    gate = f"for n in {unfit}; do echo $n now full >> '{run_dir.excluded}'; done; {mark(run_dir, 'unfit')}; exit 75"
    code, errors, commands = run_job(run_dir, gate, SLURM_JOB_NODELIST=nodes)
    assert (code, bool(commands)) == ((75, True) if comes_back else (1, False))
    assert run_dir.excluded_nodes() == ["n8", *(unfit.split() if comes_back else [])]
    assert ("alst: unfit; 2 nodes of this start are not fit" in errors) is not comes_back


def test_a_process_that_leaves_marks_it_though_a_full_disk_takes_none_of_its_words(run_dir):
    (run_dir.path / "failures.jsonl").symlink_to("/dev/full")
    variables = {"SLURM_JOB_ID": "7", "ALST_LOGS": str(run_dir.path), "RANK": "0"}
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-c", LEAVES, str(run_dir.path)]
        left = subprocess.run(command, env=os.environ | variables, stderr=full, timeout=60, check=False)
    assert left.returncode == stop.LEFT
    assert run_dir.requeue_mark("7").read_text() == "stalled\n"


def test_a_mark_whose_words_a_full_disk_did_not_take_is_one(run_dir):
    assert run_job(run_dir, f": > '{run_dir.requeue_mark('7')}'")[::2] == (0, ["scontrol requeue 7"])
    assert run_dir.requeues.read_text().endswith(": its last words were lost, the disk may be full\n")


def test_tasks_are_told_until_when_they_may_run(run_dir):
    ask = 'echo "$ALST_JOB_END $ALST_GRACE_SECONDS $ALST_KILL_SECONDS"'
    assert run_job(run_dir, ask)[::2] == (0, ["1767225600 15 15"])
    by_its_own_signal = run_job(run_dir, ask, controller="idle_on_node_suspend,preempt_send_user_signal")
    assert by_its_own_signal[::2] == (0, ["1767225600 15 30"])


@pytest.mark.parametrize(
    ("signals", "seconds"),
    [
        ([signal.SIGUSR2], None),
        ([signal.SIGTERM], 300),
        ([signal.SIGUSR2, signal.SIGTERM], 30),  # the grace began with the first
        ([signal.SIGTERM, signal.SIGUSR2], 300),
    ],
)
def test_a_process_knows_when_slurm_will_kill_it(signals, seconds):
    variables = {"ALST_GRACE_SECONDS": "300", "ALST_KILL_SECONDS": "30", "ALST_JOB_END": ""}
    command = [sys.executable, "-c", ASKED, *(str(int(number)) for number in signals)]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=60, check=True)
    left = done.stdout.splitlines()[-1]
    assert left == "None" if seconds is None else seconds - 25 < float(left) <= seconds


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ({}, 15),
        ({"partition_grace": "0"}, 30),
        ({"preempt_type": "preempt/qos", "qos_grace": "00:02:05"}, 125),
        ({"preempt_type": "preempt/qos", "qos_grace": "1-00:00:10"}, 86410),
        ({"preempt_type": "preempt/qos"}, 30),
        ({"preempt_type": "preempt/qos", "qos_grace": ""}, 30),  # the accounting does not answer
        ({"preempt_type": "preempt/none", "partition_grace": "0"}, 30),
    ],
)
def test_the_grace_is_that_of_whoever_preempts_here_or_else_killwait(run_dir, said, seconds):
    assert run_job(run_dir, 'echo "$ALST_GRACE_SECONDS"', **said)[2] == [str(seconds)]


def test_the_jobs_own_signal_means_a_preemption_where_slurm_says_so(run_dir):
    why = mark(run_dir, "asked to stop by SIGUSR2")
    assert run_job(run_dir, why, preempted="2026-02-01T00:00:00")[2] == ["scontrol requeue 7"]
    assert run_dir.requeues.read_text().endswith(": preempted\n")
    run_job(run_dir, why)
    assert run_dir.requeues.read_text().endswith(": asked to stop by SIGUSR2\n")
