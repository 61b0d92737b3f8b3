"""The command as a person meets it: what it prints where, its exit codes, and how it refuses bad input."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline import __version__, cli
from pipeline.errors import RunError
from pipeline.plan.job import plan_job, read_plan
from pipeline.recipe.load import CONFIGS, load

HEAVY = {"torch", "transformers", "deepspeed", "mlflow", "numpy", "datasets", "pyarrow", "tokenizers", "matplotlib"}


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def alst(tmp_path, monkeypatch, capsys):
    """Call the command's own entry point, in a folder of the test, with the runs there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALST_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["alst", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Outcome(ended.value.code or 0, *capsys.readouterr())

    return call


def assert_refused(outcome: Outcome, *told: str) -> None:
    """Exit code 2, nothing on stdout, one message on stderr with all that is told in it, and no traceback."""
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("alst: ")
    assert outcome.err.count("alst: ") == 1
    assert "Traceback" not in outcome.err
    for words in told:
        assert words in outcome.err


# What it prints


def test_the_version_names_the_release_and_the_commit(alst):
    outcome = alst("--version")
    assert outcome.code == 0
    assert outcome.out.startswith(f"alst {__version__} (")


def test_help_lists_every_command_with_what_it_does(alst):
    outcome = alst("--help")
    assert outcome.code == 0
    for command in ("plan", "fit", "pack", "inspect", "train", "run"):
        assert f"{command} " in outcome.out


def test_a_plan_is_printed_with_its_numbers(alst):
    outcome = alst("plan", "tiny")
    assert (outcome.code, outcome.err) == (0, "")
    for words in ("2 ranks = dp 1 x sp 2", "32,768 tokens, 16,384 per rank", "1 samples, 32,768 tokens"):
        assert words in outcome.out


def test_json_stands_alone_on_stdout_and_reads_as_the_plan(alst, tmp_path):
    outcome = alst("plan", "tiny", "train.steps=3", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    path = tmp_path / "plan.json"
    path.write_text(outcome.out)
    assert json.loads(outcome.out)["plan_version"] == 4
    assert read_plan(path) == plan_job(load("tiny", overrides=["train.steps=3"]))


ESTIMATE = {
    "recipe", "nodes", "world_size", "mesh", "seq_len", "local_seq_len", "tokens_per_step", "gpu_bytes",
    "host_bytes_per_node", "disk_bytes_per_node", "seconds_per_step", "model_flops_per_step", "mfu", "hfu", "fits",
    "binding", "advice",
}  # fmt: skip


@pytest.mark.parametrize("recipe", ["tiny", "llama8b"])
def test_json_has_what_a_job_will_take_and_items_add_up(alst, recipe):
    told = json.loads(alst("plan", recipe, "--json").out)
    assert told.keys() >= ESTIMATE
    assert told["mesh"] == {"dp": told["dp"], "sp": told["sp"]}
    for name in ("gpu_bytes", "host_bytes_per_node"):
        items = {key: value for key, value in told[name].items() if key not in ("total", "available", "peak_at")}
        assert sum(items.values()) == told[name]["total"]
    assert (told["seconds_per_step"] is None) == (told["mfu"] is None) == (recipe == "tiny")
    assert (told["fits"], told["advice"]) == (True, [])


def test_what_does_not_fit_is_told_with_what_to_change(alst):
    outcome = alst("plan", "llama8b", "data.seq_len=33554432")
    assert outcome.code == 0
    for words in (
        "does NOT fit",
        "< binds",
        "data.seq_len=",
        "or hardware.nodes=",
        "sizes from the planner's own table",
    ):
        assert words in outcome.out
    advice = json.loads(alst("plan", "llama8b", "data.seq_len=8388608", "--json").out)["advice"]
    assert [change["fits"] for change in advice][-1]
    assert advice[0]["changes"]


def test_an_item_is_explained_with_the_numbers_that_the_table_adds_up(alst):
    everything = "memory.activation_checkpoint.resident_groups=0"
    outcome = alst("plan", "llama8b", "--explain", "activation checkpoint", everything, "data.seq_len=2097152")
    assert (
        "2 bytes x 262,144 tokens x 4,096 hidden x 32 groups of layers x 8 ranks of a node = 512.00 GiB" in outcome.out
    )
    seconds = alst("plan", "llama8b", "--explain", "attention").out
    assert "seconds of a step" in seconds
    assert "9.890e+14 FLOP/s" in seconds
    assert_refused(alst("plan", "llama8b", "--explain", "tiled_los"), "no such item", "did you mean tiled_loss?")


def test_two_recipes_stand_side_by_side(alst):
    outcome = alst("plan", "--compare", "llama8b", "qwen3-32b")
    assert outcome.out.index("llama8b") < outcome.out.index("qwen3-32b")
    assert "seconds: attention" in outcome.out
    both = json.loads(alst("plan", "--compare", "llama8b", "qwen3-32b", "--json").out)
    assert [told["name"] for told in both] == ["llama8b", "qwen3-32b"]
    assert_refused(alst("plan", "--compare", "lama8b", "qwen3-32b"), "'lama8b'", "did you mean 'llama8b'?")


def test_memory_is_plotted(alst, tmp_path):
    pytest.importorskip("matplotlib")
    assert alst("plan", "llama8b", "--plot", "plots/memory.png").code == 0
    assert (tmp_path / "plots" / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert_refused(alst("plan", "llama8b", "--plot", "memory.docx"), "memory.docx", "one of")
    (tmp_path / "file").touch()
    assert_refused(alst("plan", "llama8b", "--plot", "file/memory.png"), "cannot be written", "name another file")


def test_a_cluster_says_its_hardware_and_its_time_limit(alst):
    told = json.loads(alst("plan", "llama8b", "hardware.gpus_per_node=2", "--json").out)
    assert (told["world_size"], told["steps_per_time_limit"]) == (2, None)
    told = json.loads(alst("plan", "llama8b", "--cluster", "infiniband", "--nodes", "2", "--json").out)
    assert told["world_size"] == 16
    assert told["steps_per_time_limit"] > 0
    assert_refused(alst("plan", "llama8b", "--cluster", "nowhere"), "'nowhere'", "infiniband")


def test_fit_tells_the_longest_sequence_and_auto_takes_it(alst):
    outcome = alst("fit", "llama70b", "--nodes", "2")
    assert "binds" in outcome.out
    found = json.loads(alst("fit", "llama70b", "--nodes", "2", "--json").out)
    assert found["seq_len"] == found["recipe"]["data"]["seq_len"]
    planned = json.loads(alst("plan", "llama70b", "data.seq_len=auto", "--nodes", "2", "--json").out)
    assert planned == found
    assert f"data.seq_len={found['seq_len']}" in outcome.out


def test_fit_chooses_features_for_a_wanted_length(alst):
    found = json.loads(alst("fit", "llama8b", "--features", "auto", "data.seq_len=1048576", "--json").out)
    assert (found["seq_len"], found["fits"]) == (1048576, True)
    assert_refused(alst("fit", "llama8b", "data.seq_len=1048576"), "finds the length", "--features auto")
    assert "features chosen" in alst("fit", "llama8b", "--features", "auto", "data.seq_len=1048576").out


def test_auto_is_resolved_before_a_job_is_written(alst, tmp_path):
    outcome = alst("submit", "llama8b", "--cluster", "infiniband", "--nodes", "2", "--dry-run", "data.seq_len=auto")
    assert outcome.code == 0
    (run,) = (tmp_path / "runs").iterdir()
    plan = read_plan(run / "plan.json")
    assert plan.recipe.data.seq_len == plan.seq_len > 2**20
    assert load(run / "recipe.yaml").data.seq_len == plan.seq_len


def test_nodes_stand_over_the_recipe_and_over_its_overrides(alst):
    outcome = alst("plan", "tiny", "hardware.nodes=5", "--nodes", "3", "--json")
    assert json.loads(outcome.out)["nodes"] == 3


def test_planning_writes_nothing(alst, tmp_path):
    alst("plan", "tiny")
    alst("plan", "tiny", "--json")
    alst("plan", "tiny", "train.steps=x")
    assert list(tmp_path.iterdir()) == []


# What it refuses: (arguments, words that must be told)

REFUSED = [
    pytest.param(["plan", "tny"], ["recipe 'tny'", "no such file", "did you mean 'tiny'?"], id="recipe missing"),
    pytest.param(["plan", "tiny", "train.step=5"], ["train.step", "not a key", "'steps'?"], id="misspelt key"),
    pytest.param(["plan", "tiny", "data.seq_len=32k"], ["'32k'", "integer", "correct data.seq_len"], id="unit"),
    pytest.param(["plan", "tiny", "hardware.gpu=H300"], ["'H300'", "'GH200-96GB'", "correct hardware.gpu"], id="GPU"),
    pytest.param(["plan", "tiny", "hardware.host_memory_gib=2TB"], ["'2TB'", "valid number"], id="host memory"),
    pytest.param(["fit", "tiny", "parallel.sp=3"], ["parallel.sp = 3", "must divide", "use one of"], id="mesh"),
    pytest.param(["fit", "tiny", "hardware.host_memory_gib=1"], ["no length fits", "host memory"], id="too small"),
    pytest.param(["plan", "tiny", "train.steps=true"], ["True", "integer", "correct"], id="bool for a number"),
    pytest.param(["plan", "tiny", 'optimizer.lr="3e-4"'], ["'3e-4'", "number", "correct"], id="text for a number"),
    pytest.param(["plan", "tiny", "steps"], ["'steps'", "must be key=value", "write e.g."], id="no equals sign"),
    pytest.param(["plan", "tiny", "=5"], ["'=5'", "must be key=value", "write e.g."], id="no key"),
    pytest.param(
        ["plan", "tiny", "train.steps.x=5"], ["train.steps", "not a section", "set train.steps"], id="into a number"
    ),
    pytest.param(["plan", "tiny", "data.sources.4.path=x"], ["'4'", "list of 1", "count from 0"], id="list index"),
    pytest.param(["plan", "tiny", "--nodes", "0"], ["hardware.nodes = 0", "greater than 0", "correct"], id="no nodes"),
    pytest.param(["plan", "tiny", "--nodes", "-2"], ["hardware.nodes = -2", "greater than 0"], id="nodes below zero"),
    pytest.param(["plan", "tiny", "parallel.sp=7"], ["sp = 7", "num_attention_heads", "use one of"], id="sp, heads"),
    pytest.param(["plan", "tiny", "parallel.sp=4"], ["sp = 4", "the 2 ranks", "use one of [1, 2]"], id="sp, world"),
    pytest.param(["plan", "tiny", "data.seq_len=32769"], ["32769", "multiple of", "use 32768 or 32770"], id="seq_len"),
    pytest.param(
        ["plan", "tiny", "model.config.num_key_value_heads=3"],
        ["heads = 3", "must divide", "use one of"],
        id="KV heads",
    ),
    pytest.param(
        ["plan", "tiny", "model.name_or_path=."], ["'.'", "config.json", "give a model folder"], id="no config"
    ),
    pytest.param(
        ["plan", "tiny", "model.name_or_path=no/body"], ["'no/body'", "neither", "hf download"], id="no model"
    ),
    pytest.param(["run", "absent.json", "--stage", "train"], ["absent.json", "not a plan", "make one"], id="no plan"),
    pytest.param(["inspect", "absent"], ["absent", "not a packed data set", "make it with"], id="no packed data"),
]


@pytest.mark.parametrize(("arguments", "told"), REFUSED)
def test_bad_input_ends_with_one_message_and_code_2(alst, tmp_path, arguments, told):
    assert_refused(alst(*arguments), *told)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "told"),
    [
        pytest.param("", ["mine.yaml", "the file is empty", "needs at least"], id="empty"),
        pytest.param("- a\n", ["mine.yaml", "the top level is a list", "write `key: value`"], id="list at top level"),
        pytest.param("name: x\ntrain: [1\nzero: 2\n", ["mine.yaml", "line 3", "correct the YAML"], id="syntax"),
        pytest.param("name: x\nname: y\n", ["mine.yaml", "line 2", "'name' stands twice"], id="duplicate key"),
        pytest.param(b"name: \xff\n", ["mine.yaml", "byte 6 is not UTF-8", "save the file as UTF-8"], id="not UTF-8"),
        pytest.param(
            "base: absent.yaml\n",
            ["mine.yaml", "base = 'absent.yaml'", "no such file", "correct the path"],
            id="no base",
        ),
        pytest.param("base: mine.yaml\n", ["mine.yaml -> mine.yaml is a cycle", "remove the `base:`"], id="cycle"),
        pytest.param(f"base: {CONFIGS}/tiny.yaml\ntrian: {{}}\n", ["trian", "not a key", "'train'?"], id="key"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "train"])
def test_a_bad_recipe_file_ends_with_one_message_and_code_2(alst, tmp_path, command, content, told):
    (tmp_path / "mine.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(alst(command, "mine.yaml"), *told)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        pytest.param("", ["not a plan"], id="empty"),
        pytest.param('{"plan_version": 4, "rec', ["not a plan"], id="cut off"),
        pytest.param('{"plan_version": 99}', ["plan_version 99", "plan the recipe again"], id="another version"),
        pytest.param('{"plan_version": 4}', ["plan.json", "recipe"], id="no recipe"),
    ],
)
@pytest.mark.parametrize("stage", ["pack", "train"])
def test_a_damaged_plan_ends_with_one_message_and_code_2(alst, tmp_path, stage, content, told):
    (tmp_path / "plan.json").write_text(content)
    assert_refused(alst("run", "plan.json", "--stage", stage), "plan.json", *told)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        pytest.param(["plna", "tiny"], "Did you mean 'plan'?", id="command"),
        pytest.param(["plan"], "recipe", id="no recipe"),
        pytest.param(["plan", "tiny", "--node", "3"], "--nodes", id="option"),
        pytest.param(["plan", "tiny", "--nodes", "three"], "'--nodes'", id="nodes in words"),
        pytest.param(["run", "plan.json", "--stage", "trian"], "'trian'", id="stage"),
        pytest.param(["pack", "tiny"], "--output", id="no output"),
    ],
)
def test_a_misspelt_command_line_is_told_what_would_be_right(alst, tmp_path, arguments, told):
    outcome = alst(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert told in outcome.err
    assert "Traceback" not in outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["file", "file/runs"], ids=["a file itself", "below a file"])
def test_runs_that_cannot_be_written_end_with_one_message_and_code_2(alst, tmp_path, monkeypatch, below):
    """A file in the way refuses root as well, which a mode would not."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("ALST_RUNS", str(tmp_path / below))
    assert_refused(alst("train", "tiny"), str(tmp_path / below), "set ALST_RUNS to a folder that can be written")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_more_nodes_than_this_machine_are_refused_before_a_run_folder_is_made(alst, tmp_path):
    assert_refused(alst("train", "tiny", "hardware.nodes=2"), "hardware.nodes = 2", "one node", "hardware.nodes=1")
    assert list(tmp_path.iterdir()) == []


def test_training_is_not_started_when_the_plan_does_not_hold(alst, tmp_path, monkeypatch):
    def started(*_: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr("pipeline.launch.local.run_local", started)
    assert_refused(alst("train", "tiny", "parallel.sp=7"), "parallel.sp = 7")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "told"),
    [
        pytest.param("{type: text, path: absent}", ["absent"], id="missing"),
        pytest.param("{type: text, path: hollow}", ["hollow"], id="empty folder"),
        pytest.param("{type: text, path: latin.txt}", ["latin.txt", "UTF-8"], id="not UTF-8"),
        pytest.param("{type: jsonl, path: bad.jsonl}", ["bad.jsonl", "2"], id="line that is no JSON"),
    ],
)
def test_bad_data_ends_with_one_message_and_nothing_taken_for_a_packed_data_set(alst, tmp_path, source, told):
    pytest.importorskip("tokenizers")
    (tmp_path / "hollow").mkdir()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    (tmp_path / "bad.jsonl").write_text('{"text": "a line"}\n{"text": "half a li\n')
    outcome = alst("pack", "tiny", f"data.sources=[{source}]", "data.seq_len=64", "--output", "packed")
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    message = outcome.err[outcome.err.index("alst: ") :]
    for words in told:
        assert words in message
    assert not (tmp_path / "packed" / "manifest.json").exists()
    assert alst("inspect", "packed").code == 2


def test_an_output_that_cannot_be_written_is_refused(alst, tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "file").touch()
    outcome = alst("pack", "tiny", "--output", "file/packed")
    assert outcome.code == 2
    assert "file/packed" in outcome.err
    assert "Traceback" not in outcome.err


KEYS = {
    "seq_len", "samples", "documents", "tokens", "tokens_in", "tokens_dropped", "documents_cut", "unfilled_fraction",
    "loss_fraction", "checksums_ok",
}  # fmt: skip


def test_packing_in_stages_and_tasks_ends_in_a_data_set_that_can_be_looked_at(alst, tmp_path):
    pytest.importorskip("tokenizers")
    rows = [json.dumps({"ids": list(range(1, 2 + row % 7))}) for row in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    source = "{type: jsonl, path: a.jsonl, columns: {input_ids: ids}}"
    asked = ("pack", "tiny", f"data.sources=[{source}]", "data.tokenizer=null", "data.seq_len=32", "--output", "packed")
    for stage, task in (("tokenize", "1/2"), ("tokenize", "0/2"), ("plan", "0/1"), ("write", "1/2")):
        outcome = alst(*asked, "--stage", stage, "--task", task, "--json")
        assert json.loads(outcome.out) == {"stage": stage, "task": task, "complete": False}
    assert_refused(alst("inspect", "packed"), "packing of it has not finished")
    last = json.loads(alst(*asked, "--stage", "write", "--task", "0/2", "--json").out)
    assert last.keys() >= KEYS
    assert (last["seq_len"], last["tokens"], last["checksums_ok"]) == (32, last["tokens_in"], True)
    assert json.loads(alst("inspect", "packed", "--json").out) == last
    assert json.loads(alst("inspect", "packed", "--json", "--no-verify").out)["checksums_ok"] is None
    assert alst("inspect", "packed", "--plot", "plot.png").code == 0
    assert (tmp_path / "plot.png").stat().st_size > 1000
    shown = json.loads(alst("inspect", "packed", "--sample", "1", "--json").out)
    assert shown["documents"][0]["begins"].startswith("1")
    assert "a.jsonl:" in alst("inspect", "packed", "--sample", "0").out
    assert alst("inspect", "packed", "--sample", "99").code == 2


def test_a_task_that_is_none_or_of_an_undivided_stage_is_refused(alst):
    pytest.importorskip("tokenizers")
    for stage, task, told in (("write", "2/2", "I/N"), ("write", "x", "I/N"), ("plan", "0/2", "is one task, not 2")):
        outcome = alst("pack", "tiny", "--output", "packed", "--stage", stage, "--task", task)
        assert_refused(outcome, told)


# How it ends


def test_failed_work_is_told_in_one_message_with_code_1(alst, monkeypatch):
    def fail(*_: object) -> None:
        raise RunError("rank 1 ended with exit code 3")

    monkeypatch.setattr("pipeline.launch.local.run_local", fail)
    outcome = alst("train", "tiny")
    assert outcome.code == 1
    assert outcome.err == "alst: rank 1 ended with exit code 3\n"


def test_an_interrupt_ends_with_code_130_and_no_traceback(alst, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.launch.local.run_local", interrupt)
    outcome = alst("train", "tiny")
    assert outcome.code == 130
    assert "Traceback" not in outcome.err


def test_a_run_folder_alone_says_what_ran(alst, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.launch.local.run_local", lambda *_: None)
    assert alst("train", "tiny", "train.steps=3").code == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert read_plan(run / "plan.json") == plan_job(load("tiny", overrides=["train.steps=3"]))
    assert load(run / "recipe.yaml").train.steps == 3
    assert (run / "commit.txt").read_text().strip()
    assert (run / "code" / "pipeline" / "cli.py").read_bytes() == Path(cli.__file__).read_bytes()
    assert (run / "code" / "configs" / "tiny.yaml").is_file()
    assert not list(run.rglob("__pycache__"))


# What a login node needs


def modules_imported_by(*arguments: str) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """The top-level modules that the real command imports in a process of its own."""
    command = [sys.executable, "-X", "importtime", "-m", "pipeline.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CONFIGS.parent, timeout=60, check=False)
    timed = (line for line in done.stderr.splitlines() if line.startswith("import time:"))
    return done, {line.rpartition("|")[2].strip().partition(".")[0] for line in timed}


def test_help_imports_nothing_heavy():
    done, modules = modules_imported_by("--help")
    assert done.returncode == 0
    assert "typer" in modules, "the imports were not seen"
    assert modules & HEAVY == set()


def test_planning_imports_nothing_heavy_and_prints_json_alone():
    done, modules = modules_imported_by("plan", "tiny", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["sp"] == 2
    assert "pydantic" in modules, "the imports were not seen"
    assert modules & HEAVY == set()


def test_a_refusal_in_a_process_of_its_own_is_one_line_and_code_2(tmp_path):
    command = [sys.executable, "-m", "pipeline.cli", "plan", "tiny", "train.steps=x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "alst: train.steps = 'x': must be a valid integer; correct train.steps\n"


# Submitting, where there is no Slurm


def test_a_dry_run_prints_every_job_and_needs_neither_slurm_nor_anything_heavy(tmp_path):
    script = (
        "import sys, pipeline.cli as cli\n"
        "sys.argv = ['alst', 'submit', 'tiny', '--cluster', 'infiniband', '--nodes', '2', '--dry-run']\n"
        "try: cli.main()\n"
        f"finally: assert not {HEAVY!r} & set(sys.modules), sys.modules.keys()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PATH": str(tmp_path), "ALST_RUNS": str(tmp_path / "runs"), "PYTHONPATH": str(CONFIGS.parent)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    for stage in ("pack", "train"):
        assert (run / "slurm" / f"{stage}.sbatch").read_text() in done.stdout
    assert not (run / "slurm" / "jobs.json").exists()


def test_submitting_without_slurm_is_refused_and_leaves_nothing(alst, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    outcome = alst("submit", "tiny", "--cluster", "throw-away")
    assert outcome.code == 2
    assert outcome.err.startswith("alst: sbatch: not on the PATH; submit from a login node")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_was_never_submitted_has_no_status(alst, tmp_path):
    alst("submit", "tiny", "--cluster", "cpu-only", "--dry-run")
    (run,) = (tmp_path / "runs").iterdir()
    for command in ("status", "logs", "cancel"):
        assert_refused(alst(command, run.name), run.name)
