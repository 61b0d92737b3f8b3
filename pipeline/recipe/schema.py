"""The recipe: everything a user can ask for, typed and frozen. First stop of the data path.

Every section has its defaults in `configs/base.yaml`, with units; the schema holds the rules, not the defaults.
A feature that is off is null. A value `auto` is resolved by the plan and written as a number into plan.json.
"""

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Auto = Literal["auto"]
Count = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of the recipe: frozen, no unknown keys, no silent conversion (`"8"` is not 8, `true` is not 1)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelRecipe(Section):
    """Which model, and where its weights come from."""

    name_or_path: str | None
    """Hub name or folder; null when `config` describes the whole model (it then needs `model_type`)."""
    revision: str | None
    init: Literal["pretrained", "random"]
    config: dict[str, Any]
    """Overrides of the model's own config.json."""
    dtype: Literal["float32", "bfloat16"]
    """Of parameters and activations."""
    attention: Literal["auto", "cpu", "torch", "flash_attention_2", "flash_attention_3", "flash_attention_4"]
    """The kernel behind attention; `auto` takes the fastest that is present."""

    @model_validator(mode="after")
    def _has_an_origin(self) -> "ModelRecipe":
        if self.name_or_path is None and "model_type" not in self.config:
            raise ValueError(
                "name_or_path is null and config has no model_type; name a model, or describe one under model.config"
            )
        if self.name_or_path is None and self.init == "pretrained":
            raise ValueError("init is 'pretrained' but name_or_path is null; name a model, or set model.init: random")
        return self


class TrainTokenizer(Section):
    """A byte-level BPE tokenizer, trained on the sources before they are tokenized."""

    vocab_size: Annotated[int, Field(ge=300)]
    sample_mib: Annotated[float, Field(gt=0)]
    """How much of the sources the training reads."""


class TextSource(Section):
    """Plain text files: a file, or the files of a folder that match `glob`; one file is one document, cut at
    `max_document_tokens`."""

    type: Literal["text"]
    path: str
    """A file, a folder, or `python:stdlib`: the standard library's sources, real text that every machine has."""
    glob: str = "**/*.txt"
    exclude: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Folder or file names that are passed over."""
    max_document_tokens: Count | None = None
    on_undecodable: Literal["error", "skip"] = "error"
    """What to do with a file that is not UTF-8; skipped files are counted in the manifest."""


class JsonlSource(Section):
    """One JSON object per line; `text_column` holds the document."""

    type: Literal["jsonl"]
    path: str
    text_column: str = "text"
    max_document_tokens: Count | None = None


Source = Annotated[TextSource | JsonlSource, Field(discriminator="type")]


class DataRecipe(Section):
    """Which documents, which tokenizer, how long a sample."""

    sources: Annotated[tuple[Source, ...], Field(strict=False, min_length=1)]
    tokenizer: str | TrainTokenizer
    seq_len: Annotated[int, Field(ge=2)]
    """Tokens per sample, over all SP ranks."""
    cross_document_attention: bool
    seed: NonNegative


class ParallelRecipe(Section):
    sp: Count | Auto
    """Ranks that share one sequence; `auto` is the largest divisor of the query heads that divides the world."""


class TiledLoss(Section):
    """Logits and loss a tile of tokens at a time (ALST §3.1)."""

    tile_tokens: Count | Auto
    kernel: Literal["own", "liger"]
    """What computes a tile: this project, or Liger's fused linear cross-entropy, which chooses its own tiles."""


class TiledMLP(Section):
    """The MLP a tile of tokens at a time (ALST §3.1.1)."""

    tile_tokens: Count | Auto


class ActivationCheckpoint(Section):
    """Keep each layer's input only, and run the layer again in backward."""

    offload: Literal["cpu"] | None
    """Where the kept inputs wait: null is the device, cpu is host memory (ALST §3.3)."""


class Allocator(Section):
    expandable_segments: bool
    """CUDA's caching allocator maps segments that grow, and so does not fragment (ALST §3.4)."""


class MemoryRecipe(Section):
    tiled_loss: TiledLoss | None
    tiled_mlp: TiledMLP | None
    activation_checkpoint: ActivationCheckpoint | None
    allocator: Allocator


class ZeroRecipe(Section):
    stage: Annotated[int, Field(ge=0, le=3)]
    offload_optimizer: Literal["cpu"] | None
    offload_parameters: Literal["cpu"] | None
    reduce_scatter: bool
    """Gradients are reduced to their owner only; false reduces them to every rank first."""

    @model_validator(mode="after")
    def _offload_needs_partitions(self) -> "ZeroRecipe":
        if self.offload_parameters and self.stage != 3:
            raise ValueError(f"offload_parameters needs stage 3, not {self.stage}; set zero.stage: 3")
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("offload_optimizer needs stage 1, 2 or 3, not 0; set zero.stage: 3")
        return self


class OptimizerRecipe(Section):
    name: Literal["adamw", "sgd"]
    lr: Annotated[float, Field(gt=0)]
    betas: Annotated[tuple[float, float], Field(strict=False)]
    eps: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    weight_decay_on: Literal["matrices", "all"]
    """`matrices` spares norms, biases and embeddings."""
    states_dtype: Literal["float32", "bfloat16"]
    """Of master weights, gradients and moments; bfloat16 halves them and needs model.dtype bfloat16."""


class ScheduleRecipe(Section):
    """The learning rate: linear warm-up, then constant, linear or cosine decay to `min_lr_fraction` of it."""

    name: Literal["constant", "linear", "cosine"]
    warmup_steps: NonNegative
    min_lr_fraction: Fraction


class SelfCheck(Section):
    """Before the first step, loss and gradient norm of a short sample against the stock model at sp = 1."""

    tokens: Annotated[int, Field(ge=2)]
    """Length of the prefix of the first sample that is checked."""
    tolerance: Annotated[float, Field(gt=0)]
    """Largest relative difference of loss and of gradient norm; more is fatal."""


class TrainRecipe(Section):
    steps: Count
    micro_batch: Annotated[int, Field(ge=1, le=1)]
    """Samples per DP replica per forward; one, because a sample is already millions of tokens."""
    grad_accumulation: Count
    grad_clip: Annotated[float, Field(gt=0)] | None
    seed: NonNegative
    deterministic: bool
    """The same bits from the same start; kernels that cannot promise it are refused."""
    self_check: SelfCheck | None


class CheckpointRecipe(Section):
    """Saving the state of training, in the run folder."""

    every_steps: Count | None
    """null: after the last step only."""
    keep_last: Count
    keep_every: Count | None
    """Checkpoints whose step is a multiple of it are kept as well."""
    asynchronous: bool
    """Train on while bytes are written, wherever host memory has room for a copy of the states."""
    verify: bool
    """Compare checksums of every file before resuming from it; sizes are compared in any case."""


class EvaluationRecipe(Section):
    """The loss on packed samples that training never sees, every so many steps and at the end."""

    every_steps: Count
    samples: Count
    """Held out of training; with `packed`, taken from there instead."""
    packed: str | None = None
    """Another packed data set, as `alst pack` writes it; null holds samples out of the run's own."""


class TrackingRecipe(Section):
    mlflow: bool
    uri: str | None
    """null is sqlite in <runs>/mlflow.db; else a server's URL."""
    experiment: str | None
    """null is the recipe's name."""


class Gpu(StrEnum):
    """Hardware the planner knows; `cpu` trains in processes of this machine."""

    CPU = "cpu"
    A100_80GB = "A100-80GB"
    H100_80GB = "H100-80GB"
    H200_141GB = "H200-141GB"
    B200_192GB = "B200-192GB"


class HardwareRecipe(Section):
    gpu: Annotated[Gpu, Field(strict=False)]
    gpus_per_node: Count
    """Ranks per node; on `cpu`, processes."""
    nodes: Count


class Recipe(Section):
    """What is wanted, whole. Made by `recipe.load.load`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    model: ModelRecipe
    data: DataRecipe
    parallel: ParallelRecipe
    memory: MemoryRecipe
    zero: ZeroRecipe
    optimizer: OptimizerRecipe
    schedule: ScheduleRecipe
    train: TrainRecipe
    checkpoint: CheckpointRecipe | None
    """null: nothing is saved."""
    evaluation: EvaluationRecipe | None
    tracking: TrackingRecipe
    hardware: HardwareRecipe

    @model_validator(mode="after")
    def _liger_needs_a_gpu(self) -> "Recipe":
        loss = self.memory.tiled_loss
        if loss is not None and loss.kernel == "liger" and self.hardware.gpu is Gpu.CPU:
            raise ValueError(
                "memory.tiled_loss.kernel liger needs a CUDA GPU, and hardware.gpu is cpu; "
                "set memory.tiled_loss.kernel: own"
            )
        return self

    @model_validator(mode="after")
    def _narrow_states_need_a_narrow_model(self) -> "Recipe":
        if self.optimizer.states_dtype == "float32":
            return self
        if self.model.dtype != "bfloat16" or self.zero.stage == 0:
            raise ValueError(
                f"optimizer.states_dtype bfloat16 needs model.dtype bfloat16 and zero.stage 1 to 3, not "
                f"{self.model.dtype} and {self.zero.stage}; set optimizer.states_dtype: float32"
            )
        if self.zero.offload_optimizer and self.optimizer.name != "adamw":
            raise ValueError(
                f"optimizer.states_dtype bfloat16 with zero.offload_optimizer needs optimizer.name adamw, not "
                f"{self.optimizer.name}; set optimizer.name: adamw"
            )
        return self
