"""What goes wrong in a real run, with real processes and real disks: nothing is lost but the unfinished step, the
message says what happened, and the next start goes on by itself to the very losses of a run that was left in peace."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.metrics.rows import read_steps
from pipeline.plan.checkpoint_dir import RECORD_NAME, damage, read_checkpoint, step_folders
from tests.disks import small_disk_at

LAUNCH_SECONDS = 600  # about 15 on two free cores
STEPS = 4
RECIPE = f"""
base: {Path(__file__).parents[2] / "configs" / "tiny.yaml"}
name: faults
model: {{config: {{vocab_size: 300}}}}
data:
  sources: [{{type: text, path: "python:stdlib", glob: "json/*.py", max_document_tokens: 700}}]
  tokenizer: {{vocab_size: 300, sample_mib: 1}}
  seq_len: 1024
memory: {{tiled_loss: {{tile_tokens: 100}}, tiled_mlp: {{tile_tokens: 300}}}}
train: {{steps: {STEPS}, grad_accumulation: 2, self_check: null}}
checkpoint: {{every_steps: 1, keep_last: 2}}
tracking: {{mlflow: false}}
"""

pytestmark = pytest.mark.timeout(4 * LAUNCH_SECONDS)


def alst(*arguments: str, runs: Path, fault: str = "", code: int = 0) -> str:
    """What the command printed; it must end with `code`."""
    process = start(*arguments, runs=runs, fault=fault)
    try:
        printed, _ = process.communicate(timeout=LAUNCH_SECONDS)
    finally:
        process.kill()
    assert process.returncode == code, printed[-4000:]
    return printed


def start(*arguments: str, runs: Path, fault: str = "") -> subprocess.Popen[str]:
    python_path = [str(Path(__file__).parent / "faults"), str(Path(__file__).parents[2])]
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", *arguments],
        env=os.environ | {"ALST_RUNS": str(runs), "ALST_TEST_FAULT": fault, "PYTHONPATH": os.pathsep.join(python_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_steps(run / "metrics.jsonl")]


def only_run(runs: Path) -> Path:
    (run,) = (path for path in runs.glob("faults-*"))
    return run


def copy_of(run: Path, runs: Path) -> Path:
    """A run that may be spoilt, with the packed data beside it."""
    shutil.copytree(run.parent / "packed", runs / "packed")
    return shutil.copytree(run, runs / run.name)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("recipe") / "faults.yaml"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture(scope="module")
def peaceful(tmp_path_factory, recipe) -> Path:
    """The run folder of a run that was left in peace."""
    runs = tmp_path_factory.mktemp("peaceful")
    alst("train", recipe, runs=runs)
    run = only_run(runs)
    assert len(set(losses(run))) == STEPS
    return run


@pytest.fixture
def runs(tmp_path, peaceful) -> Path:
    """A folder of runs with the packed data there already."""
    shutil.copytree(peaceful.parent / "packed", tmp_path / "runs" / "packed")
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("fault", "last_good"),
    [
        ("between 1 3", 2),
        ("forward 0 3", 2),
        ("save 1 3", 2),  # a file of rank 1 is half written
        ("name 0 3", 2),  # all is written, and the folder has no name yet
    ],
)
def test_a_rank_killed_with_9_costs_the_unfinished_step(runs, recipe, peaceful, fault, last_good):
    printed = alst("train", recipe, runs=runs, fault=fault, code=1)
    assert f"rank {fault.split()[1]} was ended by SIGKILL" in printed
    run = only_run(runs)
    # The save of the step before may still have been under way when the rank died.
    assert read_checkpoint(step_folders(run / "checkpoints")[0]).record.step in (last_good - 1, last_good)
    printed = alst("resume", run.name, runs=runs)
    assert "resumed from step-00000" in printed
    assert losses(run) == losses(peaceful)
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_off(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize(
    ("name", "spoil", "told"),
    [
        ("deepspeed/*optim_states.pt", flip_a_bit, "its checksum differs"),
        ("deepspeed/*model_states.pt", cut_off, "bytes, not"),
        (RECORD_NAME, cut_off, "is damaged"),
    ],
)
def test_from_a_damaged_checkpoint_the_one_before_is_taken_loudly(tmp_path, peaceful, name, spoil, told):
    run = copy_of(peaceful, tmp_path)
    newest = step_folders(run / "checkpoints")[0]
    spoil(sorted(newest.glob(name))[-1])
    printed = alst("resume", str(run), f"train.steps={STEPS + 1}", "schedule.name=constant", runs=tmp_path)
    assert f"checkpoint {newest.name} is damaged" in printed
    assert told in printed
    assert f"resumed from step-{STEPS - 1:06d}" in printed
    assert (run / "checkpoints" / f"damaged-{newest.name}").is_dir()
    assert losses(run)[: STEPS - 1] == losses(peaceful)[: STEPS - 1]
    assert losses(run)[STEPS - 1] == losses(peaceful)[STEPS - 1]  # done again


def test_while_a_run_goes_on_a_second_job_is_refused_and_an_export_is_not(tmp_path, peaceful):
    run = copy_of(peaceful, tmp_path)
    first = start("resume", str(run), f"train.steps={STEPS + 60}", runs=tmp_path)
    try:
        deadline = time.monotonic() + LAUNCH_SECONDS
        while len(losses(run)) <= STEPS:
            assert time.monotonic() < deadline and first.poll() is None, "the first job does not train"
            time.sleep(0.2)
        printed = alst("resume", str(run), f"train.steps={STEPS + 61}", runs=tmp_path, code=2)
        assert "another job trains into this run folder (process " in printed
        assert json.loads((run / "plan.json").read_text())["recipe"]["train"]["steps"] == STEPS + 60
        out = tmp_path / "out"
        assert "from_pretrained" in alst("export", run.name, str(out), runs=tmp_path)
        assert first.poll() is None, "the first job was left in peace"
        text = "import json"
        tokens = AutoTokenizer.from_pretrained(out)(text, return_tensors="pt").input_ids
        assert AutoModelForCausalLM.from_pretrained(out)(tokens).logits.shape == (1, tokens.shape[1], 300)
    finally:
        first.terminate()
        first.wait(60)


@pytest.fixture
def small_disk(tmp_path):
    """Room for the run and a few checkpoints."""
    with small_disk_at(tmp_path / "disk", mib=64) as folder:
        yield folder


def test_a_disk_that_fills_up_during_a_save_costs_that_save_alone(small_disk, recipe, peaceful):
    shutil.copytree(peaceful.parent / "packed", small_disk / "packed")
    printed = alst("train", recipe, runs=small_disk, fault="full 1 2")
    run = only_run(small_disk)
    assert "checkpoint of step 2 was given up: rank 1: " in printed, printed
    assert losses(run) == losses(peaceful)
    kept = [read_checkpoint(path) for path in step_folders(run / "checkpoints")]
    assert kept[0].record.step == STEPS
    assert [checkpoint.record.step for checkpoint in kept if damage(checkpoint, checksums=True)] == []


SHORT_OF_THE_SAVE = ("train.stall_seconds=8", "checkpoint.keep_last=4")
"""Collectives give up after 16 s then, and a slow save lasts 30."""


@pytest.mark.parametrize("asynchronous", [True, pytest.param(False, marks=pytest.mark.full)])
def test_a_save_that_outlasts_the_patience_is_no_stall_while_it_gets_on(runs, recipe, peaceful, asynchronous):
    how = f"checkpoint.asynchronous={str(asynchronous).lower()}"
    printed = alst("train", recipe, *SHORT_OF_THE_SAVE, how, runs=runs, fault="slow 1 2")
    run = only_run(runs)
    assert losses(run) == losses(peaceful), printed
    saved = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (slow,) = [event for event in saved if event.get("name") == "step-000002"]
    assert slow["seconds"] > 30, "it was slow"
    assert (slow["stall_seconds"] > 30) is not asynchronous
    assert [path.name for path in step_folders(run / "checkpoints")] == [f"step-{step:06d}" for step in (4, 3, 2, 1)]


def test_a_save_in_which_the_disk_does_not_answer_is_a_stall(runs, recipe):
    printed = alst("train", recipe, *SHORT_OF_THE_SAVE, runs=runs, fault="hangs 1 2", code=1)
    assert "stalled: no rank got on for" in printed
    assert ", save, " in printed, "what the ranks stand at"


SHORT_OF_THE_START = "train.stall_seconds=10"
"""Four times that is a stall before the first step has ended, where nothing is read; a start that reads lasts 60."""


def test_a_rank_that_hangs_before_the_first_step_is_named(runs, recipe):
    printed = alst("train", recipe, SHORT_OF_THE_START, runs=runs, fault="attaches-hanging 1 0", code=1)
    assert re.search(
        r"no rank got on for \d+ s; rank 1 \(process \d+ on \S+\) stands at step 0, loading the m", printed
    )


def test_a_start_that_outlasts_the_patience_is_no_stall_while_it_reads(runs, recipe, peaceful):
    alst("train", recipe, SHORT_OF_THE_START, runs=runs, fault="loads-slowly 1 0")
    assert losses(only_run(runs)) == losses(peaceful)


def test_a_checkpoint_is_not_begun_where_there_is_no_room_for_it(small_disk, recipe, peaceful):
    shutil.copytree(peaceful.parent / "packed", small_disk / "packed")
    size = json.loads((step_folders(peaceful / "checkpoints")[0] / RECORD_NAME).read_text())
    free = shutil.disk_usage(small_disk).free
    code = sum(512 * path.stat().st_blocks for path in (peaceful / "code").rglob("*"))
    ballast = small_disk / "ballast-of-another"
    ballast.write_bytes(bytes(free - code // 2))
    assert "the code cannot be copied there" in alst("train", recipe, runs=small_disk, code=1)
    shutil.rmtree(only_run(small_disk))
    ballast.write_bytes(bytes(free - code - sum(file["size_bytes"] for file in size["files"])))
    printed = alst("train", recipe, runs=small_disk, code=1)
    assert "bytes free, a checkpoint needs" in printed
    assert "the last checkpoint is not on disk" in printed
    run = only_run(small_disk)
    assert losses(run) == losses(peaceful)
    ballast.unlink()
    alst("resume", run.name, runs=small_disk)
    assert losses(run) == losses(peaceful)
    assert [path.name for path in step_folders(run / "checkpoints")] == ["step-000004", "step-000003"]
