"""What a recipe names on the hub is fetched whole, recorded, and found again by jobs that are offline."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.launch.refusals import check_staged
from pipeline.launch.stage import stage
from pipeline.plan.cluster import ClusterProfile, load_cluster
from pipeline.plan.hub_cache import hub_needs, missing_from, pinned
from pipeline.recipe.load import load
from pipeline.recipe.schema import Recipe
from tests.hub import Hub, Repository, started

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_canary_3d1f"
MODEL, DATA = "models/org/model", "datasets/org/texts"
INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
MODEL_FILES = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b'{"temperature": 1}',
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b'{"chat_template": ""}',
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    "model-00001-of-00002.safetensors": b"1" * 1000,
    "model-00002-of-00002.safetensors": b"2" * 500,
    "original/consolidated.00.pth": b"the same weights a second time",
    "README.md": b"# A model",
}
CARD = """---
configs:
- {config_name: short, data_files: short/*.jsonl}
- {config_name: long, data_files: [{split: train, path: long/*.jsonl}]}
- {config_name: huge, data_files: huge/*.jsonl}
---
"""
DATA_FILES = {
    "README.md": CARD.encode(),
    "short/0.jsonl": b'{"text": "short"}\n',
    "long/0.jsonl": b'{"text": "long"}\n',
    "huge/0.jsonl": b'{"text": "huge"}\n',
}


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    with started() as hub:
        hub.repositories |= {MODEL: Repository(dict(MODEL_FILES)), DATA: Repository(dict(DATA_FILES))}
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        for name in ("HF_HUB_CACHE", "HF_TOKEN", "ALST_CLUSTER"):
            monkeypatch.delenv(name, raising=False)
        yield hub


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "home" / "hub"


def recipe(*overrides: str) -> Recipe:
    named = ["model.name_or_path=org/model", "data.tokenizer=org/model"]
    source = "data.sources=[{type: huggingface, path: org/texts, name: long}]"
    return load("llama8b", overrides=[*named, source, *overrides])


def profile() -> ClusterProfile:
    return load_cluster("cpu-only")


def alst(*arguments: str, code: int = 0, **variables: str) -> str:
    """What a command printed on a machine that has the light install alone."""
    absent = ("torch", "transformers", "datasets", "deepspeed", "numpy", "pyarrow", "tokenizers", "mlflow")
    light = f"import sys; sys.modules.update(dict.fromkeys({absent!r}))\nfrom pipeline.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", light, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


# Fetching


def test_weights_tokenizer_and_data_are_fetched_once_and_nothing_else(hub, cache):
    lines = list(stage(recipe(), cache=cache))
    needed = MODEL_FILES.keys() - {"original/consolidated.00.pth", "README.md"}
    assert sorted(hub.fetched) == sorted(
        [f"{MODEL}/{name}" for name in needed] + [f"{DATA}/{name}" for name in DATA_FILES if "huge" not in name]
    )
    assert hub.repositories[MODEL].commit[:12] in lines[0]
    assert [missing_from(cache, need) for need in hub_needs(recipe())] == [None, None, None]
    before = list(hub.fetched)
    assert list(stage(recipe(), cache=cache)) == lines
    assert hub.fetched == before


def test_a_model_with_random_weights_needs_its_config_alone(hub, cache):
    list(stage(recipe("model.init=random"), cache=cache))
    assert not [name for name in hub.fetched if "safetensors" in name]


def test_a_recipe_of_local_things_needs_nothing(cache):
    assert hub_needs(load("tiny")) == ()
    assert list(stage(load("tiny"), cache=cache)) == ["nothing of this recipe is on the hub"]


def test_staging_needs_the_light_install_alone_and_takes_the_token_from_the_secrets_file(hub, cache, tmp_path):
    hub.repositories[MODEL].gated_by = TOKEN
    secrets = tmp_path / "secrets"
    secrets.write_text(f"HF_TOKEN={TOKEN}\n")
    secrets.chmod(0o600)
    cluster = tmp_path / "mine.yaml"
    cluster.write_text((ROOT / "slurm" / "clusters" / "cpu-only.yaml").read_text() + f"\nsecrets: {secrets}\n")
    (tmp_path / "recipe.yaml").write_text(
        f"base: {ROOT / 'configs' / 'llama8b.yaml'}\nname: mine\nmodel: {{name_or_path: org/model}}\n"
        "data: {tokenizer: org/model, sources: [{type: huggingface, path: org/texts}]}\n"
    )
    told = alst("stage", str(tmp_path / "recipe.yaml"), "--cluster", "cpu-only", code=2)
    assert "model.name_or_path = 'org/model': is gated; accept its terms" in told
    told += alst("stage", str(tmp_path / "recipe.yaml"), code=2, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set, and staging asks the hub; unset it" in told
    told += alst("stage", str(tmp_path / "recipe.yaml"), "--cluster", str(cluster))
    assert f"staged in {cache}" in told
    assert "Traceback" not in told
    kept = [path.read_bytes() for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert TOKEN not in told and not any(TOKEN.encode() in content for content in kept)


@pytest.mark.parametrize(
    ("without", "overrides", "told"),
    [
        ([], ["model.name_or_path=org/other"], ["model.name_or_path = 'org/other'", "no such model", "HF_TOKEN"]),
        ([], ["model.revision=v9"], ["'org/model' at v9", "no such revision", "correct model.revision"]),
        ([], ["model.name_or_path=a/b/c"], ["'a/b/c'", "no path here and no name of the hub"]),
        ([], ["data.sources.0.name=wide"], ["no configuration 'wide'", "huge, long, short"]),
        (["config.json"], [], ["no config.json", "correct the name"]),
        (["model.safetensors.index.json"], [], ["none of model.safetensors", "model.init: random"]),
        (["model-00002-of-00002.safetensors"], [], ["model-00002-of-00002.safetensors, which is not there"]),
        (["tokenizer.json"], [], ["data.tokenizer = 'org/model'", "no tokenizer.json"]),
    ],
)
def test_what_cannot_be_staged_is_told_with_its_key_and_a_remedy(hub, cache, without, overrides, told):
    for name in without:
        del hub.repositories[MODEL].files[name]
    with pytest.raises(UserError) as caught:
        list(stage(recipe(*overrides), cache=cache))
    for words in told:
        assert words in str(caught.value)
    assert ";" in str(caught.value), "no remedy"


def test_a_node_without_internet_is_told_of(cache, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"the hub does not answer .*; stage on a node with internet"):
        list(stage(recipe(), cache=cache))


# What was staged is what jobs use


def test_a_file_that_is_missing_or_cut_short_is_named_before_submission(hub, cache):
    with pytest.raises(
        UserError, match=r"^model.name_or_path = .*has not been staged; run `alst stage` with this recipe"
    ):
        check_staged(recipe(), profile(), is_packed=False)
    list(stage(recipe(), cache=cache))
    check_staged(recipe(), profile(), is_packed=False)
    shard = cache / "models--org--model" / "snapshots" / hub.repositories[MODEL].commit / INDEX["weight_map"]["b"]
    shard.resolve().write_bytes(b"2" * 499)
    with pytest.raises(UserError, match=r"00002-of-00002.safetensors has 499 bytes, not 500; run `alst stage`"):
        check_staged(recipe(), profile(), is_packed=False)
    shard.unlink()
    with pytest.raises(UserError, match=r"00002-of-00002.safetensors is not there; run `alst stage`"):
        check_staged(recipe(), profile(), is_packed=False)


def test_what_is_packed_needs_neither_its_sources_nor_its_tokenizer_again(hub, cache):
    list(stage(recipe(), cache=cache))
    for record in cache.rglob("staged/*"):
        if not record.stem.endswith("-weights"):
            record.unlink()
    with pytest.raises(UserError, match=r"^data.tokenizer = "):
        check_staged(recipe(), profile(), is_packed=False)
    check_staged(recipe(), profile(), is_packed=True)


def test_a_cache_that_nodes_do_not_see_is_refused(hub, cache, tmp_path):
    list(stage(recipe(), cache=cache))
    raw = profile().model_dump(mode="json") | {"shared": [str(tmp_path / "shared")]}
    with pytest.raises(UserError, match=r"Hugging Face's cache is not shared .*; set HF_HOME to a folder in one of"):
        check_staged(recipe(), ClusterProfile.model_validate_json(json.dumps(raw)), is_packed=False)


def test_a_plan_names_the_commits_that_were_staged_also_when_the_branch_goes_on(hub, cache):
    list(stage(recipe(), cache=cache))
    before = {name: repository.commit for name, repository in hub.repositories.items()}
    planned = pinned(recipe(), cache)
    assert planned.model.revision == planned.data.tokenizer_revision == before[MODEL]
    assert planned.data.sources[0].revision == before[DATA]
    hub.repositories[MODEL].files["config.json"] += b"\n"
    list(stage(recipe(), cache=cache))
    assert pinned(recipe(), cache).model.revision == hub.repositories[MODEL].commit != before[MODEL]
    assert pinned(planned, cache) == planned
    check_staged(planned, profile(), is_packed=False)


def test_without_a_cache_a_recipe_stays_as_it_is(cache):
    assert pinned(recipe(), cache) == recipe()


def test_an_offline_job_reads_the_revision_of_its_plan_and_not_the_one_fetched_last(hub, cache):
    list(stage(recipe(), cache=cache))
    planned = pinned(recipe(), cache)
    hub.repositories[DATA].files["long/0.jsonl"] = b'{"text": "another"}\n'
    list(stage(recipe(), cache=cache))
    newer = pinned(recipe(), cache)
    read = (
        "import sys\n"
        "from pipeline.data.source_documents import documents\n"
        "from pipeline.data.sources import units\n"
        "from pipeline.recipe.schema import HuggingFaceSource\n"
        "for raw in sys.argv[1:]:\n"
        "    source = HuggingFaceSource.model_validate_json(raw)\n"
        "    print([d.text for unit in units([source]) for d in documents(unit, source=source)])\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", read, *(it.data.sources[0].model_dump_json() for it in (newer, planned))],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout.split("\n")[:2] == ["['another']", "['long']"], done.stderr
