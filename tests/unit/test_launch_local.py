"""Processes of a run on this machine: started with what they need, and none left behind however they end."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import AlstError, RunError, UserError
from pipeline.launch import local
from pipeline.plan.job import JobPlan, plan_job
from pipeline.plan.run_dir import RunDir
from pipeline.recipe.load import load

REPOSITORY = Path(__file__).resolve().parents[2]

NOTE_WHO_RAN = """
import json, os, signal, subprocess, sys, time
rank = int(os.environ["RANK"])
stage = sys.argv[-1]
with open(os.path.join(os.environ["WHO_RAN"], f"{stage}-{rank}.json.new"), "w") as file:
    json.dump({"pid": os.getpid(), "arguments": sys.argv[1:], "environment": dict(os.environ)}, file)
os.rename(file.name, file.name.removesuffix(".new"))
def others_are_up(number):
    while sum(name.endswith(".json") for name in os.listdir(os.environ["WHO_RAN"])) < number:
        time.sleep(0.01)
"""


@pytest.fixture
def run_dir(tmp_path) -> RunDir:
    return RunDir(tmp_path / "run")


@pytest.fixture
def plan(tmp_path, monkeypatch) -> JobPlan:
    monkeypatch.setattr(local, "POLL_SECONDS", 0.01)
    monkeypatch.setenv("WHO_RAN", str(tmp_path / "who"))
    (tmp_path / "who").mkdir()
    return plan_job(load("tiny"))


@pytest.fixture
def ranks_do(tmp_path, monkeypatch) -> Callable[[str], None]:
    """Every rank runs `body` instead of a stage: the interpreter that ranks are started with is a script of ours."""

    def ranks_do(body: str) -> None:
        script = tmp_path / "stage.py"
        script.write_text(NOTE_WHO_RAN + textwrap.dedent(body))
        interpreter = tmp_path / "interpreter"
        interpreter.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{script}" "$@"\n')
        interpreter.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(interpreter))

    return ranks_do


def who_ran(tmp_path: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in (tmp_path / "who").glob("*.json")}


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def assert_none_is_left(tmp_path: Path, *, ranks: int) -> None:
    ran = who_ran(tmp_path)
    assert len(ran) == ranks
    assert [name for name, rank in ran.items() if is_alive(rank["pid"])] == []


def failure(plan: JobPlan, run_dir: RunDir, *, ranks: int) -> AlstError:
    with pytest.raises(AlstError) as caught:
        local.run_ranks(plan, run_dir, stage="train", ranks=ranks)
    return caught.value


def test_ranks_are_told_who_they_are_and_where_to_meet(plan, run_dir, ranks_do, tmp_path):
    ranks_do("")
    local.run_ranks(plan, run_dir, stage="train", ranks=3)
    ran = who_ran(tmp_path)
    assert sorted(ran) == ["train-0", "train-1", "train-2"]
    for number in range(3):
        environment = ran[f"train-{number}"]["environment"]
        assert (environment["RANK"], environment["LOCAL_RANK"], environment["WORLD_SIZE"]) == (str(number),) * 2 + (
            "3",
        )
        assert environment["MASTER_ADDR"] == "127.0.0.1"
        assert environment["CUDA_VISIBLE_DEVICES"] == ""
        assert ran[f"train-{number}"]["arguments"][-4:] == ["run", str(run_dir.plan), "--stage", "train"]
    assert len({rank["environment"]["MASTER_PORT"] for rank in ran.values()}) == 1


def test_ranks_share_the_cores(plan, run_dir, ranks_do, tmp_path):
    ranks_do("")
    cores = len(os.sched_getaffinity(0))
    local.run_ranks(plan, run_dir, stage="train", ranks=cores + 1)
    assert {rank["environment"]["OMP_NUM_THREADS"] for rank in who_ran(tmp_path).values()} == {"1"}
    local.run_ranks(plan, run_dir, stage="pack", ranks=1)
    assert who_ran(tmp_path)["pack-0"]["environment"]["OMP_NUM_THREADS"] == str(cores)


def test_packing_is_one_process_and_ends_before_training_starts(plan, run_dir, ranks_do, tmp_path):
    ranks_do("""
        if stage == "train":
            assert os.path.exists(os.path.join(os.environ["WHO_RAN"], "packed"))
        else:
            time.sleep(0.2)
            open(os.path.join(os.environ["WHO_RAN"], "packed"), "w").close()
    """)
    local.run_local(plan, run_dir)
    assert sorted(who_ran(tmp_path)) == ["pack-0", "train-0", "train-1"]


def test_training_is_not_started_when_packing_fails(plan, run_dir, ranks_do, tmp_path):
    ranks_do("sys.exit(1)")
    with pytest.raises(RunError, match="pack: rank 0 ended with exit code 1"):
        local.run_local(plan, run_dir)
    assert sorted(who_ran(tmp_path)) == ["pack-0"]


def test_several_nodes_are_refused_before_a_process_starts(run_dir, ranks_do, tmp_path, monkeypatch):
    ranks_do("")
    with pytest.raises(UserError, match=r"hardware.nodes = 2: this machine is one node; set hardware.nodes=1"):
        local.run_local(plan_job(load("tiny", overrides=["hardware.nodes=2"])), run_dir)
    assert not run_dir.path.exists()


def test_every_rank_has_its_log_and_the_first_is_heard_as_well(plan, run_dir, ranks_do, capsys):
    ranks_do("""
        print(f"hello from {rank}", flush=True)
        print(f"trouble of {rank}", file=sys.stderr, flush=True)
        sys.stdout.buffer.write(b"no UTF-8: \\xff\\n")
    """)
    local.run_ranks(plan, run_dir, stage="train", ranks=2)
    logs = run_dir.logs(job="local-train")
    for number in range(2):
        content = (logs / f"rank{number}.log").read_bytes()
        assert content == f"hello from {number}\ntrouble of {number}\n".encode() + b"no UTF-8: \xff\n"
    heard = capsys.readouterr().out
    assert "hello from 0\ntrouble of 0\nno UTF-8: \ufffd\n" in heard
    assert "hello from 1" not in heard


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_rank_that_fails_is_named_with_its_code_and_the_end_of_its_log_and_the_others_are_ended(
    plan, run_dir, ranks_do, tmp_path, failing
):
    ranks_do(f"""
        for line in range(100):
            print(f"rank {{rank}} line {{line}}")
        sys.stdout.flush()
        if rank == {failing}:
            others_are_up(3)
            print("out of luck", file=sys.stderr)
            sys.exit(3)
        time.sleep(600)
    """)
    error = failure(plan, run_dir, ranks=3)
    assert isinstance(error, RunError)
    assert error.exit_code == 1
    message = str(error)
    assert message.startswith(f"train: rank {failing} ended with exit code 3; the other ranks were ended")
    assert str(run_dir.logs(job="local-train") / f"rank{failing}.log") in message
    assert message.splitlines()[-2:] == [f"  | rank {failing} line 99", "  | out of luck"]
    assert f"rank {failing} line 1\n" not in message, "the whole log instead of its end"
    assert len(message.splitlines()) == 1 + local.TAIL_LINES
    assert_none_is_left(tmp_path, ranks=3)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT], ids=lambda n: n.name)
def test_a_rank_ended_by_a_signal_is_told_with_the_name_of_the_signal(plan, run_dir, ranks_do, tmp_path, number):
    ranks_do(f"""
        import resource
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if rank == 1:
            others_are_up(2)
            os.kill(os.getpid(), {int(number)})
        time.sleep(600)
    """)
    error = failure(plan, run_dir, ranks=2)
    assert isinstance(error, RunError)
    assert f"rank 1 was ended by {number.name}" in str(error)
    assert_none_is_left(tmp_path, ranks=2)


def test_a_signal_without_a_name_is_told_by_its_number(plan, run_dir, ranks_do):
    ranks_do(f"os.kill(os.getpid(), {signal.SIGRTMIN + 2})")
    assert f"{signal.SIGRTMIN + 2}" in str(failure(plan, run_dir, ranks=1)).splitlines()[0]


def test_a_rank_that_ignores_the_polite_signal_is_ended_all_the_same(plan, run_dir, ranks_do, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "GRACE_SECONDS", 0.3)
    ranks_do("""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        open(os.path.join(os.environ["WHO_RAN"], f"deaf-{rank}"), "w").close()
        if rank == 1:
            while not os.path.exists(os.path.join(os.environ["WHO_RAN"], "deaf-0")):
                time.sleep(0.01)
            sys.exit(1)
        time.sleep(600)
    """)
    started = time.monotonic()
    assert "rank 1 ended with exit code 1" in str(failure(plan, run_dir, ranks=2))
    assert time.monotonic() - started < 10
    assert_none_is_left(tmp_path, ranks=2)


def test_a_rank_has_time_to_say_its_last_words(plan, run_dir, ranks_do):
    ranks_do("""
        def leave(*_):
            print("closing", flush=True)
            sys.exit(0)
        signal.signal(signal.SIGTERM, leave)
        open(os.path.join(os.environ["WHO_RAN"], f"ready-{rank}"), "w").close()
        if rank == 0:
            while not os.path.exists(os.path.join(os.environ["WHO_RAN"], "ready-1")):
                time.sleep(0.01)
            sys.exit(1)
        time.sleep(600)
    """)
    failure(plan, run_dir, ranks=2)
    assert (run_dir.logs(job="local-train") / "rank1.log").read_text() == "closing\n"


def test_a_user_error_of_a_rank_is_a_user_error_of_the_command(plan, run_dir, ranks_do, tmp_path):
    ranks_do("""
        if rank == 0:
            print("alst: data.seq_len = 5: too short; use 8", file=sys.stderr)
            sys.exit(2)
        time.sleep(600)
    """)
    error = failure(plan, run_dir, ranks=2)
    assert isinstance(error, UserError)
    assert "rank0.log" in str(error)


def test_a_user_error_of_a_rank_that_was_not_heard_is_told_in_full(plan, run_dir, ranks_do):
    ranks_do("""
        if rank == 1:
            print("alst: data.seq_len = 5: too short; use 8", file=sys.stderr)
            sys.exit(2)
        time.sleep(600)
    """)
    error = failure(plan, run_dir, ranks=2)
    assert isinstance(error, UserError)
    assert "data.seq_len = 5: too short; use 8" in str(error)


def test_an_interrupt_leaves_no_process(plan, run_dir, ranks_do, tmp_path, monkeypatch):
    def interrupted(_: object) -> None:
        deadline = time.monotonic() + 20
        while len(who_ran(tmp_path)) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        raise KeyboardInterrupt

    ranks_do("time.sleep(600)")
    monkeypatch.setattr(local, "_first_to_fail", interrupted)
    with pytest.raises(KeyboardInterrupt):
        local.run_ranks(plan, run_dir, stage="train", ranks=2)
    assert_none_is_left(tmp_path, ranks=2)


def test_the_command_ended_by_sigterm_leaves_no_process(plan, ranks_do, tmp_path):
    """As `timeout`, a job step or a service manager ends it: ranks that go on would hold the GPUs for days."""
    real_interpreter = sys.executable
    ranks_do("""
        if stage == "pack":
            sys.exit(0)
        time.sleep(60)
    """)
    command = f"import sys; sys.executable = {sys.executable!r}; from pipeline import cli; cli.main()"
    environment = os.environ | {"ALST_RUNS": str(tmp_path / "runs"), "PYTHONPATH": str(REPOSITORY)}
    parent = subprocess.Popen(
        [real_interpreter, "-c", command, "train", "tiny"], env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 20
        while len(who_ran(tmp_path)) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        parent.terminate()
        parent.wait(timeout=20)
        assert_none_is_left(tmp_path, ranks=3)
    finally:
        parent.kill()
        for rank in who_ran(tmp_path).values():
            if is_alive(rank["pid"]):
                os.kill(rank["pid"], signal.SIGKILL)
