"""What is handed to Slurm, as far as no Slurm is needed to see it: the texts, the refusals, the templates."""

import json
import os
import re
import shlex
import socket
import subprocess
from pathlib import Path

import pytest
import yaml

from pipeline.errors import UserError
from pipeline.launch.entry import read_secrets
from pipeline.launch.jobs import RENDEZVOUS, jobs_of
from pipeline.launch.rehearsal import rehearsal_of
from pipeline.launch.slurm import PASSED_ON, PASSED_ON_BY_NAME, submitting_environment
from pipeline.launch.submit import prepare
from pipeline.plan.cluster import SECRET_NAME, ClusterProfile, load_cluster
from pipeline.plan.job import JobPlan, plan_job, read_plan
from pipeline.plan.run_dir import RunDir
from pipeline.recipe.load import load

ROOT = Path(__file__).resolve().parents[2]
CANARY = "canary-5f1b"


@pytest.fixture(autouse=True)
def _no_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("ALST_RUNS", str(tmp_path / "runs"))


def plan_for(profile: ClusterProfile, *, nodes: int, overrides: tuple[str, ...] = ()) -> JobPlan:
    return plan_job(load("tiny", overrides=[*profile.overrides(nodes=nodes), "data.seq_len=65536", *overrides]))


def changed(name: str, **changes) -> ClusterProfile:
    raw = load_cluster(name).model_dump(mode="json")
    for key, value in changes.items():
        raw[key] = raw[key] | value if isinstance(value, dict) and raw[key] is not None else value
    return ClusterProfile.model_validate_json(json.dumps(raw))


def texts(profile: ClusterProfile, *, nodes: int = 4) -> tuple[RunDir, str, str]:
    run_dir = prepare(plan_for(profile, nodes=nodes), profile)
    return run_dir, run_dir.sbatch("pack").read_text(), run_dir.sbatch("train").read_text()


def options(text: str) -> dict[str, str | bool]:
    found = re.findall(r"^#SBATCH --([a-z0-9-]+)(?:=(.*))?$", text, re.MULTILINE)
    return {name: " ".join(shlex.split(value)) if value else True for name, value in found}


def exports(text: str) -> dict[str, str]:
    return dict(re.findall(r"^export ([A-Z_a-z]+)=(.*?)(?:  # .*)?$", text, re.MULTILINE))


# What submit writes


def test_the_train_job_is_one_task_per_gpu_and_waits_for_the_pack_job():
    _, pack, train = texts(load_cluster("infiniband"))
    asked = options(train)
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gres"]) == ("4", "8", "gpu:8")
    assert asked["dependency"].startswith("afterok:")
    assert asked["kill-on-invalid-dep"] == "yes"
    assert "--cpus-per-task=12" in train.split("srun", 1)[1], "srun does not inherit it from sbatch"
    assert options(pack)["partition"] == "cpu"
    assert (options(pack)["nodes"], options(pack)["ntasks-per-node"]) == ("1", "1")
    assert "dependency" not in options(pack)


@pytest.mark.parametrize(("gpus", "nodes"), [(1, 1), (8, 1), (8, 3)])
def test_one_gpu_one_node_and_many_nodes(gpus, nodes):
    profile = changed("default", hardware={"gpus_per_node": gpus})
    run_dir = prepare(plan_job(load("tiny", overrides=profile.overrides(nodes=nodes))), profile)
    asked = options(run_dir.sbatch("train").read_text())
    assert int(asked["nodes"]) * int(asked["ntasks-per-node"]) == read_plan(run_dir.plan).world_size == gpus * nodes
    assert asked["gpus-per-node"] == str(gpus)


def test_every_key_of_a_section_reaches_sbatch():
    section = {
        "partition": "p", "account": "a", "qos": "q", "reservation": "r", "time": "02:00:00", "cpus_per_task": 3,
        "mem": "5G", "exclude": ["bad1", "bad2"], "extra": {"constraint": "ib", "mail_type": "FAIL", "x11": True},
    }  # fmt: skip
    _, pack, train = texts(
        changed("default", pack=section, train=section | {"gpus": {"option": "gres", "type": "h100"}})
    )
    expected = {
        "partition": "p", "account": "a", "qos": "q", "reservation": "r", "time": "120", "cpus-per-task": "3",
        "mem": "5G", "exclude": "bad1,bad2", "constraint": "ib", "mail-type": "FAIL", "x11": True,
    }  # fmt: skip
    assert expected.items() <= options(pack).items()
    assert (expected | {"gres": "gpu:h100:8"}).items() <= options(train).items()


def test_setup_comes_in_order_before_the_tasks():
    profile = changed("default", umask="0007", modules=["cuda/12.8"], setup=["ulimit -l unlimited"], scratch="/local")
    _, _, train = texts(profile)
    places = [
        train.index(line)
        for line in (
            "umask 0007",
            "module load cuda/12.8",
            "ulimit -l unlimited",
            "export TMPDIR=/local",
            "MASTER_ADDR",
            "\nsrun ",
        )
    ]
    assert places == sorted(places)


def test_the_cluster_takes_the_place_of_the_recipes_hardware_and_tracking(tmp_path):
    profile = changed("throw-away", tracking_uri="http://127.0.0.1:5000")
    run_dir = prepare(plan_for(profile, nodes=4), profile)
    recipe = read_plan(run_dir.plan).recipe
    assert (recipe.hardware.nodes, recipe.hardware.gpus_per_node, recipe.hardware.gpu) == (4, 2, "cpu")
    assert recipe.tracking.uri == "http://127.0.0.1:5000"


def test_packing_in_several_tasks_is_a_chain_of_arrays():
    profile = changed("default", pack={"tasks": 5})
    run_dir = prepare(plan_for(profile, nodes=1), profile)
    asked = {stage: options(run_dir.sbatch(stage).read_text()) for stage in ("tokenize", "plan", "write", "train")}
    assert asked["tokenize"]["array"] == asked["write"]["array"] == "0-4%5"
    assert "array" not in asked["plan"] | asked["train"]
    assert [asked[stage].get("dependency") for stage in asked] == [
        None,
        "afterok:<the tokenize job>",
        "afterok:<the plan job>",
        "afterok:<the write job>",
    ]
    assert not run_dir.sbatch("pack").exists()


def test_a_packed_data_set_that_is_whole_is_not_packed_again():
    profile = load_cluster("cpu-only")
    run_dir, *_ = texts(profile)
    manifest = run_dir.packed(read_plan(run_dir.plan)) / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.touch()
    again = prepare(plan_for(profile, nodes=4), profile)
    assert not again.sbatch("pack").exists()
    assert "dependency" not in options(again.sbatch("train").read_text())


def test_in_a_chain_every_train_job_but_the_last_leaves_the_rest_to_the_next():
    profile = changed("default", train={"requeues": 7})
    plan = plan_for(profile, nodes=1)
    jobs = jobs_of(plan, profile, RunDir(Path("/runs/r")), chain=3)
    assert [job.stage for job in jobs] == ["pack", "train", "train", "train"]
    last_words = [next(line for line in job.setup if line.startswith("before_tasks")) for job in jobs]
    assert last_words == ["before_tasks /runs/r 100", *["before_tasks /runs/r 7 next"] * 2, "before_tasks /runs/r 7"]


def test_nodes_that_were_not_fit_are_excluded_from_later_jobs(tmp_path):
    profile = changed("default", train={"exclude": ["n1", "n2"]})
    run_dir, *_ = texts(profile)
    run_dir.exclude("n2", "12 uncorrected ECC errors")
    run_dir.exclude("n7", "failed")
    pack, train = jobs_of(read_plan(run_dir.plan), profile, run_dir)
    assert (pack.options["exclude"], train.options["exclude"]) == ("n2,n7", "n1,n2,n7")


def test_a_floor_of_bandwidth_reaches_the_train_job_alone():
    _, pack, train = texts(changed("default", train={"least_bus_gigabytes_per_second": 50}))
    name = "ALST_LEAST_BUS_GIGABYTES_PER_SECOND"
    assert exports(train)[name] == "50.0"
    assert name not in exports(pack)


# Rehearsals


@pytest.mark.parametrize(("heads", "gpus", "seq_len"), [(4, 2, 8192), (6, 6, 8196)])
def test_a_rehearsal_is_short_on_the_same_ranks_and_keeps_nothing(heads, gpus, seq_len):
    said = [f"hardware.gpus_per_node={gpus}", "hardware.nodes=4", "data.seq_len=65532", "evaluation.samples=2"]
    said += [f"model.config.{name}={heads}" for name in ("num_attention_heads", "num_key_value_heads")]
    said += ["model.config.hidden_size=48", "train.self_check=null"]
    plan = plan_job(load("tiny", overrides=said))
    rehearsal = plan_job(load("tiny", overrides=[*said, *rehearsal_of(plan)]))
    assert (rehearsal.nodes, rehearsal.dp, rehearsal.sp) == (plan.nodes, plan.dp, plan.sp)
    assert (rehearsal.seq_len, rehearsal.recipe.train.steps) == (seq_len, 3)
    assert rehearsal.recipe.checkpoint is rehearsal.recipe.evaluation is None
    assert rehearsal.recipe.name == "tiny-rehearsal"


# Secrets


def test_no_variable_of_the_one_who_submits_reaches_a_text_or_the_run_folder(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    run_dir, *_ = texts(changed("default", secrets="~/secrets"))
    files = [path for path in run_dir.path.rglob("*") if path.is_file()]
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


def test_what_is_passed_on_names_no_secret():
    assert [name for name in (*PASSED_ON, *PASSED_ON_BY_NAME) if SECRET_NAME.search(name)] == []


def test_sbatch_is_called_with_little_and_jobs_get_no_more(monkeypatch):
    """A list of names would have Slurm add what the login shell sets on the node, where tokens are set as well."""
    for name in ("HF_TOKEN", "WANDB_API_KEY", "SLURM_JOB_ID", "SOME_SETTING", "SBATCH_EXPORT"):
        monkeypatch.setenv(name, CANARY)
    monkeypatch.setenv("SBATCH_ACCOUNT", "mine")
    found = submitting_environment()
    assert CANARY not in found.values()
    assert found["SBATCH_ACCOUNT"] == "mine"
    _, pack, train = texts(load_cluster("default"))
    assert {options(text)["export"] for text in (pack, train)} == {"ALL"}


def test_secrets_are_read_from_a_file_that_only_its_owner_can_read(tmp_path, monkeypatch):
    path = tmp_path / "secrets"
    path.write_text(f"# for gated models\nHF_TOKEN={CANARY}=x\n\n")
    monkeypatch.setenv("ALST_SECRETS", str(path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    path.chmod(0o644)
    with pytest.raises(UserError, match=r"0644, others may read it; run: chmod 600"):
        read_secrets()
    path.chmod(0o600)
    read_secrets()
    assert os.environ.pop("HF_TOKEN") == f"{CANARY}=x"


def test_a_secrets_file_with_a_line_that_is_none_is_refused_without_repeating_it(tmp_path, monkeypatch):
    path = tmp_path / "secrets"
    path.write_text(CANARY)
    path.chmod(0o600)
    monkeypatch.setenv("ALST_SECRETS", str(path))
    with pytest.raises(UserError, match="line 1 is not NAME=value") as caught:
        read_secrets()
    assert CANARY not in str(caught.value)


# The templates for submitting by hand


RUN_SPECIFIC = {"job-name", "output", "error", "dependency", "kill-on-invalid-dep", "partition"}
SUBMITITS_OWN = {"signal"}
"""Its handler is in the tasks it starts; `alst run` has none, and the signal would end it."""


@pytest.mark.parametrize("stage", ["pack", "train"])
def test_a_template_asks_for_what_submit_asks_for(stage):
    profile = load_cluster("default")
    run_dir = prepare(plan_for(profile, nodes=4), profile)
    written, template = run_dir.sbatch(stage).read_text(), (ROOT / "slurm" / f"{stage}.sbatch").read_text()
    written_options = {key: value for key, value in options(written).items() if key not in RUN_SPECIFIC | SUBMITITS_OWN}
    # By hand nobody has taken the rest out of the environment that sbatch is called in.
    assert options(template) == written_options | {"export": ",".join([*PASSED_ON, *PASSED_ON_BY_NAME])}
    here = {"OMP_NUM_THREADS": '"$SLURM_CPUS_PER_TASK"', "PYTHONPATH": '"$RUN/code"'}
    there = {"OMP_NUM_THREADS": options(written)["cpus-per-task"], "PYTHONPATH": str(run_dir.code)}
    table = {name: value for name, value in exports(written).items() if name != "SUBMITIT_EXECUTOR"}
    assert {name: exports(template)[name] for name in here} == here
    assert exports(template) | there == table


def test_rank_0_listens_on_a_port_that_nobody_has(monkeypatch):
    """Also where another job of another cluster was given the first choice."""
    monkeypatch.setenv("PATH", os.defpath)
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        lines = [line.replace("$((20000 + RANDOM % 12000))", str(taken)) for line in RENDEZVOUS[-2:]]
        assert str(taken) in lines[0]
        script = "\n".join(["MASTER_ADDR=127.0.0.1", *lines, 'echo "$MASTER_PORT"'])
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) > taken


@pytest.mark.parametrize("stage", ["pack", "train"])
def test_a_template_names_the_container_line_that_submit_writes(stage):
    profile = changed("default", container={"image": "/images/alst.sif"})
    run_dir = prepare(plan_for(profile, nodes=4), profile)
    template = (ROOT / "slurm" / f"{stage}.sbatch").read_text()
    line = re.search(r'^# PYTHON="(.*)"$', template, re.MULTILINE)[1]
    for name, value in {"$(dirname $RUN)": run_dir.root, "$RUN": run_dir.path, "$IMAGE": "/images/alst.sif"}.items():
        line = line.replace(name, str(value))
    assert f" {line} -u" in run_dir.sbatch(stage).read_text()


def test_the_profile_of_a_run_lies_in_its_folder():
    profile = load_cluster("efa")
    run_dir, *_ = texts(profile)
    assert ClusterProfile.model_validate_json(run_dir.cluster.read_text()) == profile
    assert yaml.safe_load(run_dir.recipe.read_text())["hardware"]["nodes"] == 4
