"""A point of the parity suite: architecture, mesh, engine, and what the recipe overrides."""

from dataclasses import dataclass

LOCAL_SEQ_LEN = {1: 119, 2: 61, 4: 31, 8: 15}
"""By sp. Odd, and no multiple of any tile."""

NO_LOSS, NO_MLP, NO_NORM = "memory.tiled_loss=null", "memory.tiled_mlp=null", "memory.tiled_norm=null"

CHUNKS = "memory.sequence_chunks={chunk_tokens: 40, hidden_states: gpu, keys_values: gpu, keep_keys_values: false}"
"""By sp: two of 40 tokens and 39 more, three and 2 or 4 more, and three."""
CHUNKS_ON_HOST = (
    "memory.sequence_chunks={chunk_tokens: 56, hidden_states: cpu, keys_values: cpu, keep_keys_values: true}"
)
ONE_CHUNK = "memory.sequence_chunks={chunk_tokens: 400, hidden_states: gpu, keys_values: cpu, keep_keys_values: false}"
"""Longer than any sequence here."""

FEATURES = {
    "none": (NO_LOSS, NO_MLP, NO_NORM, "memory.activation_checkpoint=null"),
    "loss": (NO_MLP, NO_NORM, "memory.activation_checkpoint=null"),
    "mlp": (NO_LOSS, NO_NORM, "memory.activation_checkpoint=null"),
    "norm": (NO_LOSS, NO_MLP, "memory.activation_checkpoint=null"),
    "checkpoint": (NO_LOSS, NO_MLP, NO_NORM, "memory.activation_checkpoint.offload=null"),
    "all": (),
    "groups": ("memory.activation_checkpoint.layers_per_group=2",),
    "kept attention": (
        "memory.activation_checkpoint.keep_attention=true",
        "memory.activation_checkpoint.layers_per_group=2",
    ),
    "chunks": (CHUNKS,),
    "chunks on the host": (CHUNKS_ON_HOST, "memory.activation_checkpoint.keep_attention=true"),
    "disk": ("memory.activation_checkpoint={offload: disk, disk_groups: 1, resident_groups: 1, checksums: true}",),
}
"""Overrides that leave each memory feature alone on, or all, or all and what the default leaves off."""


@dataclass(frozen=True)
class Case:
    """A point of the parity suite. Whatever is not named is as in configs/tiny.yaml."""

    architecture: str = "llama"
    sp: int = 1
    stage: int = 3
    accumulation: int = 1
    dp: int = 1
    overrides: tuple[str, ...] = ()
    engine: bool = True
    """False: no DeepSpeed, in float64."""
    steps: int = 1
    no_labels: bool = False
    """Every label of every sample is ignored: nothing to learn, and nothing may move."""
    sabotage: str = ""
    """What is broken on purpose: scale, boundary or mask. The suite must see it."""
    self_check: bool = False
    """Run the start-up check first; what follows must not notice."""
    gpu: str = "cpu"
    """hardware.gpu; the same for all cases of a launch."""

    @property
    def ranks(self) -> int:
        return self.sp * self.dp

    @property
    def seq_len(self) -> int:
        return self.sp * LOCAL_SEQ_LEN[self.sp]

    @property
    def name(self) -> str:
        engine = f"zero{self.stage}" if self.engine else "float64"
        extra = "".join(f" {override}" for override in self.overrides)
        steps = f" steps{self.steps}" if self.steps > 1 else ""
        check = " self-check" if self.self_check else ""
        check += " no labels" if self.no_labels else ""
        check += f" broken {self.sabotage}" if self.sabotage else ""
        mesh = f"sp{self.sp} dp{self.dp}"
        return f"{self.architecture} {mesh} {engine} accumulation{self.accumulation}{steps}{check}{extra}"
