"""The rooms of the house: who may import whom, and what no file may do. Read from the source, nothing is imported."""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "pipeline"

ROOMS: dict[str, set[str]] = {
    # A room knows itself, errors, and the rooms or modules named here. A new room needs a line.
    "cli": {"recipe", "plan", "launch", "data", "model.support", "train.export", "metrics", "bench"},
    "errors": set(),
    "files": set(),
    "direct_io": set(),
    "recipe": set(),
    "plan": {"recipe"},
    "launch": {"recipe", "plan", "data", "train"},  # data and train: inside functions of entry only, see below
    "parallel": set(),
    "data": {"recipe", "plan", "parallel.shard", "direct_io"},
    "attention": {"parallel"},
    "memory": {"recipe", "plan", "parallel", "attention", "direct_io", "model.anatomy"},  # anatomy: where to attach
    "model": {"recipe", "plan", "parallel", "attention", "memory"},
    "metrics": {"recipe", "plan"},
    "train": {"recipe", "plan", "data", "parallel", "attention", "memory", "model", "metrics"},
    "bench": {"recipe", "plan", "launch", "metrics"},  # it measures from outside: runs are processes of their own
}

# What a login node has; nothing else may be imported by the rooms that run there, not even inside a function.
LOGIN_ROOMS = ("cli", "errors", "files", "recipe", "plan", "launch")
LOGIN_LIBRARIES = {"pydantic", "yaml", "rich", "typer", "submitit", "huggingface_hub"}

# Libraries that one place alone may know.
OWNERS = {
    "mlflow": ("pipeline.metrics.mirror",),
    "deepspeed": ("pipeline.train",),
    "liger_kernel": ("pipeline.memory.tiled_loss",),
    "submitit": ("pipeline.launch",),
    "huggingface_hub": ("pipeline.launch.stage",),
    "typer": ("pipeline.cli",),
    "matplotlib": ("pipeline.metrics", "pipeline.data", "pipeline.bench"),
}

MOST_LINES = 60


@dataclass(frozen=True)
class Import:
    importer: str
    """Dotted name of the module that imports."""
    imported: str
    """Dotted name of what is imported, down to the module where that is known."""
    line: int
    in_function: bool
    for_types: bool
    """Under `if TYPE_CHECKING`."""

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


@cache
def modules() -> dict[str, ast.Module]:
    return {name_of(path): ast.parse(path.read_text(), filename=str(path)) for path in sorted(PACKAGE.rglob("*.py"))}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports() -> tuple[Import, ...]:
    return tuple(found for name, tree in modules().items() for found in _imports_in(name, tree.body, False, False))


def _imports_in(name: str, body: list[ast.stmt], in_function: bool, for_types: bool) -> Iterator[Import]:
    for node in body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, alias.name, node.lineno, in_function, for_types)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                origin = node.module or ""
                below = f"{origin}.{alias.name}"
                yield Import(name, below if below in modules() else origin, node.lineno, in_function, for_types)
        else:
            inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            types = for_types or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
            for block in ("body", "handlers", "orelse", "finalbody", "cases"):
                yield from _imports_in(name, getattr(node, block, []), inside, types)


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "pipeline"


def node_of(module: str) -> str:
    """A room; the anatomy of a model is one of its own, a leaf that both `memory` and `model` stand on."""
    return "model.anatomy" if is_within(module, "pipeline.model.anatomy") else room_of(module)


def is_ours(imported: str) -> bool:
    return imported.split(".")[0] == "pipeline"


def is_within(module: str, place: str) -> bool:
    return module == place or module.startswith(f"{place}.")


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield name, node


def source_lines() -> Iterator[tuple[str, int, str]]:
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "configs").rglob("*.yaml"), PACKAGE.parent / "Makefile"]
    for path in sorted(files):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            yield str(path.relative_to(PACKAGE.parent)), number, line


# The reader of this file can be trusted


def test_imports_are_seen_wherever_they_stand():
    tree = ast.parse("""
import a
if TYPE_CHECKING:
    import b
def f():
    try:
        import c
    except E:
        import d
    match x:
        case 1:
            from e.f import g
class C:
    def m(self):
        with x:
            import h
""")
    seen = {(i.imported, i.in_function, i.for_types) for i in _imports_in("pipeline.x", tree.body, False, False)}
    assert seen == {
        ("a", False, False),
        ("b", False, True),
        ("c", True, False),
        ("d", True, False),
        ("e.f", True, False),
        ("h", True, False),
    }


def test_the_package_is_seen():
    assert {"pipeline.cli", "pipeline.recipe.load", "pipeline.plan.job", "pipeline.train.main"} <= modules().keys()
    assert any(i.importer == "pipeline.plan.job" and i.imported == "pipeline.recipe.load" for i in imports())


# Who may import whom


def test_every_room_has_said_whom_it_may_import():
    assert {room_of(name) for name in modules()} - {"pipeline"} <= ROOMS.keys()


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_imports_only_the_rooms_it_may(room):
    allowed = [f"pipeline.{place}" for place in (room, "errors", "files", *ROOMS[room])]
    strays = [
        str(found)
        for found in imports()
        if room_of(found.importer) == room and is_ours(found.imported) and found.imported != "pipeline"
        if not any(is_within(found.imported, place) for place in allowed)
    ]
    assert strays == []


def test_rooms_do_not_import_each_other_in_a_circle():
    edges: dict[str, set[str]] = {node: set() for node in (*ROOMS, "model.anatomy")}
    for found in imports():
        if is_ours(found.imported) and found.imported != "pipeline" and room_of(found.importer) != "pipeline":
            edges[node_of(found.importer)].add(node_of(found.imported))
    edges = {room: below - {room} for room, below in edges.items()}
    while free := [room for room, below in edges.items() if not below & edges.keys()]:
        for room in free:
            del edges[room]
    assert edges == {}


@pytest.mark.parametrize("room", LOGIN_ROOMS)
def test_what_runs_on_a_login_node_imports_only_what_is_there(room):
    strays = [
        str(found)
        for found in imports()
        if room_of(found.importer) == room and not is_ours(found.imported)
        if (library := found.imported.split(".")[0]) not in LOGIN_LIBRARIES and library not in sys.stdlib_module_names
    ]
    assert strays == []


def test_only_entry_knows_the_stages_and_only_inside_its_functions():
    stages = [
        found
        for found in imports()
        if room_of(found.importer) == "launch" and is_ours(found.imported)
        if room_of(found.imported) in ("data", "train")
    ]
    assert {found.importer for found in stages} == {"pipeline.launch.entry"}
    assert [str(found) for found in stages if not found.in_function] == []


def test_the_command_imports_a_subcommands_modules_only_when_it_runs():
    early = [
        str(found)
        for found in imports()
        if found.importer == "pipeline.cli" and is_ours(found.imported) and not (found.in_function or found.for_types)
        if found.imported not in ("pipeline", "pipeline.errors", "pipeline.files")
    ]
    assert early == []


SHARED_BY_FEATURES = {"disk", "hidden_states", "host_arena", "keys_values", "layer_call", "offload", "tiled_module"}
"""Of pipeline.memory: where things wait, and how a module is run in parts; no feature, and none knows one."""


def test_features_do_not_know_each_other_and_apply_knows_them_all():
    """fp8 is a store around a store. All others know what they share, and nothing else of the room."""
    shared = {f"pipeline.memory.{name}" for name in SHARED_BY_FEATURES}
    neighbours = {
        (found.importer, found.imported)
        for found in imports()
        if is_within(found.importer, "pipeline.memory") and is_within(found.imported, "pipeline.memory")
    }
    assert {pair for pair in neighbours if pair[0] != "pipeline.memory.apply" and pair[1] not in shared} == set()
    known = {imported for importer, imported in neighbours if importer == "pipeline.memory.apply"}
    rooms = {name for name in modules() if is_within(name, "pipeline.memory")}
    assert rooms - shared - known == {"pipeline.memory", "pipeline.memory.apply"}


def test_others_reach_the_features_through_apply_alone():
    past_apply = [
        str(found)
        for found in imports()
        if is_within(found.imported, "pipeline.memory") and found.imported != "pipeline.memory.apply"
        if not is_within(found.importer, "pipeline.memory")
    ]
    assert past_apply == []


@pytest.mark.parametrize("library", sorted(OWNERS))
def test_a_library_is_known_where_it_belongs(library):
    strays = [
        str(found)
        for found in imports()
        if is_within(found.imported, library)
        if not any(is_within(found.importer, owner) for owner in OWNERS[library])
    ]
    assert strays == []


def test_no_module_takes_what_another_keeps_to_itself():
    private = [
        f"{name}:{node.lineno} takes {alias.name} from {node.module}"
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and is_ours(node.module or "")
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert private == []


# What no file may do


def patched_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Assignments to an attribute of something imported from a library, by `=`, `setattr`, or `del`."""
    foreign = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        and not is_ours(getattr(node, "module", None) or node.names[0].name)
        for alias in node.names
    }
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = [target for target in node.targets if isinstance(target, ast.Attribute)]
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target] if isinstance(node.target, ast.Attribute) else []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr"):
            targets = node.args[:1]
        for target in targets:
            root = target
            while isinstance(root, ast.Attribute | ast.Subscript):
                root = root.value
            if isinstance(root, ast.Name) and root.id in foreign:
                yield target.lineno, ast.unparse(target)


def test_patches_are_seen():
    tree = ast.parse("""
import torch
import torch.utils.checkpoint as checkpoint
from transformers import LlamaMLP
from pipeline.errors import UserError
torch.nn.functional.silu = mine
checkpoint.CheckpointFunction = mine
LlamaMLP.forward = mine
setattr(torch, "x", 1)
del torch.y
UserError.exit_code = 3
self.torch = torch
mine.forward = LlamaMLP
""")
    assert [line for line, _ in sorted(patched_names(tree))] == [6, 7, 8, 9, 10]


def test_no_global_of_a_library_is_patched():
    patched = [
        f"{name}:{line} sets {target}" for name, tree in modules().items() for line, target in patched_names(tree)
    ]
    assert patched == []


def test_no_function_is_longer_than_a_screen():
    long = [
        f"{name}.{node.name} has {length} lines"
        for name, node in functions()
        if (length := node.end_lineno - node.lineno + 1) > MOST_LINES
    ]
    assert long == []


def test_nothing_is_left_to_do_later():
    words = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")
    assert [f"{path}:{number}: {line}" for path, number, line in source_lines() if words.search(line)] == []


def test_every_module_opens_with_its_place():
    silent = [name for name, tree in modules().items() if tree.body and not ast.get_docstring(tree)]
    assert silent == []


def test_no_error_is_swallowed_without_being_named():
    """`except: pass` hides what nobody thought of; an error that is expected is caught by its name."""
    swallowed = [
        f"{name}:{node.lineno}"
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler)
        if node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
        if all(isinstance(statement, ast.Pass | ast.Continue) for statement in node.body)
    ]
    assert swallowed == []


def test_imports_say_the_whole_path():
    relative = [
        f"{name}:{node.lineno}"
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []


COLLECTIVES = {"all_reduce", "all_gather", "all_to_all", "all_to_all_single", "barrier", "broadcast", "reduce_scatter"}
COLLECTIVES |= {"all_gather_into_tensor", "all_gather_object", "reduce_scatter_tensor", "broadcast_object_list"}


def lonely_collectives(tree: ast.Module) -> Iterator[int]:
    """Collectives that some rank may not reach: inside `except`, or under an `if` that asks for a rank."""
    for node in ast.walk(tree):
        lonely = isinstance(node, ast.ExceptHandler) or (
            isinstance(node, ast.If) and re.search(r"\brank\b", ast.unparse(node.test)) is not None
        )
        if not lonely:
            continue
        for inner in (inner for statement in node.body for inner in ast.walk(statement)):
            if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Attribute | ast.Name):
                called = inner.func.attr if isinstance(inner.func, ast.Attribute) else inner.func.id
                if called in COLLECTIVES:
                    yield inner.lineno


def test_lonely_collectives_are_seen():
    tree = ast.parse("""
try:
    dist.barrier()
except E:
    dist.barrier()
if mesh.rank == 0:
    dist.all_reduce(x)
if ranks:
    dist.all_reduce(x)
""")
    assert sorted(lonely_collectives(tree)) == [5, 7]


def test_no_collective_stands_where_some_rank_may_not_come():
    assert [f"{name}:{line}" for name, tree in modules().items() for line in lonely_collectives(tree)] == []
