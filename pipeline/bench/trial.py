"""One case, run: its training job as processes of their own, and what became of it. Whatever happens in there, out of
memory, an illegal access, no end, comes back as a row.
"""

import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from pipeline.bench.cases import Case
from pipeline.errors import DataError
from pipeline.files import replaced
from pipeline.metrics.rows import read_steps
from pipeline.plan.estimate import estimate
from pipeline.plan.job import JobPlan
from pipeline.plan.run_dir import RunDir
from pipeline.recipe.load import dump

ROOT = Path(__file__).resolve().parents[2]
GRACE_SECONDS = 20.0  # between SIGTERM and SIGKILL: the launcher itself gives its ranks ten
WARM_UP_STEPS = 1
PARTS = ("data", "forward", "backward", "optimizer", "communication", "offload_stall")
MEDIANS = ("step_seconds", "tokens_per_second_per_gpu", "mfu", "hfu", *(f"{part}_seconds" for part in PARTS))
PEAKS = (
    *("peak_device_bytes", "peak_device_reserved_bytes", "peak_host_rss_bytes", "host_rss_bytes"),
    *("pinned_bytes", "offloaded_bytes"),
)
"""Names in metrics.jsonl."""


class Outcome(StrEnum):
    """How a run ended."""

    OK = "ok"
    OUT_OF_MEMORY = "out of memory"
    ILLEGAL_ACCESS = "illegal access"
    TIMEOUT = "timeout"
    REFUSED = "refused"
    """Before the first step, with what to change: a plan that cannot be."""
    FAILED = "failed"


SIGNS: tuple[tuple[Outcome, re.Pattern[str]], ...] = (
    (
        Outcome.OUT_OF_MEMORY,
        re.compile(
            r"OutOfMemoryError|out of memory|cudaErrorMemoryAllocation|can't allocate memory|Cannot allocate memory"
            r"|\bMemoryError\b|ended by SIGKILL|host memory (is|has)|std::bad_alloc",
            re.IGNORECASE,
        ),
    ),
    (
        Outcome.ILLEGAL_ACCESS,
        re.compile(r"illegal memory access|misaligned address|illegal instruction|ended by SIGSEGV|ended by SIGBUS"),
    ),
)
"""What a log says, and the outcome it is a sign of. SIGKILL from nobody here is the kernel's, out of host memory."""

PORT_TAKEN = re.compile(r"failed to listen on any local network address|address already in use", re.IGNORECASE)
"""Another process of this machine took the port between its choice and its use: says nothing of the case."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Medians over the measured steps; bytes are peaks. The first step compiles and allocates, and is left out."""

    steps: int
    step_seconds: float
    least_step_seconds: float
    most_step_seconds: float
    tokens_per_second_per_gpu: float
    data_seconds: float
    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float
    communication_seconds: float | None
    """None where forward and backward do not tell what they wait for; so is the next."""
    offload_stall_seconds: float | None
    mfu: float | None
    hfu: float | None
    peak_device_bytes: int | None
    peak_device_reserved_bytes: int | None
    peak_host_rss_bytes: int
    host_rss_bytes: int
    pinned_bytes: int | None
    """None where the engine does not tell; so is the next."""
    offloaded_bytes: int | None
    first_loss: float
    last_loss: float

    @property
    def offload_stall_share(self) -> float | None:
        return None if self.offload_stall_seconds is None else self.offload_stall_seconds / self.step_seconds


@dataclass(frozen=True)
class Row:
    """A case, and what became of it."""

    case: Case
    outcome: Outcome
    detail: str
    """What the run said when it ended otherwise than well."""
    attention: str | None
    """The kernel that ran, with its version."""
    measured: Measured | None
    """None where not one step ended."""
    predicted: Mapping[str, float | None]
    """By the plan: seconds of a step, GPU and host bytes."""
    plan: Mapping[str, Any]
    """Resolved, as in plan.json."""
    command: str
    """That repeats it."""
    wall_seconds: float
    began: str

    @property
    def key(self) -> str:
        return self.case.key

    @property
    def documents(self) -> str:
        """What its sample was made of."""
        if not self.plan:
            return "?"
        data = self.plan["recipe"]["data"]
        longest = data["sources"][0].get("max_document_tokens")
        return "one" if data["cross_document_attention"] or longest is None else f"of {longest:,} tokens"

    def to_json(self) -> dict[str, Any]:
        return {"key": self.key, **asdict(self)}

    @classmethod
    def of_json(cls, raw: Mapping[str, Any]) -> "Row":
        names = {field.name for field in fields(cls)}
        values = {name: value for name, value in raw.items() if name in names}
        measured = None if values["measured"] is None else Measured(**values["measured"])
        return cls(
            **values | {"case": Case(**values["case"]), "outcome": Outcome(raw["outcome"]), "measured": measured}
        )


@dataclass(frozen=True)
class Bench:
    """Where a bench keeps what it makes."""

    folder: Path

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def recipe(self, case: Case) -> Path:
        return self.folder / "cases" / f"{case.key}.yaml"

    def log(self, case: Case) -> Path:
        return self.folder / "logs" / f"{case.key}.log"

    def run_folders(self, case: Case) -> list[Path]:
        return sorted(self.runs.glob(f"{case.key}-2*"))


def run_trial(case: Case, plan: JobPlan, bench: Bench, *, timeout_seconds: float) -> Row:
    """Run the case to its end, or for so long."""
    for old in bench.run_folders(case):  # of a bench that was interrupted
        shutil.rmtree(old)
    recipe = bench.recipe(case)
    recipe.parent.mkdir(parents=True, exist_ok=True)
    with replaced(recipe) as temporary:
        temporary.write_text(dump(plan.recipe), encoding="utf-8")
    command = command_of(case, recipe)
    began, clock = time.strftime("%Y-%m-%dT%H:%M:%S%z"), time.monotonic()
    code = _run(command, bench, bench.log(case), timeout_seconds)
    found = bench.run_folders(case)
    run_dir = RunDir(found[-1]) if found else None
    text = said_by(bench.log(case), run_dir)
    steps = steps_in(run_dir)
    outcome = outcome_of(code, text, steps=len(steps), asked=plan.recipe.train.steps)
    expected = estimate(plan)
    return Row(
        case=case,
        outcome=outcome,
        detail="" if outcome is Outcome.OK else detail_of(text, outcome, timeout_seconds),
        attention=attention_of(text),
        measured=measured_in(steps),
        predicted={
            "step_seconds": None if expected.seconds is None else expected.seconds.total,
            "gpu_bytes": None if expected.load.hardware.memory_bytes is None else expected.load.gpu.total,
            "host_bytes": expected.load.host.total,
        },
        plan=plan.to_json(),
        command=f"ALST_RUNS={bench.runs} {shlex.join(command)}",
        wall_seconds=time.monotonic() - clock,
        began=began,
    )


def command_of(case: Case, recipe: Path) -> list[str]:
    """The product's own command, or that of the baseline."""
    if case.engine == "alst":
        return [sys.executable, "-P", "-m", "pipeline.cli", "train", str(recipe)]
    return [sys.executable, "-m", "benchmarks.baselines.launch", case.engine, str(recipe)]


def _run(command: Sequence[str], bench: Bench, log: Path, timeout_seconds: float) -> int | None:
    """The exit code; None if it was ended at the timeout. Nothing of it is left running."""
    log.parent.mkdir(parents=True, exist_ok=True)
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"ALST_RUNS": str(bench.runs), "PYTHONPATH": paths}
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the whole session of a process, politely, then not."""
    for number, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break  # all of it has ended
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue


def said_by(log: Path, run_dir: RunDir | None) -> str:
    """All that the run printed, rank by rank."""
    logs = [log, *(sorted(run_dir.path.glob("logs/*/*/rank*.log")) if run_dir is not None else ())]
    return "\n".join(path.read_text(errors="replace") for path in logs)


def steps_in(run_dir: RunDir | None) -> list[dict[str, Any]]:
    if run_dir is None:
        return []
    try:
        return read_steps(run_dir.metrics)
    except DataError:
        return []


def outcome_of(code: int | None, text: str, *, steps: int, asked: int) -> Outcome:
    """By the exit code (None: ended at the timeout) and what was printed."""
    if code == 0 and steps == asked:
        return Outcome.OK
    if code is None:
        return Outcome.TIMEOUT
    for outcome, sign in SIGNS:
        if sign.search(text):
            return outcome
    return Outcome.REFUSED if code == 2 else Outcome.FAILED


def detail_of(text: str, outcome: Outcome, timeout_seconds: float) -> str:
    """The line that says why."""
    if outcome is Outcome.TIMEOUT:
        return f"no end after {timeout_seconds:,.0f} s"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    signs = [sign for kind, sign in SIGNS if kind is outcome]
    telling = [line for line in lines if any(sign.search(line) for sign in signs)]
    errors = [line for line in lines if re.search(r"(Error|error)\b", line) or line.startswith("alst: ")]
    return next(iter([*telling, *errors[-1:], *lines[-1:]]), "it said nothing")[:400]


def attention_of(text: str) -> str | None:
    found = re.search(r"^attention: (?!passed over)(.+)$", text, flags=re.MULTILINE)
    return None if found is None else found[1].strip()


def measured_in(rows: Sequence[Mapping[str, Any]]) -> Measured | None:
    """Of the rows of metrics.jsonl."""
    calm = rows[WARM_UP_STEPS:] or rows
    if not calm:
        return None
    seconds = [row["step_seconds"] for row in calm]
    of_a_step: dict[str, Any] = {name: _median([row.get(name) for row in calm]) for name in MEDIANS}
    peaks: dict[str, Any] = {name: _peak([row.get(name) for row in rows]) for name in PEAKS}
    return Measured(
        steps=len(calm),
        least_step_seconds=min(seconds),
        most_step_seconds=max(seconds),
        first_loss=rows[0]["loss"],
        last_loss=rows[-1]["loss"],
        **of_a_step,
        **peaks,
    )


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _peak(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None
