"""The demo itself, whole: real text and packing, two real ranks under DeepSpeed, real MLflow; then with a rank killed.

One run is made and looked at from every side; the second reuses its packed data.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

DEMO_SECONDS = 1500  # about 200 on two free cores
STEPS = 20


@dataclass(frozen=True)
class Demo:
    """A finished demo: its folder of runs, its run folder, what it printed."""

    runs: Path
    run: Path
    printed: str

    @property
    def rows(self) -> list[dict]:
        return [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]

    @property
    def plan(self) -> dict:
        return json.loads((self.run / "plan.json").read_text())


def alst(*arguments: str, runs: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", *arguments],
        env=os.environ | {"ALST_RUNS": str(runs)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Demo:
    runs = tmp_path_factory.mktemp("demo") / "runs"
    process = alst("train", "tiny", runs=runs)
    try:
        printed, _ = process.communicate(timeout=DEMO_SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0, printed[-4000:]
    (run,) = runs.glob("tiny-*")
    return Demo(runs, run, printed)


pytestmark = pytest.mark.timeout(DEMO_SECONDS + 300)


def test_the_loss_falls_clearly(demo):
    losses = [row["loss"] for row in demo.rows]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.5


def test_the_first_step_is_the_one_that_was_checked_against_the_stock_model_at_sp_1(demo):
    numbers = re.search(
        r"self-check on 32,768 tokens: loss (\S+) at sp=2, (\S+) at sp=1 \(stock\); gradient norm (\S+) and (\S+):",
        demo.printed,
    )
    assert numbers, demo.printed[:3000]
    loss, stock_loss, norm, stock_norm = (float(number) for number in numbers.groups())
    assert loss == pytest.approx(stock_loss, rel=1e-4)
    assert norm == pytest.approx(stock_norm, rel=1e-4)
    assert demo.rows[0]["loss"] == pytest.approx(stock_loss, rel=1e-4)
    assert demo.rows[0]["grad_norm"] == pytest.approx(stock_norm, rel=1e-4)


def test_every_step_is_told_on_the_console_and_the_end_sums_up(demo):
    assert len(re.findall(r"^step +\d+/20  loss +\d", demo.printed, flags=re.M)) == STEPS
    for word in (
        "tok/s",
        "peak RSS per process: rank 0",
        "measured at the peak",
        "  tiled_loss ",
        "samples",
        "MLflow",
        "make demo-million",
    ):
        assert word in demo.printed


def test_the_held_out_loss_falls_and_is_told_and_recorded(demo):
    found = {row["step"]: row["eval_loss"] for row in demo.rows if row["eval_loss"] is not None}
    assert list(found) == [5, 10, 15, 20]
    assert found[20] < found[5] - 0.2
    assert len(re.findall(r"^step .*held-out loss \d", demo.printed, flags=re.M)) == len(found)
    assert f"{found[5]:.3f} -> {found[20]:.3f}" in demo.printed
    assert not any(row["loss_spike"] for row in demo.rows)


def test_the_run_folder_holds_all_that_is_needed_to_understand_the_run(demo):
    expected = (
        "recipe.yaml",
        "plan.json",
        "commit.txt",
        "code/pipeline/cli.py",
        "code/configs/tiny.yaml",
        "training.png",
        "report.html",
    )
    for name in (
        *expected,
        "logs/local-pack/0/rank0.log",
        "logs/local-train/0/rank0.log",
        "logs/local-train/0/rank1.log",
    ):
        assert (demo.run / name).is_file(), name


def test_the_features_of_alst_are_on_and_layer_inputs_really_wait_in_the_store(demo):
    plan = demo.plan
    assert (plan["sp"], plan["dp"], plan["recipe"]["zero"]["stage"]) == (2, 1, 3)
    assert plan["num_loss_tiles"] > 1
    assert plan["num_mlp_tiles"] > 1
    assert plan["recipe"]["memory"]["activation_checkpoint"]["offload"] == "cpu"
    layers, hidden = plan["model"]["num_layers"], plan["model"]["hidden_size"]
    assert demo.rows[-1]["offloaded_bytes"] == layers * plan["local_seq_len"] * hidden * 4


def test_every_step_says_where_its_time_went_and_how_well_each_place_is_known(demo):
    for row in demo.rows:
        parts = ("data", "forward", "backward", "offload_stall", "communication", "optimizer")
        assert 0.5 * row["step_seconds"] < sum(row[f"{part}_seconds"] for part in parts) <= row["step_seconds"]
        assert row["communication_seconds"] > 0 and row["offload_stall_seconds"] > 0
        for kind in ("loss_by_position", "loss_by_document_length"):
            found = [value for name, value in row.items() if name.startswith(f"{kind}/")]
            assert len(found) == 8, "0, 256, …, 16384"
            losses = [loss for loss in found if loss is not None]
            assert min(losses) - 1e-6 < row["loss"] < max(losses) + 1e-6, "their mean, weighted by tokens"
    last = demo.rows[-1]
    assert last["consumed_samples"] == STEPS
    assert last["consumed_tokens"] == sum(row["tokens"] for row in demo.rows)
    assert last["consumed_documents"] > STEPS
    assert last["loss_by_position/00008192"] is None, "no document is longer"


def test_mlflow_holds_parameters_metrics_and_artifacts_of_the_run(demo):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{demo.runs / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id], max_results=10)
    assert (run.info.run_name, run.info.status) == (demo.run.name, "FINISHED")
    assert run.data.params["recipe.data.seq_len"] == "32768"
    assert run.data.params["sp"] == "2"
    for name in ("loss", "eval_loss"):
        history = client.get_metric_history(run.info.run_id, name)
        points = [point.value for point in sorted(history, key=lambda point: point.step)]
        assert points == [row[name] for row in demo.rows if row[name] is not None]
    files = {item.path for item in client.list_artifacts(run.info.run_id)}
    described = {"environment.json", "packing.json", "packing.png"}
    assert files == {"recipe.yaml", "plan.json", "training.png", "report.html", "checkpoints"} | described
    saved = {item.path for item in client.list_artifacts(run.info.run_id, "checkpoints")}
    assert saved == {"checkpoints/step-000010.json", "checkpoints/step-000020.json"}


def test_the_packed_data_opens_as_a_hugging_face_data_set(demo):
    from datasets import load_from_disk

    from pipeline.data.inspect import describe

    (packed,) = (demo.runs / "packed").iterdir()
    description = describe(packed)
    rows = load_from_disk(str(packed))
    assert description["checksums_ok"]
    assert description["tokens_dropped"] == 0
    assert len(rows) == description["samples"] > STEPS
    assert len(rows[0]["input_ids"]) == 32768
    assert len(rows[0]["cu_seqlens"]) > 2


def test_a_killed_rank_takes_the_job_down_and_is_named_and_nothing_is_left_running(demo):
    process = alst("train", "tiny", "train.self_check=null", "tracking.mlflow=false", runs=demo.runs)
    try:
        run = wait_for(lambda: next(iter(set(demo.runs.glob("tiny-*")) - {demo.run}), None))
        wait_for(lambda: (run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").stat().st_size > 0)
        first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
        (victim,) = [pid for pid, rank in ranks_of(run).items() if rank == "1"]
        os.kill(victim, signal.SIGKILL)
        printed, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "rank 1 was ended by SIGKILL" in printed
    assert "Traceback" not in printed.split("alst:")[-1]
    assert not ranks_of(run)
    # Same data, same seed: the same first step, to the last bit.
    assert first["loss"] == demo.rows[0]["loss"]


def wait_for(condition, *, seconds: float = 300):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.2)
    raise AssertionError("waited in vain")


def ranks_of(run: Path) -> dict[int, str]:
    """{pid: rank} of the living processes of a run."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(run / "plan.json").encode() in command and b"train" in command.split(b"\0"):
            found[int(folder.name)] = next(v[5:].decode() for v in environment if v.startswith(b"RANK="))
    return found
