"""`alst stage`: what a recipe names on the Hugging Face hub, fetched into the cache that jobs read; no torch needed.

The only place that knows huggingface_hub. Runs on a node with internet, before anything is submitted.
"""

import errno
import fnmatch
import glob
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, metadata_load
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pipeline.errors import RunError, UserError
from pipeline.files import write_json
from pipeline.plan.hub_cache import MAIN, HubNeed, hub_needs
from pipeline.recipe.schema import Recipe

CONFIG_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = (
    "config.json",  # transformers finds the tokenizer's class there
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template.*", "additional_chat_templates/*",
)  # fmt: skip
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Of one file, and `<name>.index.json` of many; the first that there is, as transformers chooses."""
DATA_CARD = "README.md"


def stage(recipe: Recipe, *, cache: Path, token: str | None = None) -> Iterator[str]:
    """Fetch what is not in the cache yet; a line per thing. An interrupted one goes on where it was.

    Raises UserError if the hub cannot be reached, does not know it, or wants a token; RunError if it breaks off.
    """
    needs = hub_needs(recipe)
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    for need in needs:
        with _told(need):
            commit, files = _fetch(api, need, cache=cache)
        size = sum(files.values()) / 2**30
        yield f"{need.name}: {need.part} of commit {commit[:12]}, {len(files)} files, {size:.2f} GiB"
    yield f"staged in {cache}" if needs else "nothing of this recipe is on the hub"


def _fetch(api: HfApi, need: HubNeed, *, cache: Path) -> tuple[str, dict[str, int]]:
    """The commit, and the files of a need with their bytes; all are in the cache then, and recorded there."""
    revision = need.revision or MAIN
    commit = str(api.repo_info(need.name, repo_type=need.kind, revision=revision).sha)
    names = api.list_repo_files(need.name, repo_type=need.kind, revision=commit)
    wanted = _wanted(api, need, names, commit=commit, cache=cache)
    fetched = api.snapshot_download(
        need.name,
        repo_type=need.kind,
        revision=revision,  # of a branch the cache then knows the commit
        cache_dir=cache,
        allow_patterns=[glob.escape(name) for name in wanted],
    )
    folder = Path(fetched)
    if folder.name != commit:
        raise RunError(f"{need}: changed on the hub while it was fetched; stage it again")
    files = {name: (folder / name).stat().st_size for name in wanted}
    record = need.record(cache, commit)
    record.parent.mkdir(exist_ok=True)
    write_json(record, {"name": need.name, "revision": revision, "staged_at": time.time(), "files": files})
    return commit, files


def _wanted(api: HfApi, need: HubNeed, names: list[str], *, commit: str, cache: Path) -> list[str]:
    """The names of a repository's files that this need is about. Raises UserError if they are not there."""

    def read(name: str) -> Path:
        return Path(api.hf_hub_download(need.name, name, repo_type=need.kind, revision=commit, cache_dir=cache))

    match need.part:
        case "data":
            return _data_files(need, names, configs=_configs(read(DATA_CARD)) if DATA_CARD in names else [])
        case "tokenizer":
            found = _matching(names, TOKENIZER_FILES)
            if not {"tokenizer.json", "tokenizer.model"} & set(found):
                raise UserError(f"{need}: has no tokenizer.json; set data.tokenizer to a repository that has one")
            return found
    if "config.json" not in names:
        raise UserError(f"{need}: has no config.json, so it is no model of transformers; correct the name")
    config = _matching(names, CONFIG_FILES)
    return config if need.part == "config" else config + _weights(need, names, read)


def _weights(need: HubNeed, names: list[str], read: Any) -> list[str]:
    for name in WEIGHTS:
        if (index := f"{name}.index.json") in names:
            shards = set(json.loads(read(index).read_text(encoding="utf-8"))["weight_map"].values())
            if lost := sorted(shards - set(names)):
                raise UserError(f"{need}: its {index} names {lost[0]}, which is not there; choose another revision")
            return [index, *sorted(shards)]
        if name in names:
            return [name]
    raise UserError(f"{need}: has none of {', '.join(WEIGHTS)}; name a model with weights, or set model.init: random")


def _data_files(need: HubNeed, names: list[str], *, configs: list[dict[str, Any]]) -> list[str]:
    """All files; of a data set with several configurations those of the one that is asked for.

    `datasets` looks at the first configuration as well, to know what kind of files there are.
    """
    by_name = {str(config.get("config_name", "default")): config for config in configs}
    if need.data_name is not None and by_name and need.data_name not in by_name:
        raise UserError(f"{need}: has no configuration {need.data_name!r}; use one of {', '.join(sorted(by_name))}")
    if need.data_name is None or not by_name:
        return names
    asked = [configs[0], by_name[need.data_name]]
    if any("data_files" not in config for config in asked):
        return names
    patterns = [pattern for config in asked for pattern in _patterns(config["data_files"])]
    return _matching(names, (DATA_CARD, ".huggingface.yaml", "dataset_infos.json", *patterns))


def _configs(card: Path) -> list[dict[str, Any]]:
    return list((metadata_load(card) or {}).get("configs") or [])


def _patterns(data_files: Any) -> list[str]:
    """Of `data_files:` in a data set's card: a pattern, a list of them, or a list of {split, path}."""
    if isinstance(data_files, dict):
        data_files = data_files.get("path", list(data_files.values()))
    if isinstance(data_files, list):
        return [pattern for entry in data_files for pattern in _patterns(entry)]
    return [str(data_files)]


def _matching(names: list[str], patterns: tuple[str, ...]) -> list[str]:
    """Names in any folder below match as well: more is fetched then, never less."""
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


@contextmanager
def _told(need: HubNeed) -> Iterator[None]:
    """The library's errors, said with the key of the recipe and a remedy."""
    try:
        yield
    except GatedRepoError:
        raise UserError(
            f"{need}: is gated; accept its terms on its page on the hub, and set HF_TOKEN to a token of that account, "
            "or write it into the profile's secrets file"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{need}: the hub has no such {need.kind}, or shows it to others only; correct the name, or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{need}: has no such revision; correct {need.revision_key}") from None
    except HFValidationError as error:
        raise UserError(f"{need}: is no path here and no name of the hub ({error}); correct it") from None
    except OfflineModeIsEnabled:
        raise UserError("HF_HUB_OFFLINE is set, and staging asks the hub; unset it") from None
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise RunError(f"{need}: the hub broke off: {error}; stage it again, and it goes on where it was") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise UserError(
                f"{need}: {error.filename}: {error.strerror}; set HF_HOME to a shared folder with room"
            ) from None
        raise
    except Exception as error:
        if type(error).__module__.split(".")[0].startswith("httpx"):  # no connection, no answer, a bad proxy
            raise UserError(
                f"{need}: the hub does not answer ({error}); stage on a node with internet, into an HF_HOME that the "
                "cluster sees"
            ) from None
        raise
