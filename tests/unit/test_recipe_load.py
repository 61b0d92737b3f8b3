"""A recipe is read as it is meant, and what cannot be meant is told with value, rule and remedy."""

from pathlib import Path
from typing import get_args

import pytest
import yaml

from pipeline.errors import RecipeError, UserError
from pipeline.plan.job import plan_job
from pipeline.plan.run_dir import create_run_dir
from pipeline.recipe.load import CONFIGS, load, read_chain, read_yaml
from pipeline.recipe.schema import Recipe

TINY = CONFIGS / "tiny.yaml"


@pytest.fixture
def write(tmp_path: Path):
    """Write a file of the test's folder and return its path."""

    def write(name: str, text: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def refusal(recipe: str | Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(recipe, overrides=overrides)
    return str(caught.value)


# How files and overrides come together


def test_every_recipe_under_configs_loads_by_name_and_plans():
    names = {path.relative_to(CONFIGS).with_suffix("") for path in CONFIGS.rglob("*.yaml")} - {Path("base")}
    assert Path("tiny") in names
    for name in names:
        assert plan_job(load(str(name))).recipe.name == name.name


def test_a_recipe_is_found_by_name_by_file_name_and_by_path(write):
    by_path = write("mine.yaml", f"base: {TINY}\n")
    assert load("tiny") == load("tiny.yaml") == load(TINY) == load(str(TINY)) == load(by_path)


def test_maps_merge_down_the_chain_and_lists_replace(write):
    write("grandmother.yaml", "a: {x: 1, y: 1, deep: {p: 1, q: 1}}\nlist: [1, 2, 3]\nonly: here\n")
    write("mother.yaml", "base: grandmother.yaml\na: {y: 2, deep: {q: 2}}\nlist: [9]\n")
    child = write("child.yaml", "base: mother.yaml\na: {z: 3}\n")
    assert read_chain(child) == {
        "a": {"x": 1, "y": 2, "z": 3, "deep": {"p": 1, "q": 2}},
        "list": [9],
        "only": "here",
    }


def test_null_in_a_recipe_switches_off_what_the_base_switched_on(write):
    recipe = write("plain.yaml", f"base: {TINY}\nmemory: {{tiled_loss: null, activation_checkpoint: null}}\n")
    memory = load(recipe).memory
    assert memory.tiled_loss is None
    assert memory.activation_checkpoint is None
    assert memory.tiled_mlp is not None


def test_a_base_is_looked_up_beside_the_recipe_that_names_it(write, tmp_path):
    (tmp_path / "below").mkdir()
    write("base.yaml", "who: above\n")
    write("below/base.yaml", "who: below\n")
    assert read_chain(write("below/recipe.yaml", "base: base.yaml\n")) == {"who": "below"}
    assert read_chain(write("below/up.yaml", "base: ../base.yaml\n")) == {"who": "above"}
    assert read_chain(write("below/absolute.yaml", f"base: {tmp_path / 'base.yaml'}\n")) == {"who": "above"}


def test_two_recipes_may_share_a_base_without_being_a_cycle(write):
    write("root.yaml", "x: 1\n")
    write("a.yaml", "base: root.yaml\n")
    assert read_chain(write("b.yaml", "base: a.yaml\n")) == read_chain(write("c.yaml", "base: root.yaml\n"))


def test_later_overrides_win_and_reach_into_lists():
    recipe = load("tiny", overrides=["train.steps=5", "data.sources.0.path=corpus/", "train.steps=7"])
    assert recipe.train.steps == 7
    assert recipe.data.sources[0].path == "corpus/"


def test_a_map_as_override_merges_into_its_section():
    recipe = load("tiny", overrides=["train={steps: 5, self_check: {tolerance: 0.5}}"])
    assert (recipe.train.steps, recipe.train.seed) == (5, 0)
    assert recipe.train.self_check.tokens == load("tiny").train.self_check.tokens
    assert recipe.train.self_check.tolerance == 0.5


def test_an_override_opens_a_feature_that_is_off():
    overrides = ["memory.tiled_mlp=null", "memory.tiled_mlp.tile_tokens=64"]
    assert load("tiny", overrides=overrides).memory.tiled_mlp.tile_tokens == 64


def test_an_override_does_not_change_the_next_load():
    before = load("tiny")
    load("tiny", overrides=["model.config.hidden_size=77", "data.sources.0.path=elsewhere"])
    assert load("tiny") == before


def test_a_recipe_is_frozen():
    recipe = load("tiny")
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.steps = 1


# What a value is


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("3E2", 300.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("5e-1", 0.5),
        ("2", 2),
        ("-2", -2),
        ("true", True),
        ("false", False),
        ("null", None),
        ("~", None),
        ("off", "off"),
        ("on", "on"),
        ("yes", "yes"),
        ("No", "No"),
        ("True", "True"),
        ("2024-01-01", "2024-01-01"),
        ("1e5x", "1e5x"),
        ("'5'", "5"),
        ("[1, x]", [1, "x"]),
        ("a=b", "a=b"),
    ],
)
def test_yaml_values_are_those_of_yaml_1_2(text, value):
    read = load("tiny", overrides=[f"model.config.extra={text}"]).model.config["extra"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        pytest.param("010", ("010", 10), id="octal"),
        pytest.param("0o17", ("0o17", 15), id="octal of 1.2"),
        pytest.param("1:30", ("1:30",), id="sexagesimal"),
        pytest.param("0b11", ("0b11",), id="binary"),
    ],
)
def test_a_number_is_never_another_than_it_looks(text, meant):
    """YAML 1.1 reads 010 as 8 and 1:30 as 90: a length of such digits would be silently another."""
    assert load("tiny", overrides=[f"model.config.extra={text}"]).model.config["extra"] in meant


def test_a_file_with_a_byte_order_mark_is_read(write):
    assert load(write("bom.yaml", f"\ufeffbase: {TINY}\nname: bom\n")).name == "bom"


# What is refused: (override, value, rule, remedy)


@pytest.mark.parametrize(
    ("override", "value", "rule", "remedy"),
    [
        pytest.param("train.step=5", "train.step", "is not a key", "did you mean 'steps'?", id="misspelt key"),
        pytest.param("memry={}", "memry", "is not a key", "did you mean 'memory'?", id="misspelt section"),
        pytest.param("hardware.zzz=5", "hardware.zzz", "is not a key", "use one of disk", id="unknown key"),
        pytest.param("data.sources.0.pathh=x", "data.sources.0.pathh", "not a key", "'path'?", id="key in a list"),
        pytest.param(
            "memory.tiled_mlp.tile_token=5",
            "tiled_mlp.tile_token",
            "not a key",
            "'tile_tokens'?",
            id="key of a feature",
        ),
        pytest.param(
            "data.sources.0.columns={}", "columns", "does not go with the `type`", "remove it", id="other type's"
        ),
        pytest.param("data.seq_len=32k", "'32k'", "a valid integer", "correct data.seq_len", id="unit"),
        pytest.param("data.seq_len=32768.0", "32768.0", "a valid integer", "correct data.seq_len", id="float for int"),
        pytest.param('optimizer.lr="3e-4"', "'3e-4'", "a valid number", "correct optimizer.lr", id="string for float"),
        pytest.param("train.steps=true", "True", "a valid integer", "correct train.steps", id="bool for int"),
        pytest.param("optimizer.weight_decay=true", "True", "a valid number", "correct", id="bool for float"),
        pytest.param("train.micro_batch=true", "True", "must be", "correct train.micro_batch", id="bool for one"),
        pytest.param(
            "tracking.uri=http://me:pw@host",
            "holds a password",
            "MLFLOW_TRACKING_PASSWORD",
            "leave it out",
            id="password",
        ),
        pytest.param("tracking.mlflow=1", "= 1", "a valid boolean", "correct tracking.mlflow", id="int for bool"),
        pytest.param("tracking.mlflow=yes", "'yes'", "a valid boolean", "correct tracking.mlflow", id="word for bool"),
        pytest.param("name=5", "= 5", "a valid string", "correct name", id="int for string"),
        pytest.param("optimizer.betas=[true, 0.9]", "True", "a valid number", "correct", id="bool in a list"),
        pytest.param("data.sources.0.exclude=[1]", "= 1", "a valid string", "correct", id="int in a list of strings"),
        pytest.param("train=[1]", "[1]", "a section", "correct train", id="list for section"),
        pytest.param("train=null", "None", "a section", "correct train", id="null for section"),
        pytest.param("memory.tiled_mlp=off", "'off'", "a section", "correct memory.tiled_mlp", id="off is null"),
        pytest.param("train.steps=", "train.steps=", "empty", "train.steps=null", id="no value"),
        pytest.param("train.steps=0", "= 0", "greater than 0", "correct train.steps", id="zero steps"),
        pytest.param("hardware.nodes=0", "= 0", "greater than 0", "correct hardware.nodes", id="zero nodes"),
        pytest.param("hardware.nodes=-3", "= -3", "greater than 0", "correct hardware.nodes", id="negative nodes"),
        pytest.param("parallel.sp=0", "= 0", "greater than 0 or must be 'auto'", "correct parallel.sp", id="zero sp"),
        pytest.param("parallel.sp=Auto", "'Auto'", "integer or must be 'auto'", "correct", id="word for sp"),
        pytest.param("optimizer.lr=.nan", "nan", "must be", "correct optimizer.lr", id="nan"),
        pytest.param("optimizer.lr=.inf", "inf", "must be", "correct optimizer.lr", id="infinite"),
        pytest.param("train.grad_clip=.inf", "inf", "must be", "correct train.grad_clip", id="infinite, off is null"),
        pytest.param("zero.stage=4", "= 4", "less than or equal to 3", "correct zero.stage", id="stage 4"),
        pytest.param("schedule.name=cosin", "'cosin'", "'constant', 'linear' or 'cosine'", "correct", id="choice"),
        pytest.param("hardware.gpu=H100", "'H100'", "'H100-80GB'", "correct hardware.gpu", id="unknown GPU"),
        pytest.param("name=../evil", "'../evil'", "must", "correct name", id="name that is a path"),
        pytest.param("data.sources=[]", "= []", "at least one", "correct data.sources", id="no sources"),
        pytest.param("data.sources=corpus", "'corpus'", "must be a list", "correct data.sources", id="word for a list"),
        pytest.param(
            "data.sources.0.type=parquets",
            "'parquets'",
            "'text', 'jsonl', 'parquet'",
            "correct",
            id="unknown source type",
        ),
        pytest.param("data.sources=[{path: x}]", "data.sources.0", "type", "is missing; add it", id="no source type"),
        pytest.param(
            "data.sources=[{type: jsonl, path: a, weight: 2, tokens: 5}]",
            "weight 2.0 and tokens 5",
            "both say",
            "keep one",
            id="two amounts",
        ),
        pytest.param(
            "data.sources=[{type: jsonl, path: a, roles: {user: q}}]",
            "['user']",
            "no assistant",
            "add it",
            id="no assistant",
        ),
        pytest.param(
            "data.sources=[{type: jsonl, path: a, roles: {assistant: a.b}}]",
            "a.b",
            "must all be columns",
            "write e.g.",
            id="roles",
        ),
        pytest.param(
            "data.sources=[{type: jsonl, path: a, roles: {assistant: a}, columns: {text: b}}]",
            "roles",
            "each say",
            "keep one",
            id="two kinds",
        ),
        pytest.param(
            "data.sources=[{type: jsonl, path: a, columns: {loss_mask: m}}]",
            "loss_mask",
            "need columns.input_ids",
            "name it",
            id="mask alone",
        ),
        pytest.param(
            "data.tokenizer=null",
            "'python:stdlib' is text",
            "tokenizer is null",
            "set data.tokenizer",
            id="no tokenizer",
        ),
        pytest.param("data.packing.unfilled_last=maybe", "'maybe'", "'keep' or 'drop'", "correct", id="choice below"),
        pytest.param("data.tokenizer={vocab_size: 9}", "= 9", "equal to 300", "correct", id="below a union"),
        pytest.param(
            "model.init=pretrained", "name_or_path is null", "init is 'pretrained'", "name a model", id="model"
        ),
        pytest.param("zero={stage: 1, offload_parameters: cpu}", "not 1", "needs stage 3", "set zero.stage", id="zero"),
    ],
)
def test_a_bad_value_is_told_with_value_rule_and_remedy(override, value, rule, remedy):
    message = refusal("tiny", override)
    assert value in message
    assert rule in message
    assert remedy in message
    assert override.partition("=")[0].split(".")[0] in message
    assert "Input" not in message, "pydantic's words, not ours"
    assert "tuple" not in message.lower(), "a word of Python, not of YAML"


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        pytest.param("nodes", "must be key=value", id="no equals sign"),
        pytest.param("", "must be key=value", id="empty"),
        pytest.param("=5", "must be key=value", id="no key"),
        pytest.param("train.=5", "must be key=value", id="ends in a dot"),
        pytest.param(".train=5", "must be key=value", id="starts with a dot"),
        pytest.param("train..steps=5", "must be key=value", id="empty key in the middle"),
        pytest.param("train.micro_batch.x=5", "train.micro_batch is 1, not a section", id="into a number"),
        pytest.param("model.init.x=5", "model.init is 'random', not a section", id="into a word"),
        pytest.param("data.sources.1.path=x", "'1' is no place in a list of 1", id="past the list"),
        pytest.param("data.sources.1=x", "'1' is no place in a list of 1", id="past the list, whole"),
        pytest.param("data.sources.-1.path=x", "'-1' is no place in a list of 1", id="from the end"),
        pytest.param("data.sources.first.path=x", "'first' is no place in a list of 1", id="word as index"),
        pytest.param("data.sources.².path=x", "'²' is no place in a list of 1", id="digit that is no number"),
        pytest.param("train.steps=[", "is not a YAML value", id="no YAML"),
        pytest.param("train.steps=!!python/name:os.system x", "is not a YAML value", id="Python object"),
    ],
)
def test_a_bad_override_is_told_with_itself_and_the_rule(override, rule):
    message = refusal("tiny", override)
    assert message.startswith(f"override {override!r}: ")
    assert rule in message
    assert ";" in message, "no remedy"


def test_several_bad_values_are_told_together_each_on_its_line():
    message = refusal("tiny", "train.steps=x", "hardware.nodes=0", "optimzer.lr=1e-3")
    assert [line.split()[0] for line in message.splitlines()] == ["train.steps", "hardware.nodes", "optimzer"]


def test_a_finding_inside_a_section_is_not_told_of_the_section_as_well():
    assert refusal("tiny", "data.sources.0.pathh=x").count("\n") == 0


# What is no recipe


@pytest.mark.parametrize(
    ("content", "told"),
    [
        pytest.param("", "the file is empty", id="empty"),
        pytest.param("# a comment\n", "the file is empty", id="comments only"),
        pytest.param("- a\n- b\n", "the top level is a list, not a map", id="list at top level"),
        pytest.param("word\n", "the top level is a str, not a map", id="word at top level"),
        pytest.param(b"name: caf\xe9\n", "byte 9 is not UTF-8", id="Latin-1"),
        pytest.param("name: x\n".encode("utf-16"), "byte 0 is not UTF-8", id="UTF-16"),
        pytest.param("name: x\ntrain: [1\nzero: 2\n", "line 3, column 5", id="bracket left open"),
        pytest.param("name: x\ntrain:\n\tsteps: 1\n", "line 3, column 1", id="tab"),
        pytest.param("name: x\nzero: {}\nname: y\n", "line 3, column 1: the key 'name' stands twice", id="twice"),
        pytest.param("train: {steps: 1, steps: 2}\n", "the key 'steps' stands twice", id="twice, deeper"),
        pytest.param("5: x\n", "line 1, column 1: the key 5 is not a word", id="number as key"),
        pytest.param("a: *nowhere\n", "undefined alias 'nowhere'", id="alias of nothing"),
        pytest.param("a: !!python/object:os.system {}\n", "line 1, column 4", id="Python object"),
        pytest.param("a: 1\n---\nb: 2\n", "line 2", id="two documents"),
        pytest.param("a: \x00\n", "#x0000", id="control character"),
        pytest.param("[" * 2000, "nested", id="nested too deep"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_by_name_and_place(write, content, told):
    path = write("bad.yaml", content)
    with pytest.raises(RecipeError) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value)
    assert told in str(caught.value)
    assert ";" in str(caught.value), "no remedy"


def test_a_folder_is_no_recipe(tmp_path):
    assert "no such file" in refusal(tmp_path)


def test_a_recipe_without_a_base_is_told_what_is_missing(write):
    message = refusal(write("alone.yaml", "name: alone\n"))
    assert "model is missing; add it" in message
    assert "hardware is missing; add it" in message


@pytest.mark.parametrize(
    ("base", "told"),
    [
        pytest.param("nowhere.yaml", "base = 'nowhere.yaml': no such file beside the recipe", id="missing"),
        pytest.param("''", "base = '': no such file", id="empty"),
        pytest.param(".", "base = '.': no such file", id="a folder"),
        pytest.param("5", "base = 5: must be the path of one recipe", id="number"),
        pytest.param("[a.yaml, b.yaml]", "must be the path of one recipe", id="several"),
        pytest.param("bad.yaml", "base: bad.yaml -> bad.yaml is a cycle", id="itself"),
        pytest.param("there.yaml", "base: bad.yaml -> there.yaml -> bad.yaml is a cycle", id="cycle of two"),
    ],
)
def test_a_bad_base_is_refused_with_the_chain(write, base, told):
    write("there.yaml", "base: bad.yaml\n")
    message = refusal(write("bad.yaml", f"base: {base}\n"))
    assert told in message
    assert ";" in message, "no remedy"


def test_an_error_in_a_base_names_the_base(write):
    write("base.yaml", "- a list\n")
    assert "base.yaml: the top level is a list" in refusal(write("top.yaml", "base: base.yaml\n"))


@pytest.mark.parametrize("name", ["tny", "tinny", "tiny-milion"])
def test_a_misspelt_recipe_gets_the_nearest_name_and_all_names(name):
    message = refusal(name)
    assert f"recipe {name!r}" in message
    assert "did you mean 'tiny" in message
    assert "tiny, tiny-million" in message


@pytest.mark.parametrize("name", ["", "\0", "no/such/recipe.yaml", "x" * 300], ids=["empty", "nul", "path", "long"])
def test_a_recipe_that_cannot_be_a_file_is_refused_like_any_other(name):
    assert "no such file" in refusal(name)


# The way out: the resolved recipe is a recipe


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param([], id="tiny"),
        pytest.param(["memory.tiled_mlp=null", "train.grad_clip=null", "train.self_check=null"], id="features off"),
        pytest.param(["optimizer.lr=1e-5", "optimizer.eps=1e-30"], id="small numbers"),
        pytest.param(["tracking.experiment='off'", "model.revision='null'"], id="words that look like values"),
        pytest.param(["model.revision='12e4567'"], id="a commit that looks like a number"),
        pytest.param(["tracking.experiment='été: 5 # no comment'"], id="text that needs quotes"),
    ],
)
def test_the_recipe_in_a_run_folder_loads_to_the_planned_recipe(tmp_path, monkeypatch, overrides):
    monkeypatch.setenv("ALST_RUNS", str(tmp_path))
    plan = plan_job(load("tiny", overrides=overrides))
    assert load(create_run_dir(plan).recipe) == plan.recipe


def test_base_yaml_says_every_key_that_is_not_the_recipes_own():
    """A key without a default in base.yaml would make every recipe repeat it."""
    stated = yaml.safe_load((CONFIGS / "base.yaml").read_text())
    own = {"name", "data.sources", "data.tokenizer"}
    missing = set()
    for section, field in Recipe.model_fields.items():
        # A section that may be null is `Section | None`.
        models = [kind for kind in (field.annotation, *get_args(field.annotation)) if hasattr(kind, "model_fields")]
        if section not in stated:
            missing.add(section)
        if stated.get(section) is not None:  # null: its own keys are said by whoever switches it on
            keys = {key for model in models for key in model.model_fields}
            missing |= {f"{section}.{key}" for key in keys - set(stated[section])}
    assert missing == own


def test_a_refusal_is_an_error_of_the_user():
    assert issubclass(RecipeError, UserError)
    assert RecipeError.exit_code == 2
