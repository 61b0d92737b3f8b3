"""Every derived number of a job, against statements that do not use the planner's own formulas."""

import json
from collections import Counter
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from pipeline.errors import RecipeError, UserError
from pipeline.plan.environment import environment
from pipeline.plan.flops import model_flops
from pipeline.plan.job import LOGITS_TILE_BYTES, MLP_TILE_TOKENS, JobPlan, plan_job, read_plan
from pipeline.plan.model_shape import ModelShape, divisors, model_shape
from pipeline.plan.run_dir import create_run_dir, runs_root
from pipeline.recipe.load import load

SMALL = ModelShape(
    model_type="llama",
    hidden_size=10,
    num_layers=3,
    num_query_heads=4,
    num_kv_heads=2,
    head_dim=5,
    intermediate_size=7,
    vocab_size=11,
    max_position_embeddings=None,
)


TINY = (
    # Sizes that are tuned in tiny.yaml and counted with here.
    "model.config.vocab_size=8192",
    "model.config.hidden_size=128",
    "model.config.intermediate_size=384",
    "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=4",
    "model.config.num_key_value_heads=2",
    "memory.tiled_loss.tile_tokens=1024",
    "memory.tiled_mlp.tile_tokens=4096",
)


def planned(*overrides: str) -> JobPlan:
    return plan_job(load("tiny", overrides=[*TINY, *overrides]))


def heads_and_ranks(heads: int, kv_heads: int, ranks: int) -> list[str]:
    """Overrides for a model of these heads on this many ranks, whose lengths divide by any sp below 200."""
    return [
        f"model.config.num_attention_heads={heads}",
        f"model.config.num_key_value_heads={kv_heads}",
        f"model.config.hidden_size={16 * heads}",
        f"hardware.gpus_per_node={ranks}",
        f"data.seq_len={heads * 1024}",
        "train.self_check=null",
    ]


def refusal(*overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        planned(*overrides)
    return str(caught.value)


# The numbers of tiny


def test_the_mesh_and_lengths_of_tiny():
    plan = planned()
    assert (plan.nodes, plan.world_size, plan.dp, plan.sp) == (1, 2, 1, 2)
    assert (plan.seq_len, plan.local_seq_len) == (32768, 16384)
    assert (plan.samples_per_step, plan.tokens_per_step) == (1, 32768)


def test_the_tiles_of_tiny():
    plan = planned()
    assert (plan.loss_tile_tokens, plan.num_loss_tiles) == (1024, 16)
    assert (plan.mlp_tile_tokens, plan.num_mlp_tiles) == (4096, 4)


def test_a_sample_belongs_to_a_replica_and_ranks_of_a_replica_share_it():
    plan = planned("hardware.gpus_per_node=4", "parallel.sp=2", "train.grad_accumulation=3")
    assert (plan.world_size, plan.dp, plan.sp) == (4, 2, 2)
    assert (plan.samples_per_step, plan.tokens_per_step) == (6, 6 * 32768)


def test_nodes_times_gpus_are_the_world():
    plan = planned("hardware.nodes=3", "hardware.gpus_per_node=4")
    assert (plan.world_size, plan.dp * plan.sp) == (12, 12)


@pytest.mark.parametrize(("tile", "tiles"), [(1, 16384), (5000, 4), (16383, 2), (16384, 1), (10**9, 1)])
def test_tiles_cover_the_local_sequence_and_are_never_longer(tile, tiles):
    plan = planned(f"memory.tiled_loss.tile_tokens={tile}", f"memory.tiled_mlp.tile_tokens={tile}")
    assert plan.num_loss_tiles == plan.num_mlp_tiles == tiles
    assert plan.loss_tile_tokens == plan.mlp_tile_tokens == min(tile, 16384)


def test_a_feature_that_is_off_is_one_tile():
    plan = planned("memory.tiled_loss=null", "memory.tiled_mlp=null")
    assert (plan.loss_tile_tokens, plan.num_loss_tiles) == (16384, 1)
    assert (plan.mlp_tile_tokens, plan.num_mlp_tiles) == (16384, 1)
    assert plan.recipe.memory.tiled_loss is None


@pytest.mark.parametrize("vocab_size", [8192, 128256, 3 * 10**8, 10**10])
def test_an_automatic_loss_tile_holds_the_most_tokens_that_fit_its_bytes(vocab_size):
    overrides = ("memory.tiled_loss.tile_tokens=auto", f"model.config.vocab_size={vocab_size}", "data.seq_len=4194304")
    plan = planned(*overrides)
    bytes_per_token = 4 * vocab_size
    assert plan.loss_tile_tokens * bytes_per_token <= max(LOGITS_TILE_BYTES, bytes_per_token)
    assert (plan.loss_tile_tokens + 1) * bytes_per_token > LOGITS_TILE_BYTES


LIGER = ("memory.tiled_loss.kernel=liger", "hardware.gpu=H100-80GB")


@pytest.mark.parametrize(
    ("vocab_size", "seq_len", "tile"), [(128256, 32768, 32), (8192, 32768, 256), (8192, 1000, 8), (100, 4096, 2048)]
)
def test_liger_chooses_its_own_loss_tile_and_the_plan_knows_it(vocab_size, seq_len, tile):
    """At hidden size 128 and sp = 2: 128,256 logits are as large as 1,002 hidden states; 16,384 / 1,002 is above 16."""
    lengths = (f"data.seq_len={seq_len}", f"model.config.vocab_size={vocab_size}", "train.self_check=null")
    plan = planned(*LIGER, *lengths, "memory.tiled_loss.tile_tokens=auto")
    assert plan.loss_tile_tokens == tile
    again = planned(*LIGER, *lengths, f"memory.tiled_loss.tile_tokens={tile}")
    assert again.loss_tile_tokens == tile


def test_a_loss_tile_that_liger_would_not_take_is_refused():
    told = refusal(*LIGER, "memory.tiled_loss.tile_tokens=1000")
    assert "memory.tiled_loss.tile_tokens = 1000: must be 256, as kernel liger chooses it" in told


def test_liger_is_refused_without_a_gpu():
    assert "memory.tiled_loss.kernel liger needs a CUDA GPU" in refusal("memory.tiled_loss.kernel=liger")


def test_an_automatic_mlp_tile_is_long_and_never_longer_than_the_shard():
    overrides = ("memory.tiled_mlp.tile_tokens=auto", "train.self_check=null")
    assert planned(*overrides, "data.seq_len=4194304").mlp_tile_tokens == MLP_TILE_TOKENS
    assert planned(*overrides, "data.seq_len=1000").mlp_tile_tokens == 500


# Sequence parallelism


def dealt_evenly(heads: int, kv_heads: int, sp: int) -> bool:
    """Whether ranks with equally many query heads also hold alike: as many KV heads, each used as often."""
    if heads % sp:
        return False
    per_rank, group = heads // sp, heads // kv_heads
    use = [Counter(q // group for q in range(rank * per_rank, (rank + 1) * per_rank)) for rank in range(sp)]
    return len({tuple(sorted(counter.values())) for counter in use}) == 1 and len(set(use[0].values())) == 1


TRIPLES = [(heads, kv, ranks) for heads in (4, 6, 12) for kv in divisors(heads) for ranks in (1, 2, 3, 4, 6, 8, 9)]
TRIPLES += [(32, 8, 8), (32, 8, 64), (64, 8, 256), (40, 8, 16), (28, 4, 8), (71, 1, 8), (71, 71, 142), (25, 5, 10)]


@pytest.mark.parametrize(("heads", "kv_heads", "ranks"), TRIPLES)
def test_automatic_sp_is_the_largest_that_deals_all_heads_evenly_and_divides_the_ranks(heads, kv_heads, ranks):
    plan = planned(*heads_and_ranks(heads, kv_heads, ranks), "parallel.sp=auto")
    assert plan.sp == max(sp for sp in range(1, ranks + 1) if ranks % sp == 0 and dealt_evenly(heads, kv_heads, sp))
    assert plan.dp * plan.sp == ranks
    assert plan.recipe.parallel.sp == plan.sp


@pytest.mark.parametrize(("heads", "kv_heads", "ranks"), [(12, 4, 12), (6, 3, 12), (8, 2, 8), (8, 8, 8), (9, 3, 18)])
def test_sp_is_accepted_exactly_where_it_deals_all_heads_evenly_and_divides_the_ranks(heads, kv_heads, ranks):
    allowed = {sp for sp in range(1, ranks + 1) if ranks % sp == 0 and dealt_evenly(heads, kv_heads, sp)}
    for sp in range(1, ranks + 2):
        overrides = [*heads_and_ranks(heads, kv_heads, ranks), f"parallel.sp={sp}"]
        if sp in allowed:
            assert planned(*overrides).sp == sp
        else:
            message = refusal(*overrides)
            assert f"parallel.sp = {sp}: must divide" in message
            assert f"use one of {sorted(allowed)}" in message


# What is refused


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        pytest.param(
            ["parallel.sp=3", "hardware.gpus_per_node=3"],
            "parallel.sp = 3: must divide num_attention_heads = 4",
            id="sp does not divide the heads",
        ),
        pytest.param(
            [*heads_and_ranks(12, 4, 6), "parallel.sp=6"],
            "divide or be a multiple of num_key_value_heads = 4; use one of [1, 2]",
            id="sp does not fit the KV heads",
        ),
        pytest.param(
            ["parallel.sp=4"],
            "parallel.sp = 4: must divide the 2 ranks of hardware.nodes x gpus_per_node; use one of [1, 2]",
            id="sp does not divide the world",
        ),
        pytest.param(
            ["data.seq_len=32769"],
            "data.seq_len = 32769: must be a multiple of parallel.sp = 2; use 32768 or 32770",
            id="seq_len is no multiple of sp",
        ),
        pytest.param(
            ["data.seq_len=3", "parallel.sp=4", "hardware.gpus_per_node=4"],
            "data.seq_len = 3: must be a multiple of parallel.sp = 4; use 4",
            id="seq_len is below sp",
        ),
        pytest.param(
            ["train.self_check.tokens=4095"],
            "train.self_check.tokens = 4095: must be a multiple of sp = 2; use 4096",
            id="self-check is no multiple of sp",
        ),
        pytest.param(
            ["model.config.num_key_value_heads=3"],
            "model.config.num_key_value_heads = 3: must divide num_attention_heads = 4; use one of [1, 2, 4]",
            id="KV heads do not divide the heads",
        ),
        pytest.param(
            ["model.config.hidden_size=2"], "hidden_size = 2: must be a multiple of", id="less hidden than heads"
        ),
        pytest.param(["model.config.hidden_size=130"], "hidden_size = 130: must be a multiple of", id="hidden / heads"),
        pytest.param(["model.config.vocab_size=0"], "vocab_size = 0: must be a whole number > 0", id="no vocabulary"),
        pytest.param(["model.config.num_hidden_layers=2.5"], "num_hidden_layers = 2.5: must be a", id="half a layer"),
        pytest.param(["model.config.num_attention_heads=true"], "num_attention_heads = True: must", id="true heads"),
        pytest.param(
            ["model.config={model_type: llama, vocab_size: null}"], "vocab_size; add it", id="size set to null"
        ),
    ],
)
def test_numbers_that_do_not_go_together_are_told_with_value_rule_and_remedy(overrides, told):
    message = refusal(*overrides)
    assert told in message
    assert ";" in message, "no remedy"


def test_the_lengths_a_refusal_proposes_are_accepted():
    for length in (32768, 32770):
        assert planned(f"data.seq_len={length}").seq_len == length


def test_the_model_of_a_recipe_needs_its_sizes(tmp_path):
    config = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    recipe = load("tiny", overrides=[f"model={{name_or_path: '{tmp_path}'}}"]).model
    with pytest.raises(RecipeError, match="has no model_type; add it"):
        model_shape(recipe.model_copy(update={"config": {}}))
    with pytest.raises(RecipeError, match="has no vocab_size; add it"):
        model_shape(recipe.model_copy(update={"config": {"model_type": "llama"}}))


# Models that lie in a folder


def folder_shape(folder: Path, **config: object) -> ModelShape:
    recipe = load("tiny", overrides=[f"model.name_or_path='{folder}'"]).model
    return model_shape(recipe.model_copy(update={"config": config}))


STORED = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 100,
    "vocab_size": 50,
    "max_position_embeddings": 4096,
}


def test_a_model_folder_gives_the_shape_and_the_recipe_overrides_it(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(STORED))
    shape = ModelShape("qwen3", 64, 3, 4, 1, 32, 100, 50, 4096, query_key_norm=True)
    assert folder_shape(tmp_path) == shape
    assert folder_shape(tmp_path, num_hidden_layers=7) == replace(shape, num_layers=7)


def test_a_text_model_inside_a_larger_one_is_refused_by_the_type_of_the_larger(tmp_path):
    """transformers would build the larger one."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": STORED}))
    with pytest.raises(RecipeError, match=r"'gemma3': .*a model of more than text.*gemma3_text"):
        folder_shape(tmp_path)


def test_a_model_in_the_hugging_face_cache_is_found_by_name_and_revision(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    hub = tmp_path / "hub" / "models--someone--something"
    for commit, layers in (("aaa", 1), ("bbb", 2)):
        (hub / "snapshots" / commit).mkdir(parents=True)
        (hub / "snapshots" / commit / "config.json").write_text(json.dumps(STORED | {"num_hidden_layers": layers}))
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("aaa\n")
    recipe = load("tiny", overrides=["model.name_or_path=someone/something"]).model.model_copy(update={"config": {}})
    assert model_shape(recipe).num_layers == 1
    assert model_shape(recipe.model_copy(update={"revision": "bbb"})).num_layers == 2
    with pytest.raises(RecipeError, match=r"neither a folder with config[.]json nor in the Hugging Face cache"):
        model_shape(recipe.model_copy(update={"revision": "ccc"}))


@pytest.mark.parametrize(
    "content",
    [None, "", "{", "[]", "5", '{"text_config": null}', '{"text_config": 5}', b"\xff"],
    ids=["missing", "empty", "cut off", "list", "number", "null inside", "number inside", "not UTF-8"],
)
def test_a_model_folder_without_a_whole_config_is_refused_by_name(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RecipeError) as caught:
        folder_shape(tmp_path)
    assert "config.json" in str(caught.value) or "model.config" in str(caught.value)
    assert ";" in str(caught.value), "no remedy"


# What multiplies, and how often


def test_matmul_parameters_by_hand():
    query_and_output, keys_and_values = 2 * (10 * 4 * 5), 2 * (10 * 2 * 5)
    gate_up_down = 3 * (10 * 7)
    assert SMALL.matmul_parameters == 3 * (query_and_output + keys_and_values + gate_up_down) + 10 * 11


def test_model_flops_by_hand():
    """Documents of 3 and 5 tokens, SMALL: each query meets half of its document; QK and AV; backward twice forward."""
    matmuls = 2 * SMALL.matmul_parameters * (3 + 5)
    attention = sum(3 * 2 * (2 * 4 * 5) * (length * length / 2) for length in (3, 5))
    flops = model_flops(SMALL, tokens=8, sum_len_squared=9 + 25)
    assert flops == 3 * (matmuls + attention)
    assert isinstance(flops, int)


def test_the_step_of_tiny_in_flops_by_hand():
    parameters = 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 384) + 128 * 8192
    assert planned().model_flops_per_step == 6 * parameters * 32768 + 3 * 2 * 2 * 128 * 32768**2


def test_flops_are_exact_above_two_to_the_63():
    longest = planned("data.seq_len=1073741824", "train.self_check=null")
    assert longest.model_flops_per_step > 2**63
    assert longest.model_flops_per_step % 6 == 0


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param([], id="tiny"),
        pytest.param(["model.config.tie_word_embeddings=true"], id="tied embeddings"),
        pytest.param(["model.config.model_type=qwen3", "model.config.head_dim=48"], id="heads of their own size"),
    ],
)
def test_matmul_parameters_are_those_of_the_real_model(overrides):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    plan = planned(*overrides)
    sizes = dict(plan.recipe.model.config)
    config = transformers.CONFIG_MAPPING[sizes.pop("model_type")](**sizes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    matmuls = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    assert plan.model.matmul_parameters == matmuls


# The way to plan.json and back


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param([], id="tiny"),
        pytest.param(["memory.tiled_loss.tile_tokens=auto", "memory.tiled_mlp.tile_tokens=auto"], id="automatic"),
        pytest.param(["memory.tiled_loss=null", "memory.tiled_mlp=null", "train.self_check=null"], id="features off"),
        pytest.param(["hardware.nodes=2", "hardware.gpu=H100-80GB", "hardware.gpus_per_node=8"], id="a cluster"),
        pytest.param(["data.sources=[{type: jsonl, path: a}, {type: text, path: b}]"], id="several sources"),
        pytest.param(["data.tokenizer=some/name", "optimizer.lr=1e-7"], id="named tokenizer"),
    ],
)
def test_a_plan_reads_back_equal(tmp_path, monkeypatch, overrides):
    monkeypatch.setenv("ALST_RUNS", str(tmp_path))
    plan = planned(*overrides)
    read = read_plan(create_run_dir(plan).plan)
    assert read == plan
    assert read.packing_key == plan.packing_key
    assert read.to_json() == plan.to_json()


def test_nothing_automatic_is_left_in_a_plan():
    plan = planned("memory.tiled_loss.tile_tokens=auto", "memory.tiled_mlp.tile_tokens=auto", "parallel.sp=auto")
    numbers = plan.to_json()["recipe"]
    assert numbers["parallel"]["sp"] == 2
    assert numbers["memory"]["tiled_loss"]["tile_tokens"] == plan.loss_tile_tokens
    assert numbers["memory"]["tiled_mlp"]["tile_tokens"] == plan.mlp_tile_tokens


def test_planning_a_resolved_recipe_changes_nothing():
    plan = planned()
    assert plan_job(plan.recipe) == plan


def test_a_plan_is_json_that_any_reader_takes():
    text = json.dumps(planned().to_json(), allow_nan=False)
    assert json.loads(text)["plan_version"] == 4
    assert {"name", "world_size", "sp", "dp", "model", "recipe"} <= json.loads(text).keys()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        pytest.param(None, "not a plan", id="missing"),
        pytest.param("", "not a plan", id="empty"),
        pytest.param('{"plan_version": 4, "rec', "not a plan", id="cut off"),
        pytest.param(b"\xff\xfe{", "not a plan", id="not UTF-8"),
        pytest.param("[]", "plan_version None", id="a list"),
        pytest.param("{}", "plan_version None", id="no version"),
        pytest.param('{"plan_version": 99}', "plan_version 99, this code reads 4", id="another version"),
        pytest.param('{"plan_version": "1"}', "plan_version '1'", id="version as text"),
        pytest.param('{"plan_version": 4}', "recipe", id="no recipe"),
        pytest.param('{"plan_version": 2, "recipe": null}', "recipe", id="null recipe"),
        pytest.param('{"plan_version": 2, "recipe": []}', "recipe", id="a list for a recipe"),
    ],
)
def test_a_file_that_is_no_plan_is_refused_by_name(tmp_path, content, told):
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        read_plan(path)
    assert str(path) in str(caught.value)
    assert told in str(caught.value)
    assert ";" in str(caught.value), "no remedy"


def test_a_plan_whose_numbers_were_changed_by_hand_is_refused(tmp_path):
    """Ranks plan again from the recipe: a number that they would silently not use must not stand there."""
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(planned().to_json() | {"sp": 1, "dp": 2}))
    with pytest.raises(UserError, match="sp"):
        read_plan(path)


# The name of the packed bytes


@pytest.mark.parametrize(
    "override",
    [
        "data.seq_len=65536",
        "data.seed=1",
        "data.sources.0.path=corpus",
        "data.sources.0.glob='**/*.txt'",
        "data.sources.0.exclude=[]",
        "data.sources.0.max_document_tokens=4096",
        "data.sources.0.on_undecodable=error",
        "data.sources=[{type: text, path: a}, {type: text, path: b}]",
        "data.tokenizer.vocab_size=4096",
        "data.tokenizer.sample_mib=8",
        "data.tokenizer=some/tokenizer",
        "data.separator=x",
        "data.sources.0.weight=2",
        "data.packing.unfilled_last=drop",
        "data.packing.length_weights=[{to_tokens: 100, weight: 0.5}]",
    ],
)
def test_what_changes_the_packed_bytes_changes_their_name(override):
    assert planned(override).packing_key != planned().packing_key


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "train.steps=7",
        "train.seed=5",
        "train.grad_accumulation=3",
        "parallel.sp=1",
        "memory.tiled_mlp=null",
        "optimizer.lr=1e-2",
        "zero.stage=2",
        "hardware.gpus_per_node=4",
        "model.config.hidden_size=256",
        "model.dtype=bfloat16",
        "tracking.mlflow=false",
        "data.cross_document_attention=true",
        "data.order=by_cost",
        "data.prefetch=4",
        "data.verify_checksums=false",
    ],
)
def test_what_does_not_change_the_packed_bytes_keeps_their_name(override):
    assert planned(override).packing_key == planned().packing_key


def test_the_order_of_sources_is_part_of_the_name():
    one, two = "{type: text, path: a}", "{type: text, path: b}"
    assert planned(f"data.sources=[{one}, {two}]").packing_key != planned(f"data.sources=[{two}, {one}]").packing_key


def test_packed_data_lies_beside_the_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("ALST_RUNS", str(tmp_path))
    plan = planned()
    assert create_run_dir(plan).packed(plan) == tmp_path / "packed" / plan.packing_key
    monkeypatch.setenv("ALST_RUNS", "")
    monkeypatch.chdir(tmp_path)
    assert runs_root() == tmp_path / "runs"


# The run folder and the environment


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("ALST_RUNS", str(tmp_path))
    monkeypatch.setattr("time.strftime", lambda _: "20250101-000000")
    plan = planned()
    names = [create_run_dir(plan).path.name for _ in range(3)]
    assert names == ["tiny-20250101-000000", "tiny-20250101-000000-2", "tiny-20250101-000000-3"]


@pytest.mark.parametrize("below", [".", "deep/er"], ids=["a file itself", "below a file"])
def test_a_runs_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch, below):
    """A file in the way refuses root as well, which a mode would not."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("ALST_RUNS", str(tmp_path / "file" / below))
    with pytest.raises(UserError, match="set ALST_RUNS to a folder that can be written"):
        create_run_dir(planned())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_run_folder_that_could_not_be_filled_is_not_left_as_a_run(tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("ALST_RUNS", str(tmp_path))
    plan = planned()
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="No space left on device"):
        create_run_dir(plan)
    assert list(tmp_path.rglob("plan.json")) == []


def test_every_variable_of_a_rank_has_a_reason_and_one_value():
    for gpu in ("cpu", "H100-80GB"):
        table = environment(planned(f"hardware.gpu={gpu}"), cpus_per_rank=3)
        assert len({variable.name for variable in table}) == len(table)
        assert all(variable.reason for variable in table)
        assert {v.name: v.value for v in table}["OMP_NUM_THREADS"] == "3"


def test_only_a_cpu_recipe_hides_the_gpu_and_only_a_gpu_recipe_sets_the_allocator():
    def names(*overrides: str) -> set[str]:
        return {variable.name for variable in environment(planned(*overrides), cpus_per_rank=1)}

    gpu = "hardware.gpu=H200-141GB"
    assert "CUDA_VISIBLE_DEVICES" in names()
    assert "PYTORCH_ALLOC_CONF" not in names()
    assert "CUDA_VISIBLE_DEVICES" not in names(gpu)
    assert "PYTORCH_ALLOC_CONF" in names(gpu)


@pytest.mark.parametrize("on", [True, False])
def test_the_allocator_is_told_of_segments_if_asked_and_of_page_locked_blocks_always(on):
    plan = planned("hardware.gpu=H200-141GB", f"memory.allocator.expandable_segments={str(on).lower()}")
    (said,) = (v.value for v in environment(plan, cpus_per_rank=1) if v.name == "PYTORCH_ALLOC_CONF")
    assert ("expandable_segments:True" in said.split(",")) is on
    assert {"pinned_max_round_threshold_mb:64", "pinned_max_cached_size_mb:64"} <= set(said.split(","))


@pytest.mark.parametrize(("torch", "told"), [("2.12.0+cu130", False), ("2.13.0", True), (None, True)])
def test_a_torch_that_does_not_know_page_locked_blocks_is_not_told_of_them(monkeypatch, torch, told):
    def version(package: str) -> str:
        if torch is None:
            raise PackageNotFoundError(package)
        return torch

    monkeypatch.setattr("pipeline.plan.environment.version", version)
    variables = environment(planned("hardware.gpu=H200-141GB"), cpus_per_rank=1)
    (said,) = (variable.value for variable in variables if variable.name == "PYTORCH_ALLOC_CONF")
    assert said.startswith("expandable_segments:True")
    assert ("pinned_max_round_threshold_mb" in said) is told


def test_no_group_of_ranks_that_share_a_sequence_straddles_nodes():
    """12 heads on 3 nodes of 8: groups of 12 would cross nodes, groups of 4 stay inside."""
    twelve_heads = ["model.config.num_attention_heads=12", "model.config.num_key_value_heads=12"]
    asked = [*twelve_heads, "model.config.hidden_size=96", "hardware.nodes=3", "hardware.gpus_per_node=8"]
    assert plan_job(load("tiny", overrides=asked)).sp == 4
    with pytest.raises(RecipeError, match=r"sp = 12.*gpus_per_node = 8.*use one of \[1, 2, 4\]"):
        plan_job(load("tiny", overrides=[*asked, "parallel.sp=12"]))
