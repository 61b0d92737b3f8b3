"""An image, whole or not at all: `make image` for CUDA, `make image IMAGE=cpu` without.

    python containers/build.py cpu|cuda

Needs Apptainer, git for CUDA, and a Python with pip of the same minor version as the image's. Everything that pip
installs is fetched out here, by this machine's pip as it is configured; the image is built from that folder and knows
no index, proxy or mirror. In $ALST_IMAGES (default /var/tmp/alst-images-UID):

    alst-cpu.sif  alst-cpu.sif.sha256      the result, and its digest
    base-cpu-KEY/                          Debian with Python: kept until what makes it changes
    inputs-cpu-KEY/                        wheels and sources: kept until the lock changes
    pip/  apptainer/                       caches
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import apptainer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LOCK = HERE / "versions.lock"
GIB = 2**30
ZSTD = "-comp zstd -Xcompression-level 6"
"""As small as gzip's default, several times as fast, also when a task reads it; Linux has it since 4.14."""

CONTEXT = "definitions"
CAP_SYS_RESOURCE = 1 << 24
"""Apptainer hands it on to a container's root; a root inside a virtual machine or container may not have it."""


class BuildError(Exception):
    """The image cannot be built; the message says why and what to do."""


@dataclass(frozen=True)
class Kind:
    """What differs between the images."""

    name: str
    definition: str
    python: str
    """Of the image's system; pip fetches for it, and submitit needs the same on both sides."""
    extras: tuple[str, ...]
    free_gib: int
    """Inputs, temporary copies and the image, side by side."""


KINDS = {
    "cpu": Kind("cpu", "alst-cpu.def", "3.11", ("train",), 8),
    "cuda": Kind("cuda", "alst.def", "3.12", ("train", "gpu"), 80),
}


def build(kind: Kind, folder: Path) -> Path:
    """The image; one that is up to date is not built again. Raises BuildError."""
    programs = _find_apptainer()
    folder.mkdir(parents=True, exist_ok=True)
    image = folder / Path(kind.definition).with_suffix(".sif").name
    key = _key(kind, _requirements(kind))
    if _is_current(image, key):
        return image
    _check_space(kind, folder)
    _check_python(kind)
    environment = _environment(programs, folder)
    inputs = _inputs(kind, folder, environment)
    arguments = {"commit": _commit(), "lock": _digest_of(LOCK.read_bytes())[:12]}
    if kind.name == "cpu":
        arguments["base"] = os.path.relpath(_debian(folder, environment), folder / CONTEXT)
    else:
        arguments |= locked_arguments()
    with _replaced(image) as temporary:
        _apptainer(
            kind.definition, temporary, arguments, environment, f"--bind={inputs}:/mnt", f"--mksquashfs-args={ZSTD}"
        )
        digest = _digest_of_file(temporary)
    _sidecar(image).write_text(f"{digest}  {image.name}\n")
    _sidecar(image, "key").write_text(key)
    return image


def locked_arguments() -> dict[str, str]:
    """What the lock pins beside pip's packages, for alst.def: lines `#: name=value`."""
    return dict(re.findall(r"^#: (\w+)=(\S+)$", LOCK.read_text(), re.MULTILINE))


def report(image: Path) -> str:
    """Size, digest, and what the image says of itself."""
    told = subprocess.run(
        [_find_apptainer() / "apptainer", "inspect", "--json", image], capture_output=True, text=True, check=True
    )
    labels = json.loads(told.stdout)["data"]["attributes"]["labels"]
    lines = [f"image   {image}", f"size    {image.stat().st_size / GIB:.2f} GiB"]
    lines.append(f"digest  sha256:{_sidecar(image).read_text().split()[0]}")
    return "\n".join(lines + [f"        {name} {value}" for name, value in labels.items() if name.startswith("alst.")])


# What it is built from


def _requirements(kind: Kind) -> list[str]:
    """As pyproject.toml asks, with MLflow's client alone: a job talks to a server."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in kind.extras:
        wanted += project["optional-dependencies"][extra]
    wanted = [re.sub(r"^mlflow\b", "mlflow-skinny", one) for one in wanted]
    return [one for one in wanted if not re.match(r"flash-attn\b(?!-)", one)]  # compiled from its source


def _inputs(kind: Kind, folder: Path, environment: dict[str, str]) -> Path:
    """A folder with wheels, requirements.txt and, for CUDA, flash-attention's source."""
    wanted = _requirements(kind)
    inputs = folder / f"inputs-{kind.name}-{_digest_of(LOCK.read_bytes() + repr(wanted).encode())[:12]}"
    if inputs.exists():
        return inputs
    with _replaced(inputs) as temporary:
        wheels = temporary / "wheels"
        wheels.mkdir(parents=True)
        (temporary / "requirements.txt").write_text("\n".join(wanted) + "\n")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "-d", str(wheels)]
        pip += ["-c", str(LOCK), "--find-links", str(wheels)]
        index = os.environ.get("TORCH_INDEX")
        # torch first: an open range from another package would take the newest CUDA build.
        _run([*pip, *(["--index-url", index] if index else []), "torch"], environment)
        tools = ["setuptools", "wheel", "ninja", "packaging", "py-cpuinfo"]
        _run([*pip, "torch", *tools, "-r", str(temporary / "requirements.txt")], environment)
        if kind.name == "cuda":
            _clone_flash_attention(temporary / "flash-attention", locked_arguments()["flash_attention"], environment)
    return inputs


def _clone_flash_attention(folder: Path, commit: str, environment: dict[str, str]) -> None:
    """Of flash-attn 2 and 3: the package index has no 3, and 2 not built for this torch."""
    git = ["git", "-C", str(folder)]
    _run(["git", "init", "-q", str(folder)], environment)
    _run([*git, "fetch", "-q", "--depth=1", "https://github.com/Dao-AILab/flash-attention", commit], environment)
    _run([*git, "checkout", "-q", "FETCH_HEAD"], environment)
    _run([*git, "submodule", "update", "-q", "--init", "--depth=1", "csrc/cutlass"], environment)


def _debian(folder: Path, environment: dict[str, str]) -> Path:
    """A folder with Debian in it. What Apptainer notes of where it came from is taken out again."""
    base = folder / f"base-cpu-{_digest_of(*_contents('base-cpu.def', 'shared/system.sh'))[:12]}"
    if base.exists():
        return base
    with _replaced(base) as temporary:
        _apptainer("base-cpu.def", temporary, {"mirror": apptainer.debian_mirror()}, environment, "--sandbox")
        _forget_origin(temporary)
    return base


def _forget_origin(base: Path) -> None:
    """What Apptainer and debootstrap noted of this machine and its mirror."""
    (base / ".singularity.d" / "labels.json").write_text("{}")
    (base / "etc" / "resolv.conf").write_text("")
    for name in (".singularity.d/Singularity", "etc/apt/sources.list", "etc/hostname"):
        (base / name).unlink()


def _key(kind: Kind, wanted: Sequence[str]) -> str:
    """Changes with everything an image is made of; not with the code, which is no part of it."""
    parts = [kind.definition, "base-cpu.def", "versions.lock", *sorted(str(p) for p in HERE.glob("shared/*.*"))]
    return _digest_of(*_contents(*parts), repr((kind, wanted)).encode())


def _contents(*names: str) -> list[bytes]:
    return [(HERE / name).read_bytes() for name in names]


def _commit() -> str:
    told = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return told.stdout.strip() or "unknown"


# What may be wrong


def _find_apptainer() -> Path:
    found = apptainer.find()
    if found is None:
        raise BuildError(
            "apptainer: not on the PATH; install it, load its module, or as root of a Debian run "
            "`python3 containers/apptainer.py install`"
        )
    return found


def _check_space(kind: Kind, folder: Path) -> None:
    free = shutil.disk_usage(folder).free / GIB
    if free < kind.free_gib:
        raise BuildError(
            f"{folder}: {free:.1f} GiB are free, building the {kind.name} image takes {kind.free_gib}; make room, or "
            "set ALST_IMAGES to a folder on a larger disk"
        )


def _check_python(kind: Kind) -> None:
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if here != kind.python:
        raise BuildError(
            f"Python {here}: the {kind.name} image has {kind.python}, and the Python that builds and submits must be "
            f"the same; run: make image PYTHON=python{kind.python} VENV=.venv{kind.python} IMAGE={kind.name}"
        )


# How it is built


def _environment(programs: Path, folder: Path) -> dict[str, str]:
    """For all that is called: caches here, not in $HOME; and of root's capabilities only those it has."""
    (folder / "tmp").mkdir(exist_ok=True)
    own = {
        "PATH": os.pathsep.join([str(programs), os.environ.get("PATH", os.defpath), *apptainer.SYSTEM_PATHS]),
        "PIP_CACHE_DIR": str(folder / "pip"),
        "APPTAINER_CACHEDIR": str(folder / "apptainer"),
        "APPTAINER_TMPDIR": str(folder / "tmp"),
    }
    (capabilities,) = re.findall(r"^CapEff:\s*(\w+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if os.geteuid() == 0 and not int(capabilities, 16) & CAP_SYS_RESOURCE:
        own["APPTAINER_DROP_CAPS"] = "CAP_SYS_RESOURCE"
    return os.environ | own


def _apptainer(
    definition: str, out: Path, arguments: dict[str, str], environment: dict[str, str], *options: str
) -> None:
    """Run beside a copy of the definitions: every path in them is relative, and so in the image's labels.

    Root needs no help, others --fakeroot.
    """
    context = out.parent / CONTEXT
    _remove(context)
    shutil.copytree(HERE, context, ignore=shutil.ignore_patterns("__pycache__"))
    said = [f"--build-arg={name}={value}" for name, value in arguments.items()]
    mode = [] if os.geteuid() == 0 else ["--fakeroot"]
    log = out.with_suffix(".log")
    with log.open("wb") as file:
        command = ["apptainer", "build", *mode, *options, *said, str(out), definition]
        done = subprocess.run(command, env=environment, cwd=context, stdout=file, stderr=file, check=False)
    if done.returncode:
        raise BuildError(f"{definition}: {_end_of(log)}\nall of it is in {log}")
    log.unlink()


def _run(command: Sequence[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}: {done.stderr.strip()[-2000:]}")


def _end_of(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


# Files


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """A temporary path beside it, which takes its place when all went well."""
    temporary = path.with_name(f"partial-{path.name}")
    _remove(temporary)
    try:
        yield temporary
        _remove(path)
        temporary.rename(path)
    except BaseException:
        _remove(temporary)
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_current(image: Path, key: str) -> bool:
    """Whether it was made of this, and is still what was made."""
    try:
        return _sidecar(image, "key").read_text() == key and _digest_of_file(image) == _sidecar(image).read_text()[:64]
    except FileNotFoundError:
        return False


def _sidecar(image: Path, kind: str = "sha256") -> Path:
    return image.with_name(f"{image.name}.{kind}")


def _digest_of(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(arguments: list[str]) -> int:
    folder = Path(os.environ.get("ALST_IMAGES") or f"/var/tmp/alst-images-{os.getuid()}")
    match arguments:
        case [name] if name in KINDS:
            try:
                print(report(build(KINDS[name], folder.resolve())))
            except (BuildError, apptainer.InstallError) as error:
                print(f"image: {error}", file=sys.stderr)
                return 2
            return 0
        case _:
            print(__doc__)
            return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
