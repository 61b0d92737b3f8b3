"""A model, a tokenizer and data of the hub, from `alst stage` to a rehearsal: jobs that are offline, with nothing but
what was staged, in an environment that holds nothing but what they need."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig

from pipeline.launch.deadline import GRACE_SECONDS, JOB_END, KILL_SECONDS
from pipeline.launch.slurm import PASSED_ON, PASSED_ON_BY_NAME
from pipeline.plan.run_dir import RunDir
from tests.cluster.user import ROOT, WAIT_SECONDS, losses, run_in, told
from tests.hub import Hub, Repository, started

CANARY = "canary-11d0"
NOWHERE = "http://127.0.0.1:9"
RECIPE = f"""
base: {ROOT / "configs" / "base.yaml"}
name: hub
model: {{name_or_path: org/tiny, dtype: float32}}
data:
  sources: [{{type: huggingface, path: org/texts}}]
  tokenizer: org/tiny
  seq_len: 65536
zero: {{offload_optimizer: null}}
train: {{steps: 100, self_check: null}}
tracking: {{mlflow: false}}
evaluation: {{every_steps: 50, samples: 1}}
"""
OF_A_SHELL = {"PWD", "OLDPWD", "SHLVL", "_", "HOSTNAME", "TMPDIR", "ENVIRONMENT"}
OF_THE_BATCH_SCRIPT = {JOB_END, GRACE_SECONDS, KILL_SECONDS}
OF_THE_CLUSTER = {"CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"}

pytestmark = pytest.mark.timeout(4 * WAIT_SECONDS)


@pytest.fixture
def hub(tmp_path) -> Iterator[Hub]:
    with started() as hub:
        hub.repositories["models/org/tiny"] = Repository.of_folder(tiny_model(tmp_path / "model"))
        rows = [json.dumps({"text": path.read_text()}) for path in sorted(Path(json.__file__).parent.glob("*.py"))]
        hub.repositories["datasets/org/texts"] = Repository({"data/train.jsonl": "\n".join(rows).encode()})
        yield hub


def tiny_model(folder: Path) -> Path:
    """Weights in several files, and a tokenizer of bytes."""
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_what_was_staged_is_rehearsed_offline_in_jobs_of_a_clean_environment(user, profile, hub, tmp_path):
    (tmp_path / "hub.yaml").write_text(RECIPE)
    home, environment = {"HF_HOME": str(tmp_path / "home")}, tmp_path / "environment"
    cluster = profile(setup=[f"env -0 > {environment}"], hardware={"gpus_per_node": 1}, pack={"tasks": 1})
    asked = ["submit", str(tmp_path / "hub.yaml"), "--cluster", cluster, "--nodes", "2", "--rehearse"]

    user.alst("stage", str(tmp_path / "hub.yaml"), "--cluster", cluster, HF_ENDPOINT=hub.url, **home)
    shard = next((tmp_path / "home").rglob("snapshots/*/model-00002-of-*"))
    kept = shard.rename(tmp_path / "kept")
    printed = user.alst(*asked, code=2, HF_ENDPOINT=NOWHERE, **home)
    assert f"{shard.name} is not there; run `alst stage` with this recipe" in printed

    kept.rename(shard)
    printed = user.alst(*asked, HF_ENDPOINT=NOWHERE, SOME_SETTING=CANARY, HF_TOKEN=CANARY, **home)
    run = run_in(printed)
    assert run.name.startswith("hub-rehearsal-")
    assert len(losses(run)) == 3, told(run)
    plan = json.loads((run / "plan.json").read_text())
    assert (plan["seq_len"], plan["nodes"], plan["world_size"]) == (8192, 2, 2)
    commits = {name: repository.commit for name, repository in hub.repositories.items()}
    assert plan["recipe"]["model"]["revision"] == commits["models/org/tiny"]
    assert plan["recipe"]["data"]["tokenizer_revision"] == commits["models/org/tiny"]
    assert plan["recipe"]["data"]["sources"][0]["revision"] == commits["datasets/org/texts"]
    assert not RunDir(run).checkpoints.exists()
    assert re.search(r"train +COMPLETED|train  job \d+: COMPLETED", printed)
    line = r"^  (.+?)  +([\d.,]+|-)(?: GiB)?  +([\d.,]+|-)(?: GiB)?$"
    seen = re.findall(line, printed.partition("3 steps  ")[2], re.MULTILINE)
    assert [name for name, *_ in seen] == [
        "GPU memory, fullest rank", "host memory, a rank", "seconds per step", "tokens per second",
    ]  # fmt: skip
    assert [row[1] == "-" for row in seen] == [True, False, False, False], "there is no GPU"
    assert [row[2] == "-" for row in seen] == [False, False, True, True], "nobody knows the speed of a CPU"
    assert user.alst("status", run.name).endswith(printed[printed.index("3 steps  ") :])

    variables = dict(row.partition("=")[::2] for row in environment.read_text().split("\0") if row)
    assert CANARY not in environment.read_text()
    expected = {*PASSED_ON, *PASSED_ON_BY_NAME} | OF_A_SHELL | OF_THE_BATCH_SCRIPT | OF_THE_CLUSTER
    strange = {name for name in variables if not name.startswith(("SLURM", "SBATCH", "SRUN", "SUBMITIT"))} - expected
    assert strange == set(), "what the login shell sets, or the one who submits"
    assert variables["HF_HOME"] == home["HF_HOME"]
