"""`alst bench` itself, on real ranks and tiny shapes: this project beside the baselines, which must be honest ones.

One bench is made and looked at from every side: it is what CI runs of the bench.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from pipeline.bench.corpus import make_corpus
from pipeline.data.batch import batch_of
from pipeline.data.packed_dataset import PackedDataset
from pipeline.metrics.rows import read_steps
from pipeline.model.build import build_model
from pipeline.plan.job import read_plan
from pipeline.plan.run_dir import RunDir
from pipeline.recipe.load import load

BENCH_SECONDS = 900  # about 60 on two free cores
TOKENS = 1024

pytestmark = pytest.mark.timeout(BENCH_SECONDS + 300)


@dataclass(frozen=True)
class Benched:
    """A finished bench: its folder, what it printed, what was asked of it."""

    folder: Path
    printed: str
    arguments: tuple[str, ...]

    @property
    def results(self) -> dict:
        return json.loads((self.folder / "results.json").read_text())

    def run(self, key: str) -> RunDir:
        (found,) = (self.folder / "runs").glob(f"{key}-2*")
        return RunDir(found)


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.cli", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=BENCH_SECONDS, check=False)


@pytest.fixture(scope="module")
def benched(tmp_path_factory) -> Benched:
    root = tmp_path_factory.mktemp("bench")
    make_corpus(root / "corpus", tokens=65536, glob="asyncio/*.py")
    # Under ZeRO-3 random weights depend on how they are partitioned; those of a folder do not.
    build_model(load("tiny").model, attention="eager", seed=0).save_pretrained(root / "weights")
    weights = f"model={{init: pretrained, name_or_path: '{root / 'weights'}'}}"
    arguments = ("tiny", weights, f"--lengths={TOKENS}", "--rungs=baseline,offload", "--engines=alst,reference,plain")
    arguments += ("--steps=1", f"--data={root / 'corpus'}", f"--output={root / 'out'}")
    done = bench(*arguments)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return Benched(root / "out", done.stdout, arguments)


KEYS = [
    f"{name}-{TOKENS}-2l-r1"
    for name in ("alst-baseline", "reference-baseline", "plain-baseline", "alst-offload", "reference-offload")
]


def test_every_case_is_a_row_that_ended_well_and_is_measured(benched):
    results = benched.results
    assert [row["key"] for row in results["rows"]] == KEYS
    assert results["ended"] == "finished"
    for row in results["rows"]:
        assert row["outcome"] == "ok", row["detail"]
        found = row["measured"]
        assert found["tokens_per_second_per_gpu"] > 0
        assert 0 < found["forward_seconds"] + found["backward_seconds"] < found["step_seconds"]
        assert found["peak_host_rss_bytes"] > 2**27
        assert found["peak_device_bytes"] is None
        assert row["plan"]["seq_len"] == TOKENS


def test_features_are_really_on_in_the_runs(benched):
    by_key = {row["key"]: row for row in benched.results["rows"]}
    assert by_key[KEYS[0]]["measured"]["offloaded_bytes"] == 0
    plan = by_key[KEYS[3]]["plan"]
    layers, hidden = plan["model"]["num_layers"], plan["model"]["hidden_size"]
    assert by_key[KEYS[3]]["measured"]["offloaded_bytes"] == layers * plan["local_seq_len"] * hidden * 4


@pytest.fixture(scope="module")
def stock(benched) -> tuple[float, float]:
    """(loss, gradient norm) of the stock model on the sample that all trained on, as one document."""
    run = benched.run(KEYS[0])
    plan = read_plan(run.plan)
    batch = batch_of(PackedDataset.open(run.packed(plan)), 0, cross_document_attention=True)
    model = AutoModelForCausalLM.from_pretrained(benched.folder.parent / "weights", attn_implementation="eager")
    logits = model(input_ids=batch.input_ids, use_cache=False).logits[0]
    loss = F.cross_entropy(logits, batch.labels[0], ignore_index=-100)
    loss.backward()
    norms = torch.stack([parameter.grad.norm() for parameter in model.parameters()])
    return float(loss.detach()), float(norms.norm())


@pytest.mark.parametrize("key", KEYS)
def test_loss_and_gradient_norm_of_every_engine_are_the_stock_models_on_one_document(benched, stock, key):
    loss, norm = stock
    first = read_steps(benched.run(key).metrics)[0]
    assert first["loss"] == pytest.approx(loss, rel=1e-5)
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_the_reference_shares_each_sequence_as_the_product_does_and_plain_does_not(benched):
    sp = {row["key"]: row["plan"]["sp"] for row in benched.results["rows"]}
    assert [sp[key] for key in KEYS] == [2, 2, 1, 2, 2]


def test_the_page_has_ratios_conditions_and_plots(benched):
    page = (benched.folder / "results.md").read_text()
    assert page in benched.printed
    for told in ("## Against reference", "same features: offload", "best against best", "## Against plain", "commit"):
        assert told in page
    for plot in ("memory.png", "speed.png"):
        assert (benched.folder / plot).read_bytes().startswith(b"\x89PNG")


def test_resumed_with_nothing_left_it_runs_nothing(benched):
    done = bench(*benched.arguments, "--resume", "--minutes=0.5")
    assert done.returncode == 0, done.stderr
    assert "5 rows are there already" in done.stdout
    assert "…" not in done.stdout


def test_a_bench_that_is_there_is_not_overwritten(benched):
    done = bench(*benched.arguments)
    assert done.returncode == 2
    assert "go on with --resume, or name another --output" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_that_does_not_end_in_time_is_a_row_and_leaves_nothing_running(benched, tmp_path):
    arguments = ("tiny", "--lengths=16K", "--rungs=baseline", "--steps=100", "--timeout=12")
    done = bench(*arguments, f"--data={benched.folder.parent / 'corpus'}", f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (row["outcome"], row["detail"]) == ("timeout", "no end after 12 s")
    assert str(tmp_path).encode() not in b"".join(commands_running())


def commands_running() -> list[bytes]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found.append((folder / "cmdline").read_bytes())
        except OSError:
            continue  # it has ended
    return found
