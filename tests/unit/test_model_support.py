"""Models that would not train exactly are refused by name, on a machine without torch; `alst models` says why."""

import json
import subprocess
import sys

import pytest

from pipeline.errors import RecipeError
from pipeline.plan import model_support
from pipeline.plan.job import plan_job
from pipeline.plan.model_shape import model_shape
from pipeline.plan.model_support import Support, is_dropout, require_exact, require_supported, supported_models
from pipeline.recipe.load import load


def alst(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *arguments], capture_output=True, text=True, check=False, timeout=120
    )


def test_what_the_issue_names_is_supported():
    table = supported_models()
    named = ("llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "mixtral", "gemma2", "gemma3_text", "phi3", "gpt_oss")
    for name in (*named, "gpt_neox", "olmo2", "granite"):
        assert table[name].supported, name


@pytest.mark.parametrize(
    ("model_type", "told"),
    [
        ("nemotron", "'nemotron': would not train exactly: .* lost attention_context"),
        ("qwen3_next", "'qwen3_next': would not train exactly: .*linear_attention"),
        ("llama4_text", "'llama4_text': would not train exactly: .*chunked_attention"),
        ("gemma3", "'gemma3': .*more than text, whose decoder of text alone is gemma3_text"),
        ("lama", "'lama': not tested; did you mean 'llama'"),
        ("something", "'something': not tested; run `alst models --probe something`"),
    ],
)
def test_a_model_that_would_not_train_exactly_is_refused_by_name(model_type, told):
    with pytest.raises(RecipeError, match=told):
        require_supported(model_type)
    with pytest.raises(RecipeError, match=told):
        model_shape(load("tiny", overrides=[f"model.config.model_type={model_type}"]).model)


def test_chunks_are_refused_by_name_where_a_layer_cannot_run_in_them():
    asked = ["model.config.model_type=diffllama", "model.config.num_key_value_heads=4", "memory.sequence_chunks={}"]
    with pytest.raises(RecipeError, match=r"sequence_chunks: must be null for model_type 'diffllama': .*; set memory"):
        plan_job(load("tiny", overrides=asked))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1: must be 0"),
        ({"embd_pdrop": 0.1}, "embd_pdrop = 0.1: must be 0"),
        ({"layerdrop": 0.1}, "layerdrop = 0.1: must be 0"),
        ({"router_jitter_noise": 0.01}, "router_jitter_noise = 0.01: must be 0"),
        ({"layer_types": ["full_attention", "mamba", "conv"]}, "layer_types has conv, mamba"),
        ({"output_router_logits": True}, "output_router_logits = True: must be false"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True: must be false"),
        ({"num_kv_shared_layers": 4}, "num_kv_shared_layers = 4: must be 0"),
        ({"hidden_size_per_layer_input": 256}, "hidden_size_per_layer_input = 256: must be 0"),
        ({"quantization_config": {"bits": 4}}, "quantized weights do not train"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope type 'longrope'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}, "rope type 'dynamic'"),
        ({"rope_scaling": {"type": "su"}}, "rope type 'su'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_config_that_would_train_otherwise_is_refused_with_value_rule_and_remedy(config, told):
    with pytest.raises(RecipeError, match=told) as caught:
        require_exact(config)
    assert ";" in str(caught.value), "no remedy"
    with pytest.raises(RecipeError, match=told):
        model_shape(load("tiny", overrides=["model.config=" + json.dumps(TINY | config)]).model)


TINY = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 8,
    "vocab_size": 300,
}


def test_a_config_that_trains_exactly_passes():
    require_exact(
        {
            "attention_dropout": 0.0,
            "classifier_dropout": 0.1,
            "layer_types": ["full_attention", "sliding_attention"],
            "output_router_logits": False,
            "num_kv_shared_layers": 0,
            "rope_parameters": {"full_attention": {"rope_type": "yarn"}, "sliding_attention": {"rope_type": "default"}},
            "rope_scaling": None,
        }
    )


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("hidden_dropout", 0.0, True),
        ("resid_pdrop", 0, True),
        ("hidden_dropout", None, False),
        ("use_dropout", True, False),
        ("summary_first_dropout", 0.1, False),
        ("hidden_size", 64, False),
    ],
)
def test_what_counts_as_random_in_training(name, value, expected):
    assert is_dropout(name, value) is expected


def test_the_table_is_written_in_order_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(model_support, "TABLE", tmp_path / "table.json")
    models = {"b": Support(True, "", "5.0"), "a": Support(False, "because", "5.1")}
    model_support.write_table(models)
    assert supported_models() == models
    assert list(json.loads((tmp_path / "table.json").read_text())) == ["a", "b"]
    supported_models.cache_clear()


# The command


def test_the_command_lists_what_is_supported_and_why_something_is_not(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    done = alst("models")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "llama yes yes" in lines
    assert any(line.startswith("diffllama yes no DiffLlamaDecoderLayer cannot run in chunks") for line in lines)
    assert "nemotron no NemotronAttention lost attention_context on its way" in lines
    assert (
        f"{sum(s.supported for s in supported_models().values())} of {len(supported_models())} train exactly" in lines
    )


def test_json_stands_alone_on_stdout():
    done = alst("models", "--json")
    assert done.returncode == 0
    found = {name: Support(**row) for name, row in json.loads(done.stdout).items()}
    assert found == supported_models()


def test_listing_models_imports_no_torch():
    code = (
        "import sys; sys.argv = ['alst', 'models', '--json']\nfrom pipeline.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=120).returncode == 0


def test_one_type_can_be_measured_now():
    done = alst("models", "--probe", "llama", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["llama"]["supported"] is True


def test_a_type_that_transformers_does_not_know_ends_with_one_message_and_code_2():
    done = alst("models", "--probe", "lama")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("alst: model_type = 'lama'")
