"""What one run of the bench is asked: who trains, with which features, how long. A case becomes a recipe of its own.

The recipe alone repeats the run: `alst train CASE.yaml`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.bench.corpus import DOCUMENT_TOKENS
from pipeline.bench.ladder import overrides_of
from pipeline.bench.machine import Machine
from pipeline.errors import UserError
from pipeline.plan.job import JobPlan, plan_job
from pipeline.plan.known_models import KNOWN_MODELS
from pipeline.plan.model_shape import model_config
from pipeline.recipe.load import apply_override, check, find, load, read_chain
from pipeline.recipe.schema import Gpu, Recipe

Engine = Literal["alst", "reference", "plain"]
ENGINES: tuple[Engine, ...] = ("alst", "reference", "plain")
Purpose = Literal["speed", "length"]

STILL = (
    # What surrounds training would be measured with it: the self-check builds a second model.
    "train.self_check=null",
    "train.grad_accumulation=1",
    "evaluation=null",
    "checkpoint=null",
    "tracking.mlflow=false",
    "schedule={name: constant, warmup_steps: 0}",
    "model={name_or_path: null, revision: null, init: random}",
    "data={tokenizer: null, tokenizer_revision: null, separator: null, order: shuffled}",
)

MOST_PARAMETERS_ON_A_CPU = 200_000_000
"""A run of a real model's layers would last for hours there."""


@dataclass(frozen=True)
class Case:
    """One run."""

    engine: Engine
    rung: str
    seq_len: int
    layers: int
    purpose: Purpose
    repeat: int = 1

    @property
    def key(self) -> str:
        """Its name, in file names too."""
        told = f"{self.engine}-{self.rung}-{self.seq_len}-{self.layers}l"
        return told + (f"-r{self.repeat}" if self.purpose == "speed" else "-length")


@dataclass(frozen=True)
class Basis:
    """What all cases of a bench share."""

    recipe: str
    """A path, or a name under configs/."""
    machine: Machine
    corpus: Path
    model: str | None
    """Of `known_models`, instead of the recipe's."""
    steps: int
    """That are measured, after one that is not."""
    overrides: tuple[str, ...]
    """The user's; they win."""


def recipe_of(case: Case, basis: Basis) -> Recipe:
    """The case's recipe. Raises RecipeError where its numbers do not go together, UserError for an unknown model."""
    raw = read_chain(find(basis.recipe))
    processes = raw["hardware"]["gpus_per_node"] if raw["hardware"]["gpu"] == Gpu.CPU else 1
    config = config_of(basis)
    asked = [
        *basis.machine.overrides(processes),
        *STILL,
        f"name={case.key}",
        f"train.steps={1 + basis.steps}",
        f"data.seq_len={case.seq_len}",
        # Speed is that of one document; bytes do not depend on documents, and many short ones take less time.
        f"data.cross_document_attention={str(case.purpose == 'speed').lower()}",
        *(("parallel.sp=1",) if case.engine == "plain" else ()),
        *overrides_of(case.rung),
    ]
    for override in asked:
        apply_override(raw, override)
    raw["model"]["config"] = _shaped(config, layers=case.layers, seq_len=case.seq_len)
    raw["data"]["sources"] = [_source(basis.corpus, case.seq_len)]
    for override in basis.overrides:
        apply_override(raw, override)
    return check(raw)


def plan_of(case: Case, basis: Basis) -> JobPlan:
    """The case's plan. Raises UserError for a model that a CPU would train for hours."""
    plan = plan_job(recipe_of(case, basis))
    parameters = plan.model.total_parameters
    if plan.recipe.hardware.gpu is Gpu.CPU and parameters > MOST_PARAMETERS_ON_A_CPU:
        raise UserError(
            f"{basis.model or basis.recipe}: {parameters / 1e6:,.0f}M parameters with {case.layers} layers, and "
            f"without a GPU at most {MOST_PARAMETERS_ON_A_CPU / 1e6:,.0f}M are measured; bench where a GPU is, or "
            "`alst bench tiny`"
        )
    return plan


def config_of(basis: Basis) -> Mapping[str, Any]:
    """Of the model whose shape is measured, whole. Raises UserError for a name that the planner's table has not."""
    if basis.model is None:
        return model_config(load(basis.recipe).model)
    if basis.model not in KNOWN_MODELS:
        raise UserError(f"--model {basis.model}: its sizes are not known here; use one of {', '.join(KNOWN_MODELS)}")
    return KNOWN_MODELS[basis.model]


def _shaped(config: Mapping[str, Any], *, layers: int, seq_len: int) -> dict[str, Any]:
    """The config with so many layers, and positions for the whole sample."""
    positions = max(seq_len, config.get("max_position_embeddings") or 0)
    shape = {**config, "num_hidden_layers": layers, "max_position_embeddings": positions}
    if shape.get("layer_types"):
        shape["layer_types"] = shape["layer_types"][:layers]
    return shape


def _source(corpus: Path, seq_len: int) -> dict[str, Any]:
    """One sample's worth of rows; replicas and steps take it again."""
    return {
        "type": "huggingface",
        "path": str(corpus),
        "columns": {"input_ids": "input_ids"},
        "max_document_tokens": min(DOCUMENT_TOKENS, seq_len),
        "tokens": seq_len,
    }
