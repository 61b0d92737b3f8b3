"""A recipe's file, its chain of bases and the overrides become one checked `Recipe`. Nothing is downloaded or started.

recipe = load("tiny", overrides=["train.steps=50"])
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.errors import RecipeError
from pipeline.recipe.findings import findings
from pipeline.recipe.schema import Recipe

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def load(recipe: str | Path, *, overrides: Sequence[str] = ()) -> Recipe:
    """Read `recipe` (a path, or a name under configs/), merge its bases, apply `a.b=c` overrides, check everything.

    Raises RecipeError naming each bad value, the rule and the remedy; several at once where there are several.
    """
    raw = read_chain(find(recipe))
    for override in overrides:
        apply_override(raw, override)
    return check(raw)


def find(recipe: str | Path) -> Path:
    """The recipe's file: the path as given, or `<name>.yaml` under configs/."""
    given = Path(recipe)
    for candidate in (given, CONFIGS / given, CONFIGS / f"{given}.yaml"):
        if _is_file(candidate):
            return candidate
    names = (
        sorted(str(p.relative_to(CONFIGS).with_suffix("")) for p in CONFIGS.rglob("*.yaml")) if CONFIGS.exists() else []
    )
    near = difflib.get_close_matches(str(recipe), names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise RecipeError(
        f"recipe {str(recipe)!r}: no such file, nor a name under configs/; {hint}"
        f"Give a path, or one of: {', '.join(names) or 'none there'}"
    )


def _is_file(path: Path) -> bool:
    """Like Path.is_file, and False for what the system refuses as a name or does not let us see."""
    try:
        return path.is_file()
    except OSError:
        return False


def check(raw: Mapping[str, Any]) -> Recipe:
    """Validate a merged recipe. Raises RecipeError with one line per finding."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError("\n".join(findings(error, raw, Recipe))) from None


def read_chain(path: Path, *, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The recipe at `path` merged over its `base:`, that over its own, and so on. Maps merge, lists replace."""
    path = path.resolve()
    if path in below:
        chain = " -> ".join(p.name for p in (*below, path))
        raise RecipeError(f"base: {chain} is a cycle; remove the `base:` of one of them")
    raw = read_yaml(path)
    base = raw.pop("base", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise RecipeError(f"{path.name}: base = {base!r}: must be the path of one recipe; write `base: base.yaml`")
    base_path = path.parent / base
    if not _is_file(base_path):
        raise RecipeError(f"{path.name}: base = {base!r}: no such file beside the recipe; correct the path")
    return _merge(read_chain(base_path, below=(*below, path)), raw)


def read_yaml(path: Path) -> dict[str, Any]:
    """The map in a YAML file. Raises RecipeError if it is missing, unreadable, not UTF-8, not YAML, or not a map."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}; give a recipe that can be read") from None
    try:
        raw = yaml.load(text, Loader=_RecipeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "somewhere"
        raise RecipeError(f"{path}: {where}: {error.problem}; correct the YAML there") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: {error}; correct the YAML") from None
    except RecursionError:
        raise RecipeError(f"{path}: nested too deep to be a recipe; close the brackets") from None
    if raw is None:
        raise RecipeError(f"{path}: the file is empty; a recipe needs at least `base: base.yaml` and `name:`")
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: the top level is a {type(raw).__name__}, not a map; write `key: value` lines")
    return raw


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one value in place: `train.steps=50`, `data.sources.0.path=corpus/`, `memory.tiled_mlp=null`."""
    dotted, equals, text = override.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise RecipeError(f"override {override!r}: must be key=value with a dotted key; write e.g. train.steps=50")
    if not text.strip():
        raise RecipeError(f"override {override!r}: the value is empty; to switch a feature off write {dotted}=null")
    try:
        value = yaml.load(text, Loader=_RecipeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        problem = getattr(error, "problem", None) or "it cannot be read"
        raise RecipeError(
            f"override {override!r}: {text!r} is not a YAML value ({problem}); write text in quotes: \"{dotted}='...'\""
        ) from None
    node: Any = raw
    for depth, key in enumerate(keys[:-1]):
        node = _child(node, key, ".".join(keys[: depth + 1]), override)
    last: str | int = _index(node, keys[-1], override) if isinstance(node, list) else keys[-1]
    below = node.get(last) if isinstance(node, dict) else node[last]
    node[last] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value


def _child(node: Any, key: str, dotted: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, key, override)]
    if node.get(key) is None:
        node[key] = {}
    child = node[key]
    if not isinstance(child, dict | list):
        raise RecipeError(f"override {override!r}: {dotted} is {child!r}, not a section; set {dotted} itself")
    return child


def _index(node: list[Any], key: str, override: str) -> int:
    if not (key.isascii() and key.isdigit()) or int(key) >= len(node):
        raise RecipeError(f"override {override!r}: {key!r} is no place in a list of {len(node)}; count from 0")
    return int(key)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


_YAML_1_1 = {f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float", "timestamp")}


class _RecipeLoader(yaml.SafeLoader):
    """YAML 1.2's numbers and booleans (`1e-5` is a float, `off` is a word), and no key twice in one map."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is not a word", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _YAML_1_1]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))
# Decimal only: YAML 1.1 would read 010 as 8 and 1:30 as 90.
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][\d_]*)$"), list("-+0123456789")
)
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d+(?:[eE][-+]?\d+)?|\.inf|\.nan)$"),
    list("-+0123456789."),
)


class _RecipeDumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or a recipe's loader would take for a number."""


_RecipeDumper.yaml_implicit_resolvers = {
    first: [
        *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
        *_RecipeLoader.yaml_implicit_resolvers.get(first, []),
    ]
    for first in yaml.SafeDumper.yaml_implicit_resolvers.keys() | _RecipeLoader.yaml_implicit_resolvers.keys()
}


def dump(recipe: Recipe) -> str:
    """The recipe as a file that `load` reads to an equal one."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_RecipeDumper, sort_keys=False, allow_unicode=True)
