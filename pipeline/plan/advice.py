"""What to change: the cheapest changes that make a plan fit, and the cheapest features for a wanted length."""

from collections.abc import Iterator, Sequence
from itertools import product

from pipeline.errors import RecipeError
from pipeline.plan.estimate import Advice, Estimate, estimate
from pipeline.plan.job import JobPlan, plan_job
from pipeline.plan.limits import load_of
from pipeline.plan.model_shape import ModelShape, model_shape
from pipeline.recipe.load import apply_override, check
from pipeline.recipe.schema import Recipe

_PLANNED = "keep_attention: auto, resident_groups: auto, disk_groups: auto, checksums: false, offload_dtype: null"
_MADE_AGAIN = "keep_keys_values: false"
LEVELS: tuple[tuple[str, ...], ...] = (
    # One tuple per feature, from off to on.
    ("memory.tiled_loss=null", "memory.tiled_loss={tile_tokens: auto, kernel: own}"),
    ("memory.tiled_mlp=null", "memory.tiled_mlp={tile_tokens: auto}"),
    ("memory.tiled_norm=null", "memory.tiled_norm={tile_tokens: auto}"),
    (
        "memory.activation_checkpoint=null",
        f"memory.activation_checkpoint={{offload: null, layers_per_group: 1, {_PLANNED}}}",
        f"memory.activation_checkpoint={{offload: cpu, layers_per_group: auto, {_PLANNED}}}",
        f"memory.activation_checkpoint={{offload: disk, layers_per_group: 1, {_PLANNED}}}",
    ),
    (
        "memory.sequence_chunks=null",
        f"memory.sequence_chunks={{hidden_states: gpu, keys_values: gpu, {_MADE_AGAIN}}}",
        f"memory.sequence_chunks={{hidden_states: cpu, keys_values: gpu, {_MADE_AGAIN}}}",
        f"memory.sequence_chunks={{hidden_states: cpu, keys_values: cpu, {_MADE_AGAIN}}}",
    ),
    ("zero.offload_optimizer=null", "zero.offload_optimizer=cpu"),
    ("zero.offload_parameters=null", "zero.offload_parameters=cpu"),
)
"""What `alst fit --features auto` chooses among, and advice as well."""

ALWAYS = ("memory.allocator.expandable_segments=true", "zero.stage=3", "parallel.sp=auto")
"""What costs next to nothing."""

MOST_NODES = 1024


def changed(recipe: Recipe, changes: Sequence[str]) -> Recipe:
    """The recipe with overrides. Raises RecipeError where they do not go together."""
    raw = recipe.model_dump(mode="json")
    for change in changes:
        apply_override(raw, change)
    return check(raw)


def advise(plan: JobPlan) -> tuple[Advice, ...]:
    """Changes, each made after those before it, that make the plan fit; the cheapest first. None if it fits."""
    found: list[Advice] = []
    now, recipe = estimate(plan), plan.recipe
    while not now.load.fits:
        best = min(_helpful(recipe, now), key=lambda option: _cost(option[1], now), default=None)
        if best is None:
            return (*found, *_last_resorts(recipe, now))
        changes, after = best
        found.append(_advice(changes, now, after))
        now, recipe = after, changed(recipe, changes)
    return tuple(found)


def _helpful(recipe: Recipe, now: Estimate) -> Iterator[tuple[tuple[str, ...], Estimate]]:
    """Single changes that lessen what is missing of one memory and of none make it more."""
    tiles = [
        f"memory.{name}.tile_tokens=auto"
        for name in ("tiled_loss", "tiled_mlp", "tiled_norm")
        if getattr(recipe.memory, name)
    ]
    for change in (*ALWAYS, *(change for level in LEVELS for change in level), *tiles):
        plan = _planned(recipe, (change,), now.plan.model)
        if plan is None or plan == now.plan:
            continue
        after = estimate(plan)
        less = [then < before for then, before in zip(_missing(after), _missing(now), strict=True)]
        more = [then > before for then, before in zip(_missing(after), _missing(now), strict=True)]
        if any(less) and not any(more):
            yield (change,), after


def _last_resorts(recipe: Recipe, now: Estimate) -> Iterator[Advice]:
    """A shorter sequence, and more nodes in its place."""
    shape = now.plan.model
    shorter = _planned(recipe, ("data.seq_len=auto",), shape)
    if shorter is not None:
        yield _advice((f"data.seq_len={shorter.seq_len}",), now, estimate(shorter))
    nodes = 2 * now.plan.nodes
    while nodes <= MOST_NODES:
        changes = (f"hardware.nodes={nodes}", "parallel.sp=auto")
        more = _planned(recipe, changes, shape)
        if more is not None and load_of(more).fits:
            yield _advice(changes, now, estimate(more), instead=shorter is not None)
            return
        nodes *= 2


def _planned(recipe: Recipe, changes: Sequence[str], shape: ModelShape) -> JobPlan | None:
    """The plan with changes; None where they do not go together."""
    try:
        return plan_job(changed(recipe, changes), shape=shape)
    except RecipeError:
        return None


def _missing(now: Estimate) -> tuple[int, int, int]:
    """Bytes, of GPU, host memory and scratch disk."""
    return now.load.missing_bytes


def _seconds_per_token(now: Estimate) -> float | None:
    """Of a GPU."""
    return None if now.seconds is None else now.seconds.total * now.plan.world_size / now.plan.tokens_per_step


def _cost(after: Estimate, now: Estimate) -> tuple[float, int]:
    """What is cheapest comes first: the seconds, then what still is missing."""
    return (_ratio(after, now) or 1.0, sum(_missing(after)))


def _ratio(after: Estimate, now: Estimate) -> float | None:
    before, then = _seconds_per_token(now), _seconds_per_token(after)
    return None if before is None or then is None else then / before


def _advice(changes: tuple[str, ...], now: Estimate, after: Estimate, *, instead: bool = False) -> Advice:
    return Advice(
        changes=changes,
        frees_gpu_bytes=now.load.gpu.total - after.load.gpu.total,
        frees_host_bytes_per_node=now.load.host.total - after.load.host.total,
        seconds_per_token_ratio=_ratio(after, now),
        fits=after.load.fits,
        instead=instead,
    )


def feature_sets(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe with every set of features that go together, the fewest first."""
    ranked = sorted(product(*(range(len(level)) for level in LEVELS)), key=lambda chosen: (sum(chosen), chosen))
    for chosen in ranked:
        picked = [level[number] for level, number in zip(LEVELS, chosen, strict=True)]
        try:
            yield changed(recipe, [*ALWAYS, *picked])
        except RecipeError:  # hidden states in host memory, and their checkpoints on the device
            continue


def cheapest(recipe: Recipe, shape: ModelShape) -> JobPlan:
    """The plan for the recipe's length with the features that make its step the shortest, of those that fit.

    For `seq_len: auto` the length is the longest that any set of features reaches. Where no seconds are known, on a
    CPU, the fewest features that fit. Raises RecipeError if none does.
    """
    sets = list(feature_sets(recipe))
    length = _longest(sets, shape) if recipe.data.seq_len == "auto" else recipe.data.seq_len
    plans = [_planned(one, (f"data.seq_len={length}",), shape) for one in sets] if length else []
    fitting = [plan for plan in plans if plan is not None and load_of(plan).fits]
    if not fitting:
        raise RecipeError(
            f"data.seq_len = {recipe.data.seq_len}: fits with no set of features on {recipe.hardware.nodes} nodes of "
            f"{recipe.hardware.gpus_per_node} {recipe.hardware.gpu.value}; take a shorter one, or more nodes"
        )
    return min(map(estimate, fitting), key=lambda found: _seconds_per_token(found) or 0.0).plan


def _longest(sets: Sequence[Recipe], shape: ModelShape) -> int:
    """The longest sequence that any of them reaches; 0 if none reaches any. Those with most features come first, and
    what does not fit as long as the longest so far is not looked at further."""
    length = 0
    for one in reversed(sets):
        tried = _planned(one, (f"data.seq_len={length}",), shape) if length else None
        if length and (tried is None or not load_of(tried).fits):
            continue
        found = _planned(one, (), shape)
        length = length if found is None else max(length, found.seq_len)
    return length


def choose(recipe: Recipe, *, features: str) -> JobPlan:
    """The plan with the recipe's own features, or with `auto` the cheapest."""
    shape = model_shape(recipe.model)
    return cheapest(recipe, shape) if features == "auto" else plan_job(recipe, shape=shape)
