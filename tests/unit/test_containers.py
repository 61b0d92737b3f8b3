"""The definitions of the images: one structure, versions from the lock, and nothing that names a machine.

The CUDA image is not built in tests: its base image and hours of compiling are not to be had there. What it shares with
the CPU image is (tests/cluster/test_container.py).
"""

import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONTAINERS = ROOT / "containers"
SECTIONS = {"files", "post", "environment", "runscript", "test", "labels", "arguments"}


@dataclass
class Stage:
    """One stage of a definition file."""

    header: dict[str, str] = field(default_factory=dict)
    sections: dict[str, list[str]] = field(default_factory=dict)
    """By name with its arguments, `files from build`: its lines."""


def stages(name: str) -> list[Stage]:
    """Every line belongs somewhere; one that does not is an error."""
    found: list[Stage] = []
    section: list[str] | None = None
    for line in (CONTAINERS / name).read_text().splitlines():
        if re.match(r"^Bootstrap:", line):
            found.append(Stage())
            section = None
        if not line.strip() or (section is None and line.startswith("#")):
            continue
        if line.startswith("%"):
            section = found[-1].sections.setdefault(line[1:].strip(), [])
        elif section is not None:
            section.append(line.strip())
        else:
            key, value = line.split(": ", 1)
            found[-1].header[key] = value
    return found


def scripts(stage: Stage) -> list[str]:
    return [name for line in stage.sections["post"] for name in re.findall(r"/opt/alst/(\w+\.\w+)", line)]


@pytest.mark.parametrize("name", ["alst.def", "alst-cpu.def", "base-cpu.def"])
def test_a_definition_has_known_sections_only(name):
    found = stages(name)
    assert {section.split()[0] for stage in found for section in stage.sections} <= SECTIONS
    assert all({"Bootstrap"} < stage.header.keys() for stage in found)


def test_both_images_have_the_same_stages_from_the_same_scripts():
    cuda, cpu = stages("alst.def"), stages("alst-cpu.def")
    assert [stage.header["Stage"] for stage in cuda] == [stage.header["Stage"] for stage in cpu] == ["build", "final"]
    system = scripts(stages("base-cpu.def")[0])
    assert system == ["system.sh"]
    assert scripts(cuda[0]) == [*system, *scripts(cpu[0]), "attention.sh"]
    assert scripts(cuda[1]) == [*system, *scripts(cpu[1])]
    for mine, other in zip(cuda, cpu, strict=True):
        assert mine.sections.get("files from build") == other.sections.get("files from build")
        assert set(other.sections["files"]) <= set(mine.sections["files"])
    assert set(cpu[1].sections["labels"]) <= set(cuda[1].sections["labels"])


def test_what_a_stage_runs_is_copied_into_it():
    for name in ("alst.def", "alst-cpu.def", "base-cpu.def"):
        for stage in stages(name):
            copied = dict(line.split() for line in stage.sections["files"])
            assert all((CONTAINERS / source).is_file() for source in copied)
            assert {f"/opt/alst/{script}" for script in scripts(stage)} <= set(copied.values())


def test_every_argument_of_the_cuda_image_is_pinned_in_the_lock():
    lock = (CONTAINERS / "versions.lock").read_text()
    pinned = set(re.findall(r"^#: (\w+)=\S+$", lock, re.MULTILINE))
    asked = set(re.findall(r"{{ (\w+) }}", (CONTAINERS / "alst.def").read_text()))
    assert asked == pinned | {"commit", "lock"}


def test_every_package_of_an_image_is_pinned_in_the_lock():
    pinned = re.findall(r"^([A-Za-z0-9._-]+)==", (CONTAINERS / "versions.lock").read_text(), re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = {plain(name) for name in [*extras["train"], *extras["gpu"], "mlflow-skinny"]}
    compiled = {"flash-attn"}  # from the commit that the lock names
    assert wanted - compiled <= {plain(name) for name in pinned}


def plain(requirement: str) -> str:
    return re.split(r"[<>=!~\[; ]", requirement)[0].lower().replace("_", "-")


def test_the_cuda_of_the_image_is_that_of_its_torch():
    """torch 2.13 on the package index asks for cuda-toolkit 13.0; another minor version would compile for another."""
    lock = (CONTAINERS / "versions.lock").read_text()
    assert re.search(r"^torch==2\.13\.", lock, re.MULTILINE)
    assert re.search(r"^#: cuda=13\.0\.", lock, re.MULTILINE)


def test_flash_attention_4_is_installed_last():
    text = (CONTAINERS / "shared" / "attention.sh").read_text()
    assert text.rstrip().endswith("flash-attn-4"), "the package of 2 holds an old copy of it"


def test_the_system_of_an_image_has_no_library_that_could_shadow_torchs():
    for stage in stages("alst.def"):
        assert "cudnn" not in stage.header["From"]
    assert not re.search("cudnn|nccl|cublas", (CONTAINERS / "shared" / "system.sh").read_text())


def test_no_definition_names_a_machine_or_a_secret():
    for path in [*CONTAINERS.glob("*.def"), *CONTAINERS.glob("shared/*")]:
        text = path.read_text()
        assert not re.search(r"https?://|TOKEN|PASSWORD|/home/|/root\b", text), path


def test_without_apptainer_a_build_says_what_to_do(tmp_path):
    code = "import apptainer, build; apptainer.find = lambda: None; print(build.main(['cpu']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(CONTAINERS), "ALST_IMAGES": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "2\n"
    assert "apptainer: not on the PATH" in done.stderr


def test_without_room_a_build_says_how_much_is_needed_and_where_else_it_can_be(tmp_path):
    code = (
        "import build, dataclasses, pathlib, sys\n"
        "kind = dataclasses.replace(build.KINDS['cpu'], free_gib=10**9)\n"
        "try: build._check_space(kind, pathlib.Path(sys.argv[1]))\n"
        "except build.BuildError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={"PYTHONPATH": str(CONTAINERS)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.search(
        r"GiB are free, building the cpu image takes 1000000000; make room, or set ALST_IMAGES", done.stdout
    )
