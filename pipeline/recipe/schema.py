"""The recipe: everything a user can ask for, typed and frozen. First stop of the data path.

Every section has its defaults in `configs/base.yaml`, with units; the schema holds the rules, not the defaults.
A feature that is off is null. A value `auto` is resolved by the plan and written as a number into plan.json.
"""

from enum import StrEnum
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

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


class AnySource(Section):
    """What every source may say about how much of it is taken."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often each document is taken: 2 is twice, 0.5 is half of the documents, chosen by seed."""
    tokens: Count | None = None
    """Take documents in a seeded order until about so many tokens; more than there are begins again."""
    max_document_tokens: Count | None = None
    """Longer texts become several documents."""

    @model_validator(mode="after")
    def _one_measure(self) -> "AnySource":
        if self.tokens is not None and self.weight != 1.0:
            raise ValueError(f"weight {self.weight} and tokens {self.tokens} both say how much; keep one of them")
        return self


class TextSource(AnySource):
    """Plain text files: a file, or the files of a folder that match `glob`; one file is one text."""

    type: Literal["text"]
    path: str
    """A file, a folder, or `python:stdlib`: the standard library's sources, real text that every machine has."""
    glob: str = "**/*.txt"
    exclude: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Folder or file names that are passed over."""
    on_undecodable: Literal["error", "skip"] = "error"
    """What to do with a file that is not UTF-8; skipped files are counted in the manifest."""


class SourceColumns(Section):
    """Which columns of a row hold what; a row is text, a chat (`roles`), or already tokenized (`input_ids`)."""

    text: str | None = None
    """null is `text`."""
    input_ids: str | None = None
    labels: str | None = None
    """As long as input_ids and equal to them where the token counts, -100 where it does not."""
    loss_mask: str | None = None
    """As long as input_ids; 1 where the token counts, 0 where it does not."""
    content: str | None = None
    """Of a chat message; null is `content`."""


class RowSource(AnySource):
    """Rows with named columns."""

    path: str
    columns: SourceColumns = SourceColumns()
    roles: dict[str, str] = {}
    """Role of the chat template -> `messages.role.user` (column, key, value), or a column with that role's text."""

    @property
    def content(self) -> Literal["text", "chat", "tokens"]:
        if self.roles:
            return "chat"
        return "tokens" if self.columns.input_ids else "text"

    @model_validator(mode="after")
    def _one_content(self) -> "RowSource":
        columns = self.columns
        if sum([bool(self.roles), columns.input_ids is not None, columns.text is not None]) > 1:
            raise ValueError("roles, columns.input_ids and columns.text each say what a row is; keep one of them")
        if columns.labels and columns.loss_mask:
            raise ValueError("columns.labels and columns.loss_mask both say what counts; keep one of them")
        if (columns.labels or columns.loss_mask) and not columns.input_ids:
            raise ValueError("columns.labels and columns.loss_mask need columns.input_ids; name it, or remove them")
        if columns.content and not self.roles:
            raise ValueError("columns.content is a chat message's; set roles, or remove it")
        return self

    @model_validator(mode="after")
    def _roles_agree(self) -> "RowSource":
        origins = {tuple(value.split(".")[:-1]) for value in self.roles.values()}
        if len(origins) > 1 or not all(len(origin) in (0, 2) for origin in origins):
            raise ValueError(
                f"roles {self.roles} must all be columns, or all <column>.<key>.<value> with one column and one key; "
                "write e.g. {user: messages.role.user, assistant: messages.role.assistant}"
            )
        if self.roles and "assistant" not in self.roles:
            raise ValueError(f"roles {sorted(self.roles)} name no assistant, whose tokens alone count; add it")
        return self


class JsonlSource(RowSource):
    """One JSON object per line, in a file or the files of a folder that match `glob`; .gz and .zst are unpacked."""

    type: Literal["jsonl"]
    glob: str = "**/*.jsonl*"


class ParquetSource(RowSource):
    """A Parquet file, or the files of a folder that match `glob`."""

    type: Literal["parquet"]
    glob: str = "**/*.parquet"


class HuggingFaceSource(RowSource):
    """A data set on the hub, or a folder that its `save_to_disk` wrote."""

    type: Literal["huggingface"]
    name: str | None = None
    """The hub's configuration."""
    split: str | None = None
    """null is the only one there is."""
    revision: str | None = None


class PackedSource(AnySource):
    """A packed data set of ours; its documents as they lie in its samples, with what counts of them."""

    type: Literal["packed"]
    path: str


Source = Annotated[
    TextSource | JsonlSource | ParquetSource | HuggingFaceSource | PackedSource, Field(discriminator="type")
]


class LengthWeight(Section):
    """Documents of `[from_tokens, to_tokens)` tokens are taken `weight` times as often."""

    from_tokens: NonNegative = 0
    to_tokens: Count | None = None
    weight: Annotated[float, Field(ge=0)]


class PackingRecipe(Section):
    """Which documents become samples."""

    shortest_document_tokens: Count
    longest_document_tokens: Count | None
    """Documents outside these two are dropped, and counted."""
    length_weights: Annotated[tuple[LengthWeight, ...], Field(strict=False)]
    unfilled_last: Literal["keep", "drop"]
    """What to do with the sample that has most padding."""


class DataRecipe(Section):
    """Which documents, which tokenizer, how long a sample, and how samples are read."""

    sources: Annotated[tuple[Source, ...], Field(strict=False, min_length=1)]
    tokenizer: str | TrainTokenizer | None
    """Hub name or folder; null where all sources are tokenized already."""
    tokenizer_revision: str | None
    separator: str | None
    """Token that ends every text; its document's last token then predicts it. null is none."""
    seq_len: Annotated[int, Field(ge=2, lt=2**31)] | Auto
    """Tokens per sample, over all SP ranks; `auto` is the longest that `alst fit` finds."""
    packing: PackingRecipe
    seed: NonNegative
    cross_document_attention: bool
    order: Literal["shuffled", "by_cost"]
    """Of samples in training; by_cost gives a step samples of like sum of squared document lengths."""
    prefetch: NonNegative
    """Micro-batches read ahead in a thread."""
    verify_checksums: bool
    """Of every slice that training reads."""

    @property
    def sample_tokens(self) -> int:
        """seq_len as a number. Raises ValueError while it is `auto`, which the plan resolves."""
        if self.seq_len == "auto":
            raise ValueError("data.seq_len is auto: take the recipe of a plan")
        return self.seq_len

    @model_validator(mode="after")
    def _texts_need_a_tokenizer(self) -> "DataRecipe":
        texts = [source for source in self.sources if isinstance(source, TextSource | RowSource)]
        untokenized = [source for source in texts if isinstance(source, TextSource) or source.content != "tokens"]
        if self.tokenizer is None and (untokenized or self.separator):
            what = f"source {untokenized[0].path!r} is text" if untokenized else f"separator {self.separator!r} is text"
            raise ValueError(f"tokenizer is null and {what}; set data.tokenizer")
        chats = [source.path for source in texts if isinstance(source, RowSource) and source.content == "chat"]
        if chats and isinstance(self.tokenizer, TrainTokenizer):
            raise ValueError(f"source {chats[0]!r} is a chat, and a trained tokenizer has no chat template; name one")
        return self


READING_KEYS = frozenset({"cross_document_attention", "order", "prefetch", "verify_checksums"})
"""Of DataRecipe: how a packed data set is read; they change no byte of it."""


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


class TiledNorm(Section):
    """RMSNorms a tile of tokens at a time: their float32 copies of the hidden states exist for one tile."""

    tile_tokens: Count | Auto


class ActivationCheckpoint(Section):
    """Keep the input of every k-th layer only, and run the layers again in backward."""

    offload: Literal["auto", "cpu", "disk"] | None
    """Where what is kept waits: null is the device, cpu is host memory (ALST §3.3), disk is host memory and, for what
    it has no room for, a file in hardware.scratch; auto is the first of them that has room, and disk only where
    hardware.scratch names a folder."""
    keep_attention: bool | Auto
    """Keep attention's output too, as many bytes again: the kernel runs once in forward and not again."""
    layers_per_group: Count | Auto
    """Layers that share one checkpoint: 1/k of the bytes for one more forward of the layers."""
    resident_groups: NonNegative | Auto
    """Groups, the last ones, that stay on the device all the same; auto is as many as it has room for."""
    disk_groups: NonNegative | Auto
    """Groups that wait on disk; auto is as many as host memory has no room for."""
    checksums: bool
    """What comes back from disk is compared with what went there."""
    offload_dtype: Literal["fp8"] | None
    """Of what is offloaded, but for log-sum-exp; fp8 halves it, and gradients are off by what docs/memory.md says."""

    @model_validator(mode="after")
    def _disk_is_asked_for(self) -> "ActivationCheckpoint":
        if self.disk_groups not in ("auto", 0) and self.offload != "disk":
            raise ValueError(
                f"disk_groups {self.disk_groups} needs offload disk, not {self.offload or 'null'}; set offload: disk, "
                "or disk_groups: auto"
            )
        if self.offload_dtype is not None and self.offload is None:
            raise ValueError(
                f"offload_dtype {self.offload_dtype} needs offload cpu, disk or auto, not null; set "
                "offload_dtype: null, or offload: cpu"
            )
        return self

    @property
    def resolved(self) -> "ResolvedCheckpoint":
        """What `auto` may stand for, as a plan has written it."""
        assert self.offload != "auto"
        assert self.keep_attention != "auto"
        assert self.layers_per_group != "auto"
        assert self.resident_groups != "auto"
        assert self.disk_groups != "auto"
        return ResolvedCheckpoint(self.keep_attention, self.layers_per_group, self.resident_groups, self.disk_groups)


class ResolvedCheckpoint(NamedTuple):
    """The values of ActivationCheckpoint that a plan finds."""

    keep_attention: bool
    layers_per_group: int
    resident_groups: int
    disk_groups: int


Place = Literal["gpu", "cpu"]


class SequenceChunks(Section):
    """Every decoder layer a chunk of the sequence at a time: norms, attention and MLP exist for one chunk, keys and
    values of one layer for all of them."""

    chunk_tokens: Count | Auto = "auto"
    """Tokens of the whole sequence, over all SP ranks; `auto` is 65,536, or 8,192 times sp where that is more."""
    hidden_states: Place | Auto = "auto"
    """Where they lie between layers, with their gradients: cpu is host memory, and they are not kept a second time for
    backward."""
    keys_values: Place | Auto = "auto"
    """Where a layer's keys and values wait for later chunks, with their gradients; cpu is host memory."""
    keep_keys_values: bool | Auto = "auto"
    """Keep them of every layer for backward, which else makes them again: saves a projection of keys and values."""

    @property
    def resolved(self) -> "ResolvedChunks":
        """What `auto` may stand for, as a plan has written it."""
        assert self.chunk_tokens != "auto"
        assert self.hidden_states != "auto"
        assert self.keys_values != "auto"
        assert self.keep_keys_values != "auto"
        return ResolvedChunks(self.chunk_tokens, self.hidden_states, self.keys_values, self.keep_keys_values)


class ResolvedChunks(NamedTuple):
    """The values of SequenceChunks that a plan finds."""

    chunk_tokens: int
    hidden_states: Place
    keys_values: Place
    keep_keys_values: bool


class Allocator(Section):
    expandable_segments: bool
    """CUDA's caching allocator maps segments that grow, and so does not fragment (ALST §3.4)."""


class MemoryRecipe(Section):
    tiled_loss: TiledLoss | None
    tiled_mlp: TiledMLP | None
    tiled_norm: TiledNorm | None
    activation_checkpoint: ActivationCheckpoint | None
    sequence_chunks: SequenceChunks | None
    allocator: Allocator

    @model_validator(mode="after")
    def _chunks_go_with_the_rest(self) -> "MemoryRecipe":
        chunks = self.sequence_chunks
        if chunks is None:
            return self
        if self.activation_checkpoint is None:
            raise ValueError(
                "sequence_chunks needs activation_checkpoint, which is null; set memory.activation_checkpoint.offload: "
                "cpu, or sequence_chunks: null"
            )
        if chunks.hidden_states == "cpu" and (forbidden := self.no_hidden_states_on_host):
            raise ValueError(forbidden)
        return self

    @property
    def no_hidden_states_on_host(self) -> str | None:
        """What forbids them: value, rule and remedy; None where they may lie there."""
        checkpoint, loss = self.activation_checkpoint, self.tiled_loss
        rule = "sequence_chunks.hidden_states cpu needs"
        instead = "or sequence_chunks.hidden_states: gpu"
        if checkpoint is None or checkpoint.offload is None:
            return f"{rule} activation_checkpoint.offload cpu or disk, not null; set offload: cpu, {instead}"
        if checkpoint.offload_dtype is not None:
            return (
                f"{rule} activation_checkpoint.offload_dtype null, not {checkpoint.offload_dtype}: layers read what is "
                f"kept; set offload_dtype: null, {instead}"
            )
        if checkpoint.resident_groups not in ("auto", 0):
            return (
                f"{rule} activation_checkpoint.resident_groups 0 or auto, not {checkpoint.resident_groups}: nothing "
                f"stays on the GPU; set resident_groups: auto, {instead}"
            )
        if loss is not None and loss.kernel == "liger":
            return f"{rule} tiled_loss.kernel own, not liger, which takes all at once; set kernel: own, {instead}"
        return None


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
    stall_seconds: Annotated[float, Field(gt=0)] | Auto | None
    """Without a sign of life from any rank, after which the job is ended and started again; null never."""
    profile_step: Count | None
    """This step of rank 0 runs under torch's profiler, counted from 1; null is none."""
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
    upload_checkpoints: Literal["none", "last", "all"]
    """Their files, beside what is told of each: `last` once the run has ended."""

    @field_validator("uri")
    @classmethod
    def _holds_no_password(cls, uri: str | None) -> str | None:
        if uri is not None and urlsplit(uri).password is not None:
            raise ValueError(
                "holds a password, and the recipe is copied into the run folder and to MLflow; leave it out, and set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (in a job: the file of `secrets`)"
            )
        return uri


class Gpu(StrEnum):
    """Hardware the planner knows; `cpu` trains in processes of this machine."""

    CPU = "cpu"
    A100_80GB = "A100-80GB"
    A100_40GB = "A100-40GB"
    H100_80GB = "H100-80GB"
    GH200_96GB = "GH200-96GB"
    H200_141GB = "H200-141GB"
    B200_192GB = "B200-192GB"


class HardwareRecipe(Section):
    gpu: Annotated[Gpu, Field(strict=False)]
    gpus_per_node: Count
    """Ranks per node; on `cpu`, processes."""
    nodes: Count
    host_memory_gib: Annotated[float, Field(gt=0)] | None
    """Of a node; null is the GPU's profile in `plan/hardware.py`, as for the rates below."""
    fabric_gigabytes_per_second: Annotated[float, Field(gt=0)] | None
    """Between nodes: of the network adapter beside each GPU, one way."""
    disk_gigabytes_per_second: Annotated[float, Field(gt=0)] | None
    """That a node writes to shared storage."""
    scratch: str | None
    """A folder on a disk of each node's own, for what is offloaded there; null is TMPDIR."""
    scratch_gib: Annotated[float, Field(gt=0)] | None
    """That there is room for in it."""
    scratch_gigabytes_per_second: Annotated[float, Field(gt=0)] | None
    """That it is written and read with, all ranks of a node together."""


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
