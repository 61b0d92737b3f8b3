"""Charts as inline SVG: drawn once, coloured by the page's style sheet, read out by its script when a pointer is there.

No library: a page is to be whole in itself, and to look right on dark and on light ground.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape

WIDTH, HEIGHT = 600, 230
LEFT, RIGHT, TOP, BOTTOM = 68, 14, 12, 42
MOST_POINTS = 1000
"""Of a line; of more, the lowest and the highest of each stretch are kept, so that a spike stays one."""
MOST_BARS = 72
TICKS = 5
MOST_NAMES = 10  # below an axis
DOT_POINTS = 40
"""Up to as many, each point has a dot."""

Show = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """A line, or a layer of bars. A value that is None is a gap."""

    name: str
    color: str
    """A class of the style sheet: c1, c2, …"""
    values: Sequence[float | None]
    joined: bool = False
    """Drawn over its gaps: its values are steps apart."""


@dataclass(frozen=True)
class Mark:
    """A vertical line with a word."""

    at: float
    text: str


@dataclass(frozen=True)
class Axes:
    """From values to pixels."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)


def line_chart(
    xs: Sequence[float],
    series: Sequence[Series],
    *,
    label: str,
    show: Show,
    x_label: str,
    x_names: Sequence[str] | None = None,
    from_zero: bool = False,
    marks: Sequence[Mark] = (),
) -> str:
    """Lines over `xs`, which ascend. `label` says what is drawn, for those who hear it; `show` writes a value.

    With `x_names` the xs are places in that row of names. Empty without a value.
    """
    drawn = [each for each in series if any(value is not None for value in each.values)]
    if not drawn:
        return ""
    kept = _thinned(drawn, len(xs))
    xs, drawn = [xs[i] for i in kept], [replace(each, values=[each.values[i] for i in kept]) for each in drawn]
    low, high = _spread([value for each in drawn for value in each.values if value is not None], from_zero=from_zero)
    ticks = nice_ticks(low, high)
    edge = 0.4 if x_names else 0.0  # names are wider than numbers
    axes = Axes(*_wide(xs[0] - edge, xs[-1] + edge), min(low, ticks[0]), max(high, ticks[-1]))
    names = x_names or [f"{x:,.0f}" for x in xs]
    parts = [_grid(axes, ticks, show), _x_axis(axes, xs, names if x_names else None, x_label)]
    parts += [_mark(axes, mark) for mark in marks if axes.x_low <= mark.at <= axes.x_high]
    parts += [_line(axes, xs, each) for each in drawn]
    hover = {
        "x": [axes.x(x) for x in xs],
        "at": [name if x_names else f"{x_label} {name}" for name in names],
        "series": [
            {
                "name": each.name,
                "color": each.color,
                "text": [None if value is None else show(value) for value in each.values],
                "y": [None if value is None else axes.y(value) for value in each.values],
            }
            for each in drawn
        ],
    }
    return _svg(label, parts, hover)


def stacked_bars(xs: Sequence[float], series: Sequence[Series], *, label: str, show: Show, x_label: str) -> str:
    """Layers on top of each other, a bar for each x; of many, a bar is the mean of a stretch. Empty without any."""
    if not xs:
        return ""
    stretch = math.ceil(len(xs) / MOST_BARS)
    firsts = range(0, len(xs), stretch)
    layers = [[_mean(each.values[first : first + stretch]) for first in firsts] for each in series]
    ticks = nice_ticks(0, max(map(sum, zip(*layers, strict=True))))
    axes = Axes(-0.5, len(firsts) - 0.5, 0, ticks[-1])
    width = max(1.0, (axes.x(1) - axes.x(0)) * 0.82)
    places = [int(xs[first]) for first in firsts]
    ends = [int(xs[min(first + stretch, len(xs)) - 1]) for first in firsts]
    names = [f"{a:,}" if a == b else f"{a:,} to {b:,}" for a, b in zip(places, ends, strict=True)]
    parts = [_grid(axes, ticks, show), _x_axis(axes, range(len(firsts)), [f"{place:,}" for place in places], x_label)]
    below = [0.0] * len(firsts)
    for each, layer in zip(series, layers, strict=True):
        rects = []
        for bar, value in enumerate(layer):
            top, bottom = axes.y(below[bar] + value), axes.y(below[bar])
            below[bar] += value
            if bottom > top:
                left = round(axes.x(bar) - width / 2, 1)
                rects.append(f'<rect x="{left}" y="{top}" width="{width:.1f}" height="{bottom - top:.1f}"/>')
        parts.append(f'<g class="fill {each.color}">{"".join(rects)}</g>')
    hover = {
        "x": [axes.x(bar) for bar in range(len(firsts))],
        "at": [f"{x_label} {name}" for name in names],
        "series": [
            {"name": each.name, "color": each.color, "text": [show(value) for value in layer], "y": [None] * len(layer)}
            for each, layer in zip(series, layers, strict=True)
        ],
    }
    return _svg(label, parts, hover)


def nice_ticks(low: float, high: float) -> list[float]:
    """About TICKS round numbers that hold `low` to `high` between them."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / TICKS
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def legend(series: Sequence[Series]) -> str:
    """What the colours mean; nothing for a single line."""
    drawn = [each for each in series if any(value is not None for value in each.values)]
    if len(drawn) < 2:
        return ""
    items = "".join(f'<li><i class="swatch {each.color}"></i>{escape(each.name)}</li>' for each in drawn)
    return f'<ul class="legend">{items}</ul>'


def _thinned(series: Sequence[Series], count: int) -> list[int]:
    """Which points to draw: all, or of each stretch the lowest and the highest of every line."""
    if count <= MOST_POINTS:
        return list(range(count))
    stretch = math.ceil(2 * count / MOST_POINTS)
    kept = {0, count - 1}
    for each in series:
        for first in range(0, count, stretch):
            there = [i for i in range(first, min(first + stretch, count)) if each.values[i] is not None]
            if there:
                kept |= {min(there, key=each.values.__getitem__), max(there, key=each.values.__getitem__)}  # type: ignore[arg-type]
    return sorted(kept)


def _spread(values: Sequence[float], *, from_zero: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (min(0.0, low), high) if from_zero else (low, high)


def _wide(low: float, high: float) -> tuple[float, float]:
    """A single place stands in the middle."""
    return (low, high) if high > low else (low - 1, high + 1)


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0


def _grid(axes: Axes, ticks: Sequence[float], show: Show) -> str:
    right = WIDTH - RIGHT
    lines = "".join(f'<path d="M{LEFT} {axes.y(tick)}H{right}"/>' for tick in ticks)
    texts = "".join(f'<text x="{LEFT - 8}" y="{axes.y(tick) + 4}">{escape(show(tick))}</text>' for tick in ticks)
    return f'<g class="grid">{lines}</g><g class="axis y">{texts}</g>'


def _x_axis(axes: Axes, xs: Sequence[float], names: Sequence[str] | None, label: str) -> str:
    bottom = HEIGHT - BOTTOM
    if names is None:
        ticks = [tick for tick in nice_ticks(xs[0], xs[-1]) if xs[0] <= tick <= xs[-1] and tick == int(tick)]
        places = [(tick, f"{tick:,.0f}") for tick in ticks or [xs[0]]]
    else:
        every = math.ceil(len(names) / MOST_NAMES)
        places = [(x, name) for x, name in zip(xs, names, strict=True)][::every]
    texts = "".join(f'<text x="{axes.x(x)}" y="{bottom + 17}">{escape(name)}</text>' for x, name in places)
    middle = (LEFT + WIDTH - RIGHT) / 2
    title = f'<text x="{middle}" y="{HEIGHT - 5}" class="title">{escape(label)}</text>'
    return f'<g class="axis x">{texts}{title}</g>'


def _mark(axes: Axes, mark: Mark) -> str:
    x = axes.x(mark.at)
    line = f'<path d="M{x} {TOP}V{HEIGHT - BOTTOM}"/>'
    return f'<g class="mark">{line}<text x="{x + 4}" y="{TOP + 10}">{escape(mark.text)}</text></g>'


def _line(axes: Axes, xs: Sequence[float], series: Series) -> str:
    commands, pen_down = [], False
    dots = []
    for x, value in zip(xs, series.values, strict=True):
        if value is not None:
            commands.append(f"{'L' if pen_down else 'M'}{axes.x(x)} {axes.y(value)}")
            dots.append(f'<circle cx="{axes.x(x)}" cy="{axes.y(value)}" r="2.6"/>')
        pen_down = value is not None or (pen_down and series.joined)
    shown = "".join(dots) if len(dots) <= DOT_POINTS else ""
    return f'<g class="line {series.color}"><path d="{"".join(commands)}"/>{shown}</g>'


def _svg(label: str, parts: Sequence[str], hover: dict[str, object]) -> str:
    """`hover` is what the page's script reads out."""
    told = hover | {"top": TOP, "bottom": HEIGHT - BOTTOM}
    data = escape(json.dumps(told, separators=(",", ":")), quote=True)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}" data-chart="{data}">'
        f"{''.join(parts)}</svg>"
    )
