"""What of a recipe comes from the Hugging Face hub, and where it lies in its cache. Reads files alone, asks no hub.

<cache>/models--org--name/refs/main                   the commit that a branch was at
                          snapshots/<commit>/…        its files
                          staged/<commit>-<part>.json which of them `alst stage` fetched, with their sizes
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.recipe.load import apply_override, check
from pipeline.recipe.schema import HuggingFaceSource, Recipe

MAIN = "main"


@dataclass(frozen=True)
class HubNeed:
    """One thing on the hub that a recipe names."""

    key: str
    """Of the recipe, that names it."""
    revision_key: str
    """Of the recipe, that says which revision."""
    kind: Literal["model", "dataset"]
    name: str
    revision: str | None
    part: Literal["config", "weights", "tokenizer", "data"]
    """Which of the repository's files are meant."""
    data_name: str | None = None
    """The data set's configuration."""

    def folder(self, cache: Path) -> Path:
        """Of the repository, in the hub's cache."""
        return _repository(cache, self.kind, self.name)

    def record(self, cache: Path, commit: str) -> Path:
        """Where `alst stage` writes which files it fetched."""
        part = self.part if self.data_name is None else f"{self.part}-{re.sub(r'[^A-Za-z0-9_.]', '_', self.data_name)}"
        return self.folder(cache) / "staged" / f"{commit}-{part}.json"

    def __str__(self) -> str:
        return f"{self.key} = {self.name!r}{f' at {self.revision}' if self.revision else ''}"


def is_hub_name(name: str) -> bool:
    """Whether a name is the hub's, and no path of this machine."""
    path = Path(name).expanduser()
    return not (path.exists() or path.is_absolute() or name.startswith((".", "~")))


def hub_needs(recipe: Recipe) -> tuple[HubNeed, ...]:
    """Everything of the recipe that its jobs will look for in the hub's cache."""
    return tuple(need for need in _named(recipe) if is_hub_name(need.name))


def _named(recipe: Recipe) -> Iterator[HubNeed]:
    model, data = recipe.model, recipe.data
    if model.name_or_path is not None:
        part: Literal["config", "weights"] = "config" if model.init == "random" else "weights"
        yield HubNeed("model.name_or_path", "model.revision", "model", model.name_or_path, model.revision, part)
    if isinstance(data.tokenizer, str):
        revision = data.tokenizer_revision
        yield HubNeed("data.tokenizer", "data.tokenizer_revision", "model", data.tokenizer, revision, "tokenizer")
    for number, source in enumerate(data.sources):
        if isinstance(source, HuggingFaceSource):
            place = f"data.sources.{number}"
            yield HubNeed(
                f"{place}.path", f"{place}.revision", "dataset", source.path, source.revision, "data", source.name
            )


def hub_cache(environment: Mapping[str, str]) -> Path:
    """Where Hugging Face's libraries keep what they fetched, in a process with this environment."""
    home = Path(environment.get("HF_HOME") or "~/.cache/huggingface")
    return Path(environment.get("HF_HUB_CACHE") or home / "hub").expanduser()


def commit_of(cache: Path, kind: str, name: str, revision: str | None) -> str | None:
    """The commit of a branch, a tag or itself, as the cache knows it."""
    folder = _repository(cache, kind, name)
    ref = folder / "refs" / (revision or MAIN)
    if ref.is_file():
        return ref.read_text(encoding="utf-8").strip()
    return revision if revision and (folder / "snapshots" / revision).is_dir() else None


def snapshot_of(cache: Path, kind: str, name: str, revision: str | None) -> Path | None:
    """The folder of a repository's files, if any of them are there."""
    commit = commit_of(cache, kind, name, revision)
    folder = _repository(cache, kind, name) / "snapshots" / str(commit)
    return folder if folder.is_dir() else None


def _repository(cache: Path, kind: str, name: str) -> Path:
    return cache / f"{kind}s--{name.replace('/', '--')}"


def pinned(recipe: Recipe, cache: Path) -> Recipe:
    """The recipe with the commit in place of each branch that the cache knows: all its jobs use the same bytes."""
    raw = recipe.model_dump(mode="json")
    for need in hub_needs(recipe):
        if (commit := commit_of(cache, need.kind, need.name, need.revision)) is not None:
            apply_override(raw, f"{need.revision_key}='{commit}'")
    return check(raw)


def missing_from(cache: Path, need: HubNeed) -> str | None:
    """What of a need is not in the cache as it was staged, or None: sizes are compared, contents are not read."""
    commit = commit_of(cache, need.kind, need.name, need.revision)
    if commit is None or not (record := need.record(cache, commit)).is_file():
        return f"{need.folder(cache)}: its {need.part} has not been staged"
    snapshot = need.folder(cache) / "snapshots" / commit
    for name, size in json.loads(record.read_text(encoding="utf-8"))["files"].items():
        if not (snapshot / name).is_file():
            return f"{snapshot / name} is not there"
        if (found := (snapshot / name).stat().st_size) != size:
            return f"{snapshot / name} has {found:,} bytes, not {size:,}"
    return None
