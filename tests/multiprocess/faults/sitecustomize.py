"""Faults for `test_faults`: Python imports a module of this name at start when its folder is on PYTHONPATH.

ALST_TEST_FAULT = "<where> <rank> <step>": what the real command runs is the product, but for one function that is
wrapped when its module is imported. The step is the one being done, counted from 1.
"""

import os
import signal
import sys
import time
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

WHERE, RANK, STEP = (os.environ.get("ALST_TEST_FAULT") or "nowhere 0 0").split()
SLOW_SECONDS = 30.0
READING_SECONDS = 60.0
BALLAST = Path(os.environ.get("ALST_RUNS", ".")) / "ballast"
now = {"step": 0}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def is_the_moment() -> bool:
    return now["step"] == int(STEP)


def is_the_save(folder: Path) -> bool:
    """Saves go on in a thread, while the next step is done."""
    return folder.name.endswith(f"step-{int(STEP):06d}")


def counted(learning_rate):
    """Called once a step, before its forward."""

    def wrapped(recipe, step):
        now["step"] = step
        BALLAST.unlink(missing_ok=True)
        if WHERE == "between" and is_the_moment():
            die()
        return learning_rate(recipe, step)

    return wrapped


def in_forward(tiled_loss):
    def wrapped(*args, **kwargs):
        if is_the_moment():
            die()
        return tiled_loss(*args, **kwargs)

    return wrapped


def in_write(write_state):
    def wrapped(state, path, *, folder, moved):
        if is_the_save(folder):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"half of it")
            die()
        return write_state(state, path, folder=folder, moved=moved)

    return wrapped


def on_a_full_disk(write_state):
    def wrapped(state, path, *, folder, moved):
        if is_the_save(folder):
            try:
                with BALLAST.open("wb") as file:
                    while True:
                        file.write(bytes(2**16))
            except OSError:
                pass
        return write_state(state, path, folder=folder, moved=moved)

    return wrapped


def on_a_slow_disk(write_state):
    """What it takes before SLOW_SECONDS are over, it takes in small bites."""
    began = []

    def wrapped(state, path, *, folder, moved):
        def slowly(count):
            began.append(time.monotonic())
            if is_the_save(folder) and time.monotonic() < began[0] + SLOW_SECONDS:
                time.sleep(SLOW_SECONDS / 20)
            moved(count)

        return write_state(state, path, folder=folder, moved=slowly)

    return wrapped


def on_a_disk_that_hangs(write_state):
    def wrapped(state, path, *, folder, moved):
        if is_the_save(folder):
            time.sleep(3600)
        return write_state(state, path, folder=folder, moved=moved)

    return wrapped


def hangs(attach_features):
    def wrapped(*args, **kwargs):
        time.sleep(3600)

    return wrapped


def from_a_slow_disk(build_model):
    """Reads for READING_SECONDS first."""

    def wrapped(*args, **kwargs):
        weights, ends = Path(os.environ["ALST_RUNS"]) / "weights", time.monotonic() + READING_SECONDS
        weights.write_bytes(bytes(2**22))
        while time.monotonic() < ends:
            weights.read_bytes()
            time.sleep(0.2)
        return build_model(*args, **kwargs)

    return wrapped


def at_once(seconds):
    return 0.0


def before_the_name(write_record):
    def wrapped(folder, record):
        write_record(folder, record)
        if is_the_save(folder):
            die()

    return wrapped


IN_A_WRITE = {"save": in_write, "full": on_a_full_disk, "slow": on_a_slow_disk, "hangs": on_a_disk_that_hangs}

IN_A_START = ("attaches-hanging", "loads-slowly")

WRAPPED = {
    "pipeline.model.build": ("build_model", from_a_slow_disk, "loads-slowly"),
    "pipeline.memory.apply": ("attach_features", hangs, "attaches-hanging"),
    "pipeline.train.loop": ("learning_rate", counted, None),
    "pipeline.memory.tiled_loss": ("tiled_loss", in_forward, "forward"),
    "pipeline.train.checkpoint_writer": ("write_state", IN_A_WRITE.get(WHERE), WHERE if WHERE in IN_A_WRITE else ""),
    "pipeline.plan.checkpoint_dir": ("write_record", before_the_name, "name"),
}
# What is found soon: a stall in a start that does nothing; or, after any stall, by collectives that they wait in vain.
SHORTENED = "LEAST_SECONDS" if WHERE in IN_A_START else "LEAVING_SECONDS"
ON_ALL_RANKS = {"pipeline.plan.patience": (SHORTENED, at_once, WHERE if WHERE in (*IN_A_START, "slow") else "")}


class Wrapping(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        name, wrap, where = wrapped_here[module.__name__]
        if where in (None, WHERE):
            setattr(module, name, wrap(getattr(module, name)))


class Finder(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        spec = PathFinder.find_spec(name, path, target) if name in wrapped_here else None
        if spec is not None and spec.loader is not None:
            spec.loader = Wrapping(spec.loader)
        return spec


wrapped_here = ON_ALL_RANKS | (WRAPPED if os.environ.get("RANK") == RANK else {})
if WHERE != "nowhere" and "train" in sys.orig_argv:
    sys.meta_path.insert(0, Finder())
