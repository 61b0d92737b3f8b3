"""Everything for a GPU machine without a network: made here, carried there, run for so many minutes.

    python benchmarks/gpu_kit.py prepare                        # here: wheels, packed data, within 64 MiB, into .kit/
    python3 benchmarks/gpu_kit.py run --minutes 9 --output OUT  # there, in the same tree, with .kit/ beside it
    python benchmarks/gpu_kit.py run --minutes 4 --output OUT --rehearse   # here: the same plan, tiny, on the CPU
    python benchmarks/gpu_kit.py keep OUT/results.json benchmarks/results/h200-DATE   # here: pages and plots

The machine it is made for has Python 3.12 with torch, transformers, accelerate, typer and what scientists usually have;
WHEELS are what it lacks of what this project needs. Nothing is compiled there: the optimizer stays on the GPU.

Experiments run in the order of their worth, each with a time of its own. At any time OUT has all that was found so far,
in four files: log.txt, results.json, results.md and tests.xml.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
KIT = ROOT / ".kit"
LOCK = ROOT / "containers" / "versions.lock"
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
WHEELS = (
    *("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "submitit", "datasets", "multiprocess"),
    *("dill", "liger-kernel"),
)
BUILT = ("deepspeed", "hjson")
"""Pure Python that the index has as source alone, or that is built without its operators."""
MOST_BYTES = 64 * 2**20
"""Of the kit with the tree that it travels with."""
TREE_BYTES = 16 * 2**20
"""Left for the tree."""
CORPUS_TOKENS = 2**20

SITE = Path(tempfile.gettempdir()) / "alst-kit-site"
WORK = Path(tempfile.gettempdir()) / "alst-kit-work"
GRACE_SECONDS = 25.0
"""What a bench may take beyond its minutes, to end a run and write."""
TELL_SECONDS = 10.0
"""Between two looks at what an experiment has found so far."""
LAST_SECONDS = 50.0
"""Of all the time, kept for that of the last one."""
LEAST_MINUTES = 0.5
"""An experiment is not begun with less."""


@dataclass(frozen=True)
class Experiment:
    """A question, and the command that answers it."""

    name: str
    asks: str
    minutes: float
    """At most."""
    arguments: tuple[str, ...]
    """Of `alst bench`, or of pytest."""
    rehearsal: tuple[str, ...]
    """Instead of them, on a CPU."""
    module: Literal["bench", "pytest"] = "bench"


LLAMA = ("llama8b", "--model=meta-llama/Llama-3.1-8B")
ON_GPU = ("hardware.gpus_per_node=1", "zero.offload_optimizer=null", "optimizer.states_dtype=bfloat16")
"""Nothing is compiled for the host, and a few layers' states fit beside what is measured."""
TORCH = "model.attention=torch"
"""The kernel that is there for both sides: torch's own, which transformers calls sdpa."""
TINY = ("tiny", "--steps=1", "hardware.gpus_per_node=1")

GPU_TESTS = tuple(f"tests/gpu/test_{name}.py" for name in ("training", "sequence_chunks", "waits", "allocator"))

EXPERIMENTS = (
    Experiment(
        "tests",
        "whether training on this GPU is right at all: against the stock model, with its waits and its allocator",
        2.0,
        (*GPU_TESTS, "-x"),
        (*GPU_TESTS, "-x"),
        module="pytest",
    ),
    Experiment(
        "same-kernel-128k",
        "keep_attention against its ideal, and the reference, at 128K tokens in one document with torch's kernel",
        3.5,
        (
            *(*LLAMA, "--lengths=128K", "--layers=2", "--steps=2", "--repeats=2", "--timeout=120"),
            *("--rungs=offload,tiled-norm,keep-attention", "--engines=alst,reference", *ON_GPU, TORCH),
        ),
        (*TINY, "--lengths=1K", "--rungs=offload,tiled-norm,keep-attention", "--engines=alst,reference"),
    ),
    Experiment(
        "utilization-512k",
        "causal MFU in one document of 512K tokens, with the best kernel there is",
        2.5,
        (*LLAMA, "--lengths=512K", "--layers=2", "--steps=1", "--rungs=keep-attention", "--timeout=200", *ON_GPU),
        (*TINY, "--lengths=2K", "--rungs=keep-attention"),
    ),
    Experiment(
        "longest",
        "the longest sequence of one layer; that of the reference follows from its peaks in other experiments",
        3.0,
        (
            *(*LLAMA, "--find-max", "--layers=1", "--steps=1", "--rungs=tiled-norm,sequence-chunks", "--most=8M"),
            *("--grain=256K", "--timeout=120", "train.steps=1", *ON_GPU, TORCH),
        ),
        (*TINY, "--find-max", "--layers=1", "--rungs=tiled-norm,sequence-chunks", "--most=2K", "--grain=1K"),
    ),
    Experiment(
        "chunks-256k",
        "what layers in chunks cost at 256K tokens in one document, where whole layers fit too",
        3.0,
        (
            *(*LLAMA, "--lengths=256K", "--layers=2", "--steps=2", "--rungs=layer-groups,sequence-chunks"),
            *("--timeout=120", *ON_GPU, TORCH),
        ),
        (*TINY, "--lengths=1K", "--rungs=layer-groups,sequence-chunks"),
    ),
    Experiment(
        "short-32k",
        "whether the reference is faster anywhere: 32K and 64K tokens, where features cost most; and its peaks",
        3.0,
        (
            *(*LLAMA, "--lengths=32K,64K", "--layers=2", "--steps=3", "--rungs=offload,recipe", "--timeout=90"),
            *("--engines=alst,reference", *ON_GPU, TORCH),
        ),
        (*TINY, "--lengths=512,1K", "--rungs=offload,recipe", "--engines=alst,reference"),
    ),
    Experiment(
        "ladder-64k",
        "what each feature costs and saves at 64K tokens",
        4.0,
        (*LLAMA, "--lengths=64K", "--layers=2", "--steps=2", "--timeout=90", *ON_GPU, TORCH),
        (*TINY, "--lengths=1K"),
    ),
)
"""Most valuable first."""


# Here


def prepare(kit: Path) -> None:
    """Wheels and data. Raises SystemExit where they are too large, or cannot be had."""
    if kit.exists():
        shutil.rmtree(kit)
    wheels = kit / "wheels"
    wheels.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    target = ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
    target += [part for platform in PLATFORMS for part in ("--platform", platform)]
    _call([*pip, "download", "-q", "--no-deps", *target, "-d", str(wheels), *_pinned(WHEELS)])
    building = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(wheels), *_pinned(BUILT)]
    _call(building, DS_BUILD_OPS="0")
    tokens, text = f"data.sources.0.tokens={CORPUS_TOKENS}", "data.sources.0.max_document_tokens=null"
    rows = ["data.seq_len=16384", "data.packing.unfilled_last=drop", "train.self_check=null"]
    _call([sys.executable, "-m", "pipeline.cli", "pack", "tiny", "--output", str(kit / "corpus"), tokens, text, *rows])
    print("\n".join(_sizes(kit)))
    check_size(kit)


def _pinned(names: Sequence[str]) -> list[str]:
    """`name==version`, as the lock has it."""
    lines = LOCK.read_text(encoding="utf-8").splitlines()
    versions = dict(line.partition("==")[::2] for line in lines if "==" in line and not line.startswith("#"))
    by_name = {name.strip().lower().replace("_", "-"): version.strip() for name, version in versions.items()}
    return [f"{name}=={by_name[name]}" for name in names]


def check_size(kit: Path) -> None:
    """Raises SystemExit if the kit leaves too little for the tree that it travels with."""
    total = kit_bytes(kit)
    if total > MOST_BYTES - TREE_BYTES:
        raise SystemExit(
            f"{kit}: {total / 2**20:.1f} MiB, and at most {(MOST_BYTES - TREE_BYTES) / 2**20:.0f} MiB travel with the "
            "tree; take a wheel out of WHEELS, or lower CORPUS_TOKENS"
        )


def kit_bytes(kit: Path) -> int:
    return sum(path.stat().st_size for path in kit.rglob("*") if path.is_file())


def _sizes(kit: Path) -> list[str]:
    lines = [f"{kit_bytes(part) / 2**20:8.2f} MiB  {part.name}" for part in sorted(kit.iterdir())]
    lines += [f"{wheel.stat().st_size / 2**20:8.2f} MiB    {wheel.name}" for wheel in sorted(kit.glob("wheels/*"))]
    return [*lines, f"{kit_bytes(kit) / 2**20:8.2f} MiB  in all, of at most {(MOST_BYTES - TREE_BYTES) / 2**20:.0f}"]


def _call(command: list[str], **variables: str) -> None:
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, check=False)
    if done.returncode:
        raise SystemExit(f"gpu_kit: {' '.join(command)} ended with {done.returncode}")


# There


@dataclass(frozen=True)
class Journey:
    """A run of the plan: where things lie, how long it may take, who is told."""

    kit: Path
    output: Path
    minutes: float
    rehearse: bool
    now: Callable[[], float] = time.monotonic

    def run(self, experiments: Sequence[Experiment] = EXPERIMENTS) -> None:
        """Every experiment for which there is time; what was found is in `output` after each."""
        end = self.now() + 60 * self.minutes - LAST_SECONDS
        if not (self.kit / "corpus" / "manifest.json").is_file():
            raise SystemExit(
                f"{self.kit}: no kit; make it with `python benchmarks/gpu_kit.py prepare`, and carry it along"
            )
        self.output.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(WORK, ignore_errors=True)
        variables = self._installed()
        for experiment in experiments:
            left = (end - self.now()) / 60
            if left < LEAST_MINUTES:
                self._tell(f"{experiment.name}: not begun, the time is up")
                continue
            minutes = min(left, experiment.minutes)
            self._tell(f"{experiment.name}: {experiment.asks}; at most {minutes:.1f} of {left:.1f} minutes")
            self._try(experiment, minutes, variables, experiments)
            self._gather(experiments)
        self._tell("done")

    def _installed(self) -> dict[str, str]:
        """The environment of the experiments: with the wheels, unless the packages are there."""
        if self.rehearse:
            return {}
        shutil.rmtree(SITE, ignore_errors=True)
        options = ["-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target", str(SITE)]
        wheels = [str(wheel) for wheel in sorted(self.kit.glob("wheels/*.whl"))]
        _call([sys.executable, "-m", "pip", "install", *options, *wheels])
        return {"PYTHONPATH": os.pathsep.join([str(SITE), str(ROOT)])}

    def command(self, experiment: Experiment, minutes: float) -> list[str]:
        arguments = experiment.rehearsal if self.rehearse else experiment.arguments
        if experiment.module == "pytest":
            report = f"--junitxml={self.output / 'tests.xml'}"
            return [sys.executable, "-m", "pytest", *arguments, "-rs", report]
        options = [f"--minutes={minutes:.3f}", f"--data={self.kit / 'corpus'}", f"--output={work_of(experiment)}"]
        return [sys.executable, "-m", "pipeline.cli", "bench", *arguments, *options]

    def _try(
        self, experiment: Experiment, minutes: float, variables: dict[str, str], experiments: Sequence[Experiment]
    ) -> None:
        """In a process group of its own, which may fail without ending the plan, and leaves nothing running."""
        with (self.output / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                self.command(experiment, minutes),
                cwd=ROOT,
                env=os.environ | variables,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                ended = self._wait(process, experiments, seconds=60 * minutes + GRACE_SECONDS)
            finally:
                end(process)
        self._tell(f"{experiment.name}: {ended}")

    def _wait(self, process: subprocess.Popen[bytes], experiments: Sequence[Experiment], *, seconds: float) -> str:
        """How it ended. A bench ends by itself at its minutes; what it has found is told meanwhile."""
        deadline = self.now() + seconds
        while self.now() < deadline:
            try:
                return f"ended with {process.wait(TELL_SECONDS)}"
            except subprocess.TimeoutExpired:
                self._gather(experiments)
        return "was ended at its time"

    def _gather(self, experiments: Sequence[Experiment]) -> None:
        """All results in one file, all pages in another."""
        found, pages = {}, []
        for experiment in experiments:
            folder = work_of(experiment)
            if (folder / "results.json").is_file():
                found[experiment.name] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            if (folder / "results.md").is_file():
                page = (folder / "results.md").read_text(encoding="utf-8")
                pages.append(f"<!-- {experiment.name}: {experiment.asks} -->\n{page}")
        _write(self.output / "results.json", json.dumps(found, indent=1) + "\n")
        _write(self.output / "results.md", "\n".join(pages))

    def _tell(self, text: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {text}"
        print(line, flush=True)
        with (self.output / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"\n== {line}\n")


def chosen(names: str) -> tuple[Experiment, ...]:
    """The experiments of these names, in the plan's order. Raises SystemExit for one that is none."""
    asked = [name for name in names.split(",") if name]
    known = [experiment.name for experiment in EXPERIMENTS]
    if unknown := [name for name in asked if name not in known]:
        raise SystemExit(f"--only {unknown[0]}: no such experiment; use some of {', '.join(known)}")
    return tuple(experiment for experiment in EXPERIMENTS if not asked or experiment.name in asked)


def end(process: subprocess.Popen[bytes]) -> None:
    """And all that it started: a bench that is told to go ends its runs."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)


def work_of(experiment: Experiment) -> Path:
    """Where an experiment's bench keeps its runs."""
    return WORK / experiment.name


# Here again


def keep(found: Path, folder: Path) -> None:
    """What came back, as pages and plots under benchmarks/results/: one folder an experiment."""
    from pipeline.bench.report import write_report
    from pipeline.bench.results import read_results

    for name, raw in json.loads(found.read_text(encoding="utf-8")).items():
        own = folder / name
        own.mkdir(parents=True, exist_ok=True)
        _write(own / "results.json", json.dumps(raw, indent=1) + "\n")
        print(write_report(read_results(own / "results.json"), own))


def _write(path: Path, text: str) -> None:
    """Whole, or as it was before."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("plan", help="print the experiments in their order")
    here = commands.add_parser("prepare", help="make the kit, with a network")
    there = commands.add_parser("run", help="run the plan, without one")
    for command in (here, there):
        command.add_argument("--kit", type=Path, default=KIT)
    there.add_argument("--minutes", type=float, required=True, help="for all of it, start and end included")
    there.add_argument("--output", type=Path, required=True, help="a folder; results are in it after each experiment")
    there.add_argument(
        "--rehearse", action="store_true", help="tiny shapes on this CPU, with the packages that are here"
    )
    there.add_argument(
        "--only", default="", help="these experiments, with commas between them; all, if nothing is said"
    )
    back = commands.add_parser("keep", help="what came back, as pages and plots")
    back.add_argument("results", type=Path, help="the results.json that came back")
    back.add_argument("folder", type=Path, help="e.g. benchmarks/results/h200-20261128")
    asked = parser.parse_args()
    match asked.command:
        case "prepare":
            prepare(asked.kit.resolve())
        case "run":
            journey = Journey(asked.kit.resolve(), asked.output.resolve(), asked.minutes, asked.rehearse)
            journey.run(chosen(asked.only))
        case "keep":
            keep(asked.results, asked.folder)
        case _:
            for experiment in EXPERIMENTS:
                print(f"{experiment.name} ({experiment.minutes:g} min): {experiment.asks}")


if __name__ == "__main__":
    main()
