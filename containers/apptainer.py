"""Apptainer for a machine that has none: Debian's newest package, unpacked; nothing of the host is replaced.

    python3 containers/apptainer.py install      prints the folder that belongs on the PATH

An Apptainer that is on the PATH already is used instead. apt verifies what it downloads against Debian's own keys. The
package wants a newer libc than Debian 12 has, so it comes with one, which its two programs alone use. What Apptainer
calls besides (`HELPERS`) is installed as usual. Needs Python alone.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HELPERS = ("debootstrap", "squashfs-tools", "squashfuse", "patchelf", "uidmap", "fakeroot")
PROGRAMS = ("debootstrap", "mksquashfs", "squashfuse", "patchelf", "newuidmap", "fakeroot")
PACKAGES = ("apptainer/sid", "libc6/trixie", "libseccomp2/trixie", "libsqlite3-0/trixie")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SOURCES = (Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list"))
SYSTEM_PATHS = ("/usr/sbin", "/sbin")
FOLDER = Path("/opt/alst-apptainer")
PROGRAM = FOLDER / "usr" / "bin" / "apptainer"
LIBRARIES = Path("usr/lib/x86_64-linux-gnu")


class InstallError(Exception):
    """Apptainer cannot be had here; the message says why and what to do."""


def find() -> Path | None:
    """The folder of the program: the machine's own, else what `install` made; None if there is neither."""
    own = shutil.which("apptainer")
    if own is not None:
        return Path(own).parent
    return PROGRAM.parent if PROGRAM.exists() else None


def install() -> Path:
    """The folder that belongs on the PATH. Raises InstallError."""
    found = find()
    if found is None:
        _check_machine()
        _install_helpers()
        with tempfile.TemporaryDirectory() as work:
            _unpack(_download(Path(work)))
        found = PROGRAM.parent
    if not _answers(found):
        raise InstallError(f"{found}/apptainer: does not run here; remove {FOLDER} and try again")
    return found


def debian_mirror() -> str:
    """Where this machine gets Debian from. Raises InstallError if its sources do not tell."""
    for path in SOURCES:
        text = path.read_text() if path.is_file() else ""
        found = re.search(r"^(?:URIs:|deb(?: \[[^]]*\])?)\s+(https?://\S+)", text, re.MULTILINE)
        if found:
            return found[1]
    raise InstallError(f"none of {', '.join(map(str, SOURCES))} names a mirror of Debian; add one")


def _check_machine() -> None:
    release = Path("/etc/os-release").read_text()
    if "ID=debian" not in release or os.geteuid() != 0 or os.uname().machine != "x86_64":
        raise InstallError(
            "apptainer: not on the PATH, and only root of an x86-64 Debian can install it this way; install it as "
            "https://apptainer.org/docs/admin/latest/installation.html says, or load its module"
        )


def _install_helpers() -> None:
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *SYSTEM_PATHS])
    if all(shutil.which(program, path=path) for program in PROGRAMS):
        return
    _run("apt-get", "update", "-qq")
    _run("apt-get", "install", "-qq", "-y", "--no-install-recommends", *HELPERS)


def _download(work: Path) -> Path:
    """The packages in a folder, by an apt with lists of its own: the machine's do not know these suites."""
    packages = work / "packages"
    for made in (work / "lists" / "partial", work / "cache" / "archives" / "partial", packages):
        made.mkdir(parents=True)
    lines = [f"deb [signed-by={KEYRING}] {debian_mirror()} {suite} main\n" for suite in ("sid", "trixie")]
    (work / "sources.list").write_text("".join(lines))
    own = {
        "Dir::Etc::SourceList": work / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": work / "lists",
        "Dir::Cache": work / "cache",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
    }
    options = [f"--option={name}={value}" for name, value in own.items()]
    _run("apt-get", *options, "-qq", "update")
    _run("apt-get", *options, "-qq", "download", *PACKAGES, cwd=packages)
    return packages


def _unpack(packages: Path) -> None:
    """Whole or not at all: the command itself is the last thing that works."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    runtime = FOLDER / "runtime"
    runtime.mkdir(parents=True)
    for package in sorted(packages.glob("*.deb")):
        _run("dpkg", "-x", str(package), str(FOLDER if package.name.startswith("apptainer_") else runtime))
    # A prefix that was moved: the command looks for its configuration under usr/, its starter under usr/lib/.
    (FOLDER / "usr" / "etc").symlink_to("../etc")
    (FOLDER / "usr" / "lib" / "etc").symlink_to("../../etc")
    for place in ("usr", "usr/lib"):
        (FOLDER / place / "var" / "lib" / "apptainer" / "mnt" / "session").mkdir(parents=True)
    libraries = runtime / LIBRARIES
    loader = ("--set-interpreter", str(libraries / "ld-linux-x86-64.so.2"), "--force-rpath", "--set-rpath")
    for program in (FOLDER / LIBRARIES / "apptainer/bin/starter", PROGRAM):
        _run("patchelf", *loader, str(libraries), str(program))


def _answers(programs: Path) -> bool:
    done = subprocess.run([programs / "apptainer", "--version"], capture_output=True, text=True, check=False)
    return done.returncode == 0 and "apptainer" in done.stdout


def _run(*command: str, cwd: Path | None = None) -> None:
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InstallError(f"{' '.join(command)}: {done.stderr.strip()[-2000:]}")


def main(arguments: list[str]) -> int:
    try:
        match arguments:
            case ["install"]:
                print(install())
            case _:
                print(__doc__)
                return 2
    except InstallError as error:
        print(f"apptainer: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
