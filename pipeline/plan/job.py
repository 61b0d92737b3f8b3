"""Recipe -> JobPlan: every derived number of a job, computed once, on any machine, and written to plan.json.

What a rank needs to know about sizes it reads here; nothing is negotiated at run time.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from math import ceil
from pathlib import Path
from typing import Any

from pipeline.errors import RecipeError, UserError
from pipeline.plan.auto import combinations, fastest
from pipeline.plan.chunk_places import keeping_keys, places
from pipeline.plan.fit import longest
from pipeline.plan.flops import model_flops, seen_keys
from pipeline.plan.hardware import GIB
from pipeline.plan.image import Image
from pipeline.plan.model_shape import ModelShape, divisors, model_shape
from pipeline.plan.model_support import require_chunks
from pipeline.plan.placement import placed
from pipeline.recipe.load import check
from pipeline.recipe.schema import READING_KEYS, Recipe, TiledMLP, TiledNorm

PLAN_VERSION = 4
PACKED_FORMAT_VERSION = 3
"""Of packed data sets; one of another format is another data set."""

LOGITS_TILE_BYTES = 1 * GIB
"""Of float32 logits in one tile: large enough for full matmuls, 2,048 tokens at a vocabulary of 128K (ALST §3.1)."""

MLP_TILE_TOKENS = 16384
"""Tiles of 16K to 32K tokens ran 3.2x faster than ALST's seq_len / hidden_size tiles; below 4K tiling only costs."""

NORM_TILE_TOKENS = 4096
"""16M elements at a hidden size of 4096: a GPU is busy with them, and seven float32 copies are 0.5 GiB."""

CHUNK_TOKENS = 65536
"""As FPDT's: attention of a chunk then takes far longer than the copies of keys and values that hide behind it."""
LOCAL_CHUNK_TOKENS = 8192
"""The least of a rank's, which keep matmuls busy."""


@dataclass(frozen=True)
class JobPlan:
    """What will run. `recipe` is the resolved recipe: its `auto` values are numbers here."""

    recipe: Recipe
    model: ModelShape
    nodes: int
    world_size: int
    dp: int
    sp: int
    seq_len: int
    local_seq_len: int
    chunk_tokens: int
    """Tokens of the sequence, over all SP ranks, that a layer sees at once; seq_len when the feature is off."""
    local_chunk_tokens: int
    """A rank's part of it."""
    num_chunks: int
    samples_per_step: int
    tokens_per_step: int
    loss_tile_tokens: int
    """Tokens per tile of logits; local_seq_len when the feature is off."""
    num_loss_tiles: int
    mlp_tile_tokens: int
    """Tokens per MLP tile; local_chunk_tokens when the feature is off, or the tiles are no smaller."""
    num_mlp_tiles: int
    """Of a rank's shard, over all its chunks."""
    norm_tile_tokens: int
    """Tokens per tile of an RMSNorm; local_seq_len when the feature is off."""
    model_flops_per_step: int
    """At one document per sample, the most there can be; the job counts the documents it trains on."""
    image: Image | None = None
    """What its jobs run in, from `alst submit` on; None without a container."""

    def to_json(self) -> dict[str, Any]:
        numbers = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("recipe", "model", "image")}
        return {
            "plan_version": PLAN_VERSION,
            "name": self.recipe.name,
            **numbers,
            "model": {**asdict(self.model), "matmul_parameters": self.model.matmul_parameters},
            "recipe": self.recipe.model_dump(mode="json"),
            "image": None if self.image is None else self.image.to_json(),
        }

    @property
    def held_out(self) -> int:
        """Samples of the run's own packed data set that training leaves alone."""
        recipe = self.recipe.evaluation
        return recipe.samples if recipe is not None and recipe.packed is None else 0

    @property
    def sample_order(self) -> str:
        """Names the order in which training sees the samples of a packed data set: positions mean the same in it."""
        data = self.recipe.data
        told = f"{data.order}, {self.held_out} held out"
        if data.order == "by_cost":
            costs = "samples" if data.cross_document_attention else "documents"
            told += f", {self.samples_per_step} a step, by cost of {costs}"
        return told

    @property
    def packing_key(self) -> str:
        """Names the packed data set: equal for recipes that ask for the same bytes."""
        data = self.recipe.data.model_dump(mode="json", exclude=set(READING_KEYS))
        said = {"data": data, "vocab_size": self.model.vocab_size, "format": PACKED_FORMAT_VERSION}
        asked = json.dumps(said, sort_keys=True)
        return f"{self.seq_len}-{hashlib.sha256(asked.encode()).hexdigest()[:12]}"


def plan_job(recipe: Recipe, *, shape: ModelShape | None = None) -> JobPlan:
    """Resolve a recipe into numbers. Raises RecipeError where its numbers do not go together.

    `shape` is the model's when it is known already: a compute node may not hold the model's config.json.
    """
    shape = shape or model_shape(recipe.model)
    if recipe.memory.sequence_chunks is not None:
        require_chunks(shape.model_type)
    sp = _resolve_sp(recipe, shape, recipe.hardware.nodes * recipe.hardware.gpus_per_node)
    if recipe.data.seq_len == "auto":
        return longest(lambda seq_len: _fastest_plan(recipe, shape, sp, seq_len), sp=sp)
    return _fastest_plan(recipe, shape, sp, recipe.data.seq_len)


def _fastest_plan(recipe: Recipe, shape: ModelShape, sp: int, seq_len: int) -> JobPlan:
    """The plan for samples of this length, with what is `auto` in what waits for backward as it is fastest."""
    found = _fastest_of((one for place in places(recipe) for one in combinations(place)), shape, sp, seq_len)
    keeping = keeping_keys(recipe, found.recipe)
    return found if keeping is None else fastest([found, placed(_plan_of(keeping, shape, sp, seq_len))])


def _fastest_of(candidates: Iterable[Recipe], shape: ModelShape, sp: int, seq_len: int) -> JobPlan:
    plans = [placed(_plan_of(candidate, shape, sp, seq_len)) for candidate in candidates]
    return plans[0] if len(plans) == 1 else fastest(plans)


def _plan_of(recipe: Recipe, shape: ModelShape, sp: int, seq_len: int) -> JobPlan:
    """The plan for samples of this length."""
    hardware = recipe.hardware
    world_size = hardware.nodes * hardware.gpus_per_node
    if seq_len % sp:
        lower, upper = seq_len // sp * sp, ceil(seq_len / sp) * sp
        raise RecipeError(
            f"data.seq_len = {seq_len}: must be a multiple of parallel.sp = {sp}; use {lower or upper} or {upper}"
        )
    local_seq_len = seq_len // sp
    loss_tile_tokens = _loss_tile_tokens(recipe, shape, local_seq_len)
    chunk_tokens = _chunk_tokens(recipe, sp, seq_len)
    local_chunk_tokens = chunk_tokens // sp
    mlp_tile_tokens = _tile_tokens(recipe.memory.tiled_mlp, MLP_TILE_TOKENS, local_chunk_tokens)
    norm_tile_tokens = _tile_tokens(recipe.memory.tiled_norm, NORM_TILE_TOKENS, local_seq_len)
    _check_self_check(recipe, sp, seq_len)
    dp = world_size // sp
    samples_per_step = dp * recipe.train.micro_batch * recipe.train.grad_accumulation
    tokens_per_step = samples_per_step * seq_len
    return JobPlan(
        recipe=_resolved(
            recipe,
            sp,
            seq_len,
            chunk_tokens,
            tiled_loss=loss_tile_tokens,
            tiled_mlp=mlp_tile_tokens,
            tiled_norm=norm_tile_tokens,
        ),
        model=shape,
        nodes=hardware.nodes,
        world_size=world_size,
        dp=dp,
        sp=sp,
        seq_len=seq_len,
        local_seq_len=local_seq_len,
        chunk_tokens=chunk_tokens,
        local_chunk_tokens=local_chunk_tokens,
        num_chunks=ceil(seq_len / chunk_tokens),
        samples_per_step=samples_per_step,
        tokens_per_step=tokens_per_step,
        loss_tile_tokens=loss_tile_tokens,
        num_loss_tiles=ceil(local_seq_len / loss_tile_tokens),
        mlp_tile_tokens=mlp_tile_tokens,
        num_mlp_tiles=_num_tiles(local_seq_len, local_chunk_tokens, mlp_tile_tokens),
        norm_tile_tokens=norm_tile_tokens,
        model_flops_per_step=model_flops(
            shape,
            tokens=tokens_per_step,
            sum_len_squared=samples_per_step * seq_len**2,
            sum_windowed=samples_per_step * seen_keys([seq_len], shape.window),
        ),
    )


def read_plan(path: Path) -> JobPlan:
    """The plan in a plan.json. Raises UserError if it is missing, damaged, or of another version."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a plan ({error}); make one with `alst plan RECIPE --json`") from None
    version = raw.get("plan_version") if isinstance(raw, dict) else None
    if version != PLAN_VERSION:
        raise UserError(f"{path}: plan_version {version!r}, this code reads {PLAN_VERSION}; plan the recipe again")
    try:
        plan = plan_job(check(raw.get("recipe") or {}), shape=_stored_shape(raw.get("model")))
        plan = replace(plan, image=_stored_image(raw.get("image")))
    except RecipeError as error:
        raise UserError(f"{path}: its recipe does not hold: {error}; plan the recipe again") from None
    if changed := sorted(key for key, value in plan.to_json().items() if raw.get(key) != value):
        raise UserError(f"{path}: {', '.join(changed)} do not follow from its recipe; plan the recipe again")
    return plan


def _stored_shape(raw: Any) -> ModelShape:
    """The model's shape in a plan.json. Raises RecipeError if it is not whole."""
    names = {field.name for field in fields(ModelShape)}
    try:
        return ModelShape(**{name: value for name, value in dict(raw).items() if name in names})
    except (TypeError, ValueError):
        raise RecipeError("model is not a model's shape") from None


def _stored_image(raw: Any) -> Image | None:
    """The image in a plan.json. Raises RecipeError if it is not whole."""
    try:
        return None if raw is None else Image(**raw)
    except TypeError:
        raise RecipeError("image is not an image") from None


def _resolve_sp(recipe: Recipe, shape: ModelShape, world_size: int) -> int:
    """The SP degree: as asked, if heads and world allow it; `auto` is the largest that both allow."""
    heads = shape.num_query_heads
    per_node = recipe.hardware.gpus_per_node
    fitting = [
        d for d in divisors(heads) if world_size % d == 0 and _kv_heads_split(shape, d) and _fits_nodes(d, per_node)
    ]
    asked = recipe.parallel.sp
    if asked == "auto":
        return fitting[-1]
    if heads % asked or not _kv_heads_split(shape, asked):
        raise RecipeError(
            f"parallel.sp = {asked}: must divide num_attention_heads = {heads}, and divide or be a multiple of "
            f"num_key_value_heads = {shape.num_kv_heads}; use one of {fitting}"
        )
    if world_size % asked:
        raise RecipeError(
            f"parallel.sp = {asked}: must divide the {world_size} ranks of hardware.nodes x gpus_per_node; "
            f"use one of {fitting}"
        )
    if not _fits_nodes(asked, per_node):
        raise RecipeError(
            f"parallel.sp = {asked}: must divide hardware.gpus_per_node = {per_node} or be a multiple of it, so that "
            f"no group straddles nodes; use one of {fitting}"
        )
    return asked


def _fits_nodes(sp: int, gpus_per_node: int) -> bool:
    """Whether groups of neighbours stay inside a node, or take whole nodes."""
    return gpus_per_node % sp == 0 or sp % gpus_per_node == 0


def _kv_heads_split(shape: ModelShape, sp: int) -> bool:
    """Whether KV heads can be dealt out or replicated evenly over sp ranks."""
    return shape.num_kv_heads % sp == 0 or sp % shape.num_kv_heads == 0


def _loss_tile_tokens(recipe: Recipe, shape: ModelShape, local_seq_len: int) -> int:
    feature = recipe.memory.tiled_loss
    if feature is None:
        return local_seq_len
    if feature.kernel == "liger":
        return _liger_tile_tokens(feature.tile_tokens, shape, local_seq_len)
    automatic = max(1, LOGITS_TILE_BYTES // (4 * shape.vocab_size))
    return min(automatic if feature.tile_tokens == "auto" else feature.tile_tokens, local_seq_len)


def _liger_tile_tokens(asked: int | str, shape: ModelShape, local_seq_len: int) -> int:
    """What Liger takes, whatever is asked: a power of two near the tokens whose logits are as large as all hidden
    states (liger-kernel 0.8, ops/fused_linear_cross_entropy.py)."""
    fitting = ceil(local_seq_len / ceil(shape.vocab_size / shape.hidden_size))
    tile_tokens = min(1 << (fitting - 1).bit_length(), local_seq_len)
    if asked not in ("auto", tile_tokens):
        raise RecipeError(
            f"memory.tiled_loss.tile_tokens = {asked}: must be {tile_tokens}, as kernel liger chooses it; "
            "set memory.tiled_loss.tile_tokens: auto"
        )
    return tile_tokens


def _tile_tokens(feature: TiledMLP | TiledNorm | None, automatic: int, local_seq_len: int) -> int:
    if feature is None:
        return local_seq_len
    return min(automatic if feature.tile_tokens == "auto" else feature.tile_tokens, local_seq_len)


def _chunk_tokens(recipe: Recipe, sp: int, seq_len: int) -> int:
    """Tokens of the whole sequence that a layer sees at once."""
    feature = recipe.memory.sequence_chunks
    if feature is None:
        return seq_len
    asked = max(CHUNK_TOKENS, LOCAL_CHUNK_TOKENS * sp) if feature.chunk_tokens == "auto" else feature.chunk_tokens
    lower, upper = asked // sp * sp, ceil(asked / sp) * sp
    if lower != upper and feature.chunk_tokens != "auto":
        raise RecipeError(
            f"memory.sequence_chunks.chunk_tokens = {asked}: must be a multiple of parallel.sp = {sp}; "
            f"use {lower or upper} or {upper}"
        )
    return min(upper, seq_len)


def _num_tiles(tokens: int, chunk_tokens: int, tile_tokens: int) -> int:
    """Tiles of so many tokens that are cut into chunks first."""
    chunks, rest = divmod(tokens, chunk_tokens)
    return chunks * ceil(chunk_tokens / tile_tokens) + ceil(rest / tile_tokens)


def _check_self_check(recipe: Recipe, sp: int, seq_len: int) -> None:
    check_recipe = recipe.train.self_check
    if check_recipe is not None and min(check_recipe.tokens, seq_len) % sp:
        raise RecipeError(
            f"train.self_check.tokens = {check_recipe.tokens}: must be a multiple of sp = {sp}; "
            f"use {ceil(check_recipe.tokens / sp) * sp}"
        )


def _resolved(recipe: Recipe, sp: int, seq_len: int, chunk_tokens: int, **tile_tokens: int) -> Recipe:
    """The recipe with every `auto` written as a number; `tile_tokens` by feature."""
    raw = recipe.model_dump(mode="json")
    raw["data"]["seq_len"] = seq_len
    raw["parallel"]["sp"] = sp
    if raw["memory"]["sequence_chunks"] is not None:
        raw["memory"]["sequence_chunks"]["chunk_tokens"] = chunk_tokens
    for feature, tokens in tile_tokens.items():
        if raw["memory"][feature]:
            raw["memory"][feature]["tile_tokens"] = tokens
    return check(raw)
