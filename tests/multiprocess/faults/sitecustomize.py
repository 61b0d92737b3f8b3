"""Faults for `test_faults`: Python imports a module of this name at start when its folder is on PYTHONPATH.

ALST_TEST_FAULT = "<where> <rank> <step>": what the real command runs is the product, but for one function that is
wrapped when its module is imported. The step is the one being done, counted from 1.
"""

import os
import signal
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

WHERE, RANK, STEP = (os.environ.get("ALST_TEST_FAULT") or "nowhere 0 0").split()
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
    def wrapped(state, path, *, folder):
        if is_the_save(folder):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"half of it")
            die()
        return write_state(state, path, folder=folder)

    return wrapped


def on_a_full_disk(write_state):
    def wrapped(state, path, *, folder):
        if is_the_save(folder):
            try:
                with BALLAST.open("wb") as file:
                    while True:
                        file.write(bytes(2**16))
            except OSError:
                pass
        return write_state(state, path, folder=folder)

    return wrapped


def before_the_name(write_record):
    def wrapped(folder, record):
        write_record(folder, record)
        if is_the_save(folder):
            die()

    return wrapped


WRAPPED = {
    "pipeline.train.loop": ("learning_rate", counted, None),
    "pipeline.memory.tiled_loss": ("tiled_loss", in_forward, "forward"),
    "pipeline.train.checkpoint_writer": (
        "write_state",
        on_a_full_disk if WHERE == "full" else in_write,
        "full" if WHERE == "full" else "save",
    ),
    "pipeline.plan.checkpoint_dir": ("write_record", before_the_name, "name"),
}


class Wrapping(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        name, wrap, where = WRAPPED[module.__name__]
        if where in (None, WHERE):
            setattr(module, name, wrap(getattr(module, name)))


class Finder(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        spec = PathFinder.find_spec(name, path, target) if name in WRAPPED else None
        if spec is not None and spec.loader is not None:
            spec.loader = Wrapping(spec.loader)
        return spec


if WHERE != "nowhere" and os.environ.get("RANK") == RANK and "train" in sys.orig_argv:
    sys.meta_path.insert(0, Finder())
