"""The line that starts a task in an image, and what is refused before a job is there. No Apptainer is needed."""

import json
import os
import re
import shlex
import stat
import subprocess
import sys
import uuid
from importlib.metadata import version
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.launch.container import UNPACK, with_image
from pipeline.launch.submit import prepare
from pipeline.plan.cluster import ClusterProfile, load_cluster
from pipeline.plan.image import check_same, identify
from pipeline.plan.job import JobPlan, plan_job, read_plan
from pipeline.plan.run_dir import RunDir
from pipeline.recipe.load import load

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("ALST_RUNS", str(tmp_path / "runs"))
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)


def profile_of(container: dict, *, name: str = "default", **changes) -> ClusterProfile:
    raw = load_cluster(name).model_dump(mode="json") | {"container": container} | changes
    return ClusterProfile.model_validate_json(json.dumps(raw))


def plan_for(profile: ClusterProfile, *overrides: str) -> JobPlan:
    return plan_job(load("tiny", overrides=[*profile.overrides(nodes=2), "data.seq_len=65536", *overrides]))


def written(profile: ClusterProfile, *overrides: str) -> tuple[RunDir, dict[str, str]]:
    run_dir = prepare(plan_for(profile, *overrides), profile)
    return run_dir, {path.stem: path.read_text() for path in run_dir.slurm.glob("*.sbatch")}


def words(text: str) -> list[str]:
    """Of the exec line: from `apptainer` to `python`."""
    found = shlex.split(text.rsplit("srun ", 1)[1].splitlines()[0])
    return found[found.index("apptainer") : found.index("python") + 1]


def sif(path: Path, *, content: bytes = b"", name: uuid.UUID | None = None) -> Path:
    """What tells a SIF: its header."""
    header = b"#!/usr/bin/env run-singularity\n".ljust(32, b"\0") + b"SIF_MAGIC\0" + b"01\0" + b"02\0"
    path.write_bytes(header + (name or uuid.uuid4()).bytes + content)
    return path


def program(path: Path, says: str, *, code: int = 0) -> None:
    """An `apptainer` that prints and ends."""
    path.write_text(f"#!/bin/sh\n{says}\nexit {code}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


# The line


def test_a_task_sees_its_code_and_image_read_only_and_the_runs_and_scratch_read_write(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", "/lustre/hf")
    profile = profile_of({"image": "/images/alst.sif", "binds": ["/a b:/c:ro"]}, scratch="/local", secrets="/s/secrets")
    run_dir, texts = written(profile)
    line = words(texts["train"])
    assert line[:5] == ["apptainer", "exec", "--no-home", "--no-mount=cwd,tmp", f"--pwd={run_dir.path}"]
    assert line[5:] == [
        f"--bind={run_dir.root}",
        f"--bind={run_dir.code}:{run_dir.code}:ro",
        "--bind=/images/alst.sif:/images/alst.sif:ro",
        "--bind=/local",
        "--bind=/lustre/hf",
        "--bind=/s/secrets:/s/secrets:ro",
        "--bind=/a b:/c:ro",
        "--nv",
        "/images/alst.sif",
        "python",
    ]


def test_gpus_are_handed_in_where_there_are_some():
    _, on_gpus = written(profile_of({"image": "/i.sif"}))
    _, without = written(profile_of({"image": "/i.sif"}, name="cpu-only"))
    assert ["--nv" in words(on_gpus[stage]) for stage in ("pack", "train")] == [False, True]
    assert "--nv" not in words(without["train"])


def test_what_a_recipe_names_on_a_disk_is_there_read_only_also_by_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    _, texts = written(profile_of({"image": "/i.sif"}), "data.sources=[{type: text, path: texts}]")
    line = words(texts["pack"])
    assert f"--bind={tmp_path}/texts:{tmp_path}/texts:ro" in line
    assert f"--pwd={tmp_path}" in line


def test_a_task_gets_the_listed_variables_and_no_others():
    _, texts = written(profile_of({"image": "/i.sif"}))
    (listed,) = re.findall(r"^export SLURM_EXPORT_ENV=(\S+)", texts["train"], re.MULTILINE)
    assert {"MASTER_ADDR", "OMP_NUM_THREADS", "PYTHONPATH", "TRITON_CACHE_DIR"} <= set(listed.split(","))
    assert "LD_LIBRARY_PATH" not in listed
    exported = set(re.findall(r"^export (\w+)=", texts["train"], re.MULTILINE)) - {"SLURM_EXPORT_ENV"}
    assert exported <= set(listed.split(",")), "what the job exports itself"


def test_compiled_code_is_kept_on_the_node():
    _, texts = written(profile_of({"image": "/i.sif"}, scratch="/local"))
    for name in ("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR"):
        assert f"export {name}=/local/alst-{os.getuid()}/" in texts["train"]


def test_without_a_runtime_the_section_has_no_effect():
    bare_run, bare = written(profile_of(None))
    off_run, off = written(profile_of({"image": "/i.sif", "runtime": "none"}))
    assert off["train"].replace(off_run.path.name, bare_run.path.name) == bare["train"]


def test_a_bind_that_is_none_is_refused():
    with pytest.raises(ValueError, match="binds"):
        profile_of({"image": "/i.sif", "binds": ["lustre"]})


@pytest.mark.parametrize(
    ("user", "tracks_by", "unpacked"), [(0, "linuxproc", False), (1000, "linuxproc", True), (1000, "pgid", True)]
)
def test_an_image_is_unpacked_where_a_signal_would_end_the_process_that_serves_it(user, tracks_by, unpacked):
    stand_ins = [f"id() {{ echo {user}; }}", f"scontrol() {{ echo 'ProctrackType = proctrack/{tracks_by}'; }}"]
    text = "\n".join([*stand_ins, *UNPACK, "echo $APPTAINER_UNSQUASH"])
    done = subprocess.run(["/bin/bash", "-c", text], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.stdout == ("1\n" if unpacked else "\n")


# Which image


def test_an_image_is_told_by_its_bytes(tmp_path):
    path = sif(tmp_path / "a.sif", content=b"one")
    image = identify(path)
    check_same(image, path, verify=True)
    moved = path.rename(tmp_path / "b.sif")
    check_same(image, moved)


def test_another_build_and_a_changed_byte_are_seen(tmp_path):
    name = uuid.uuid4()
    image = identify(sif(tmp_path / "a.sif", content=b"one", name=name))
    other = sif(tmp_path / "b.sif", content=b"one")
    changed = sif(tmp_path / "c.sif", content=b"two", name=name)
    with pytest.raises(UserError, match="is not the image this run was submitted with"):
        check_same(image, other)
    check_same(image, changed)
    with pytest.raises(UserError, match="is not the image this run was submitted with"):
        check_same(image, changed, verify=True)


def test_an_image_is_in_the_plan_and_comes_back_from_it(tmp_path):
    path = sif(tmp_path / "a.sif")
    program(tmp_path / "apptainer", f"echo '[[{HERE.replace('.', ', ')}], \"{version('submitit')}\"]'")
    profile = profile_of({"image": str(path)})
    plan = with_image(plan_for(profile), profile)
    run_dir = prepare(plan, profile)
    assert read_plan(run_dir.plan) == plan
    assert read_plan(run_dir.plan).image == identify(path)
    assert with_image(plan, profile_of(None)).image is None


# What is refused


@pytest.mark.parametrize(
    ("says", "code", "told"),
    [
        ("echo '[[3, 9], \"1.5.4\"]'", 0, ["has Python 3.9", f"this side {HERE}", "make setup PYTHON=python3.9"]),
        (f"echo '[[{HERE.replace('.', ', ')}], \"0.1\"]'", 0, ["has submitit 0.1", "submitit==0.1 here"]),
        ("echo 'FATAL: no squashfs' >&2", 255, ["does not start here", "no squashfs"]),
    ],
)
def test_an_image_that_does_not_fit_this_side_is_refused(tmp_path, says, code, told):
    program(tmp_path / "apptainer", says, code=code)
    profile = profile_of({"image": str(sif(tmp_path / "a.sif"))})
    with pytest.raises(UserError) as caught:
        with_image(plan_for(profile), profile)
    for text in told:
        assert text in str(caught.value)


def test_without_apptainer_an_image_is_refused(tmp_path):
    profile = profile_of({"image": str(sif(tmp_path / "a.sif"))})
    with pytest.raises(UserError, match=r"apptainer: not on the PATH; install it .*container\.runtime: none"):
        with_image(plan_for(profile), profile)


def test_an_image_that_is_missing_corrupt_or_replaced_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"No such file.*make image"):
        identify(tmp_path / "none.sif")
    (tmp_path / "text.sif").write_text("not an image")
    with pytest.raises(UserError, match="is no Apptainer image"):
        identify(tmp_path / "text.sif")
    path = sif(tmp_path / "a.sif")
    (tmp_path / "a.sif.sha256").write_text(f"{'0' * 64}  a.sif\n")
    with pytest.raises(UserError, match=r"a\.sif\.sha256 says 000000000000"):
        identify(path)


def test_a_bind_whose_source_is_not_there_is_refused(tmp_path):
    program(tmp_path / "apptainer", "exit 9")
    profile = profile_of({"image": str(sif(tmp_path / "a.sif")), "binds": ["/no/such/folder:/data"]})
    with pytest.raises(UserError, match=r"container\.binds = /no/such/folder:/data: /no/such/folder is not there"):
        with_image(plan_for(profile), profile)
