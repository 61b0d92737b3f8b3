"""What was not run, from what was: a whole model's speed from a few layers, a longest sequence from shorter ones'
peaks. Marked as such wherever it is shown.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.bench.results import Group
from pipeline.plan.flops import model_flops
from pipeline.plan.model_shape import ModelShape


@dataclass(frozen=True)
class Extrapolated:
    """Of the model with all its layers. Nobody has measured it."""

    group: Group
    """The one it stands on: that of most layers."""
    layers: int
    how: str
    step_seconds: float
    tokens_per_second_per_gpu: float
    mfu: float | None


def extrapolated(groups: Sequence[Group], *, layers: int) -> list[Extrapolated]:
    """Of every engine, rung and length that ran with two layers or more.

    Measured with two numbers of layers, along the line through both; with one, in proportion to model FLOPs, which
    leaves out that layers run again in backward and the head does not, and that an optimizer's time follows parameters.
    """
    found = []
    for place in dict.fromkeys((group.engine, group.rung, group.seq_len) for group in groups):
        here = sorted(
            (group for group in groups if (group.engine, group.rung, group.seq_len) == place and group.ran),
            key=lambda group: group.layers,
        )
        if here and 2 <= here[-1].layers < layers:
            found.append(_of(here, layers))
    return found


def _of(here: Sequence[Group], layers: int) -> Extrapolated:
    last = here[-1]
    seconds, speed = last.median("step_seconds"), last.speed
    assert seconds is not None
    assert speed is not None
    work = _flops(last, layers) / _flops(last, last.layers)
    first = here[0].median("step_seconds")
    if len(here) > 1 and first is not None:
        per_layer = (seconds - first) / (last.layers - here[0].layers)
        whole = seconds + per_layer * (layers - last.layers)
        how = f"line through {here[0].layers} and {last.layers} layers"
    else:
        whole, how = seconds * work, f"{last.layers} layers, by model FLOPs"
    mfu = last.median("mfu")
    return Extrapolated(
        last, layers, how, whole, speed * seconds / whole, None if mfu is None else mfu * work * seconds / whole
    )


def _flops(group: Group, layers: int) -> int:
    return model_flops(_with(group.shape, layers), tokens=group.seq_len, sum_len_squared=group.seq_len**2)


def _with(shape: ModelShape, layers: int) -> ModelShape:
    """Windowed and expert layers in the same proportion."""
    share = layers / shape.num_layers
    return replace(
        shape,
        num_layers=layers,
        num_window_layers=round(shape.num_window_layers * share),
        num_expert_layers=round(shape.num_expert_layers * share),
    )


@dataclass(frozen=True)
class LineOfPeaks:
    """GPU bytes over length, through the shortest and the longest that were measured."""

    title: str
    layers: int
    lengths: tuple[int, int]
    slope: float
    """Bytes a token."""
    offset: float
    """Bytes at no length."""

    def length_at(self, room_bytes: int) -> int:
        """Where the line reaches so many bytes; nothing of fragments, and of what torch does not count."""
        return int((room_bytes - self.offset) / self.slope) if self.slope > 0 else 0


def lines_of_peaks(groups: Sequence[Group]) -> list[LineOfPeaks]:
    """Of every engine and rung that ran at two lengths or more on a GPU."""
    found = []
    for engine, rung, layers in dict.fromkeys((group.engine, group.rung, group.layers) for group in groups):
        peaks = {
            group.seq_len: peak
            for group in groups
            if (group.engine, group.rung, group.layers) == (engine, rung, layers) and group.ran
            if (peak := group.median("peak_device_reserved_bytes")) is not None
        }
        if len(peaks) > 1:
            shortest, longest = min(peaks), max(peaks)
            slope = (peaks[longest] - peaks[shortest]) / (longest - shortest)
            title = rung if engine == "alst" else f"{engine}: {rung}"
            offset = peaks[shortest] - slope * shortest
            found.append(LineOfPeaks(title, layers, (shortest, longest), slope, offset))
    return found
