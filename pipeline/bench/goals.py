"""What this project asks of itself on one H200 with the shapes of Llama-8B, and what a bench found of it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.bench.results import Group, Longest
from pipeline.plan.flops import attention_flops
from pipeline.plan.model_shape import ModelShape
from pipeline.recipe.schema import Gpu

GOAL_GPU = Gpu.H200_141GB
GOAL_HIDDEN = 4096
"""The shape of Llama-8B's layers."""

KEEP, WITHOUT = "keep-attention", "tiled-norm"
"""The rung that keeps attention's output, and the one below it."""
CHUNKS, WHOLE = "sequence-chunks", "layer-groups"
"""The rung whose layers run in chunks, and the one below it."""
REFERENCE_ALL = "offload"
"""The rung that is all the reference has."""


def ideal_keep_attention_ratio(shape: ModelShape, *, tokens: int, with_head: bool = False) -> float:
    """How much faster a step of one document can be when attention's output is kept: (4.5a + 4m) / (3.5a + 4m).

    a and m are FLOPs of one forward in attention and in the layers' matmuls: backward is 2.5a and 2m, and the layer
    runs forward twice. With the head, whose 3h are the same on both sides, it is the ratio of a model of few layers.
    """
    a = attention_flops(shape, sum_len_squared=tokens**2, sum_windowed=tokens**2)
    m = 2 * (shape.matmul_parameters - shape.head_parameters) * tokens
    rest = 4 * m + (3 * 2 * shape.head_parameters * tokens if with_head else 0)
    return (4.5 * a + rest) / (3.5 * a + rest)


@dataclass(frozen=True)
class Gain:
    """What keeping attention's output brought at a length."""

    seq_len: int
    layers: int
    measured: float
    ideal: float
    """Of the model that was measured, its head included."""
    ideal_of_layers: float
    """Of many layers, beside which the head is nothing."""

    @property
    def reached(self) -> float:
        return self.measured / self.ideal


def keep_attention_gains(groups: Sequence[Group]) -> list[Gain]:
    """Of every length at which both rungs ran, by this project's own engine."""
    found = []
    for group, below in _pairs(groups, ("alst", KEEP), ("alst", WITHOUT)):
        assert group.speed is not None
        assert below.speed is not None
        found.append(
            Gain(
                group.seq_len,
                group.layers,
                group.speed / below.speed,
                ideal_keep_attention_ratio(group.shape, tokens=group.seq_len, with_head=True),
                ideal_keep_attention_ratio(group.shape, tokens=group.seq_len),
            )
        )
    return found


@dataclass(frozen=True)
class Against:
    """This project against another at one length."""

    seq_len: int
    layers: int
    ours: Group
    theirs: Group

    @property
    def ratio(self) -> float:
        """Of tokens per second; above one this project is faster."""
        assert self.ours.speed is not None
        assert self.theirs.speed is not None
        return self.ours.speed / self.theirs.speed


def like_against_like(groups: Sequence[Group], engine: str) -> list[Against]:
    """The same features on both sides."""
    rungs = dict.fromkeys(group.rung for group in groups if group.engine == engine)
    return [
        Against(ours.seq_len, ours.layers, ours, theirs)
        for rung in rungs
        for ours, theirs in _pairs(groups, ("alst", rung), (engine, rung))
    ]


def best_against_best(groups: Sequence[Group], engine: str) -> list[Against]:
    """The fastest feature set of each side that ran."""
    found = []
    places = dict.fromkeys((group.seq_len, group.layers) for group in groups)
    for place in places:
        here = [group for group in groups if (group.seq_len, group.layers) == place and group.speed is not None]
        ours = max((group for group in here if group.engine == "alst"), key=_speed, default=None)
        theirs = max((group for group in here if group.engine == engine), key=_speed, default=None)
        if ours is not None and theirs is not None:
            found.append(Against(*place, ours, theirs))
    return found


def _speed(group: Group) -> float:
    return group.speed or 0.0


def _pairs(groups: Iterable[Group], one: tuple[str, str], other: tuple[str, str]) -> Iterator[tuple[Group, Group]]:
    """Groups of equal length and layers that ran, of two (engine, rung)."""
    by_place: dict[tuple[str, str, int, int], Group] = {
        (group.engine, group.rung, group.seq_len, group.layers): group for group in groups if group.speed is not None
    }
    for (engine, rung, seq_len, layers), group in by_place.items():
        partner = by_place.get((*other, seq_len, layers))
        if (engine, rung) == one and partner is not None:
            yield group, partner


@dataclass(frozen=True)
class Goal:
    """A figure that is asked for, and the one that was found; None was not measured."""

    what: str
    asked: str
    found: str | None
    met: bool | None

    @property
    def verdict(self) -> str:
        return "not measured" if self.met is None else ("met" if self.met else "missed")


def goals(groups: Sequence[Group], searches: Sequence[Longest]) -> list[Goal]:
    """The goals for one H200, by what was measured; none of them on any other machine."""
    return [
        _keeping(keep_attention_gains(groups)),
        _against_reference([*like_against_like(groups, "reference"), *best_against_best(groups, "reference")]),
        _utilization(groups),
        _length(searches),
        _stall(groups),
        _in_chunks(groups),
    ]


def _goal(what: str, asked: str, values: Sequence[tuple[float, str]], *, least: float | None, most: float = 0) -> Goal:
    """Met where the worst of (value, told) is at least `least`, or with None at most `most`."""
    if not values:
        return Goal(what, asked, None, None)
    value, told = min(values) if least is not None else max(values)
    return Goal(what, asked, told, value >= least if least is not None else value <= most)


def _keeping(gains: Sequence[Gain]) -> Goal:
    values = [
        (gain.reached, f"{gain.measured:.2f} of {gain.ideal:.2f} at {gain.seq_len:,}: {gain.reached:.1%}")
        for gain in gains
        if gain.seq_len >= 131072
    ]
    return _goal("keep_attention alone, of the ideal, from 128K", ">= 95 %", values, least=0.95)


def _against_reference(pairs: Sequence[Against]) -> Goal:
    values = [
        (pair.ratio, f"{pair.ratio:.2f} x at {pair.seq_len:,}, {pair.ours.rung} against {pair.theirs.rung}")
        for pair in pairs
        if pair.seq_len >= 32768
    ]
    return _goal("speed against the reference, from 32K", "never slower", values, least=1.0)


def _utilization(groups: Sequence[Group]) -> Goal:
    best: dict[int, tuple[float, str]] = {}
    for group in groups:
        mfu = group.median("mfu")
        if group.engine == "alst" and group.ran and mfu is not None and group.seq_len >= 524288:
            told = (mfu, f"{mfu:.1%} at {group.seq_len:,} with {group.rung}, {group.layers} layers")
            best[group.seq_len] = max(best.get(group.seq_len, told), told)
    return _goal("causal MFU in one document of 512K or more", ">= 45 %", list(best.values()), least=0.45)


def _length(searches: Sequence[Longest]) -> Goal:
    values = []
    for layers in dict.fromkeys(search.layers for search in searches):
        found = [search for search in searches if search.layers == layers]
        ours = max((search.seq_len or 0 for search in found if search.engine == "alst"), default=0)
        theirs = max((search.seq_len or 0 for search in found if search.engine == "reference"), default=0)
        if ours and theirs:
            values.append((ours / theirs, f"{ours:,} against {theirs:,} with {layers} layers: {ours / theirs:.2f} x"))
    return _goal("longest sequence against the reference", ">= 2 x", values, least=2.0)


def _stall(groups: Sequence[Group]) -> Goal:
    values = []
    for group in groups:
        stall, seconds = group.median("offload_stall_seconds"), group.median("step_seconds")
        if group.engine == "alst" and group.ran and group.seq_len >= 131072 and stall is not None and seconds:
            values.append((stall / seconds, f"{stall / seconds:.1%} at {group.seq_len:,} with {group.rung}"))
    return _goal("offload stall of a step, from 128K", "< 5 %", values, least=None, most=0.05)


def _in_chunks(groups: Sequence[Group]) -> Goal:
    """Against the same features without chunks, where both fit."""
    values = []
    for chunked, whole in _pairs(groups, ("alst", CHUNKS), ("alst", WHOLE)):
        if chunked.seq_len >= 262144:
            ratio = _speed(chunked) / _speed(whole)
            values.append((ratio, f"{ratio:.1%} at {chunked.seq_len:,}"))
    return _goal("speed in sequence chunks against whole layers, from 256K", ">= 95 %", values, least=0.95)
