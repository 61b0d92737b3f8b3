"""What a person is told of a file that breaks its schema: one line per bad value, with the rule and the remedy."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError


def findings(error: ValidationError, raw: Mapping[str, Any], model: type[BaseModel]) -> list[str]:
    """One line per bad value of `model` in `raw`: `train.step: ...; did you mean 'steps'?`.

    Branches of a union share a line.
    """
    by_key: dict[str, list[str]] = {}
    for finding in error.errors():
        names_a_key = finding["type"] in ("extra_forbidden", "missing")
        path, value = _locate(finding["loc"], raw, names_a_key=names_a_key)
        dotted = ".".join(str(part) for part in path) or f"the {model.__name__.lower()}"
        match finding["type"]:
            case "extra_forbidden":
                line = f"is not a key here; {_nearest(path, model)}"
            case "missing":
                line = "is missing; add it"
            case "value_error":
                line = str(finding["ctx"]["error"])
            case "union_tag_not_found":
                path = [*path, "type"]
                dotted = ".".join(str(part) for part in path)
                line = "is missing; add it to the section"
            case _:
                line = f"= {_short(value)}: {_rule(finding)}"
        lines = by_key.setdefault(dotted, [])
        if line not in lines:
            lines.append(line)
    # A section is not also "too short" because of a finding inside it.
    leaves = [key for key in by_key if not any(other.startswith(f"{key}.") for other in by_key)]
    return [_one_line(key, by_key[key]) for key in leaves]


def _one_line(dotted: str, lines: list[str]) -> str:
    first, *others = lines
    rules = [first, *(other.partition(": ")[2] or other for other in others)]
    line = f"{dotted} " + " or ".join(rules)
    return line if ";" in line else f"{line}; correct {dotted}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _rule(finding: Mapping[str, Any]) -> str:
    """Pydantic's message as a rule: `Input should be greater than 0` -> `must be greater than 0`."""
    match finding["type"]:
        case "dict_type" | "model_type" | "model_attributes_type":
            return "must be a section of `key: value` lines"
        case "tuple_type":
            return "must be a list"
        case "too_short":
            return "must have at least one entry"
        case "union_tag_invalid":
            return f"its type must be one of {finding['ctx']['expected_tags']}"
        case "string_pattern_mismatch":
            return "must be letters, digits, dots, dashes and underscores, and start with a letter or digit"
        case _:
            return str(finding["msg"]).replace("Input should be", "must be").replace("Value error, ", "")


def _locate(loc: tuple[int | str, ...], raw: Any, *, names_a_key: bool) -> tuple[list[int | str], Any]:
    """The path of a finding in the user's own file (union branches left out), and the value there."""
    path: list[int | str] = []
    node = raw
    for depth, part in enumerate(loc):
        inside = (isinstance(node, Mapping) and part in node) or (
            isinstance(node, list | tuple) and isinstance(part, int)
        )
        if inside:
            node = node[part]
            path.append(part)
        elif names_a_key and depth == len(loc) - 1:
            return [*path, part], None
    return path, node


def _nearest(path: Sequence[int | str], model: type[BaseModel]) -> str:
    """What may stand where the last part of `path` stands."""
    fields = _fields_at(path[:-1], model)
    if path[-1] in fields:
        return "it does not go with the `type` of its section; remove it"
    near = difflib.get_close_matches(str(path[-1]), fields, n=1)
    return (
        f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(sorted(fields))}" if fields else "remove it"
    )


def _fields_at(path: Sequence[int | str], root: type[BaseModel]) -> list[str]:
    models: list[Any] = [root]
    for part in path:
        below: list[Any] = []
        for model in models:
            if isinstance(part, int):
                below.append(model)
            elif part in model.model_fields:
                below.extend(_models_in(model.model_fields[part].annotation))
        models = below
    return [name for model in models for name in model.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in getattr(annotation, "__args__", ()) for model in _models_in(argument)]
