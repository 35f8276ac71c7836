"""Numbers -> figures, as inline SVG.

Colours are CSS variables of the page (`--series-1` .., `--ink`, `--rule`), so that a figure follows the page from light
to dark and into print. Values appear on hover through `<title>`, without scripts.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 360, 200  # of a line chart, in CSS pixels; charts scale with their column
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 14, 26  # margins around the plot
NUM_COLOURS = 8
FEW = 12  # points up to which each is marked
SMOOTH_FROM = 60  # points from which a smoothed line is drawn over the raw one


class Scale(NamedTuple):
    """A linear map from data to pixels, with round ticks."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    @property
    def step(self) -> float:
        """Between two ticks."""
        return self.ticks[1] - self.ticks[0]

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def colour(number: int, count: int) -> str:
    """The colour of the `number`-th of `count` series: the first of several is a muted baseline, a lone one is not."""
    return f"var(--series-{(number + (count == 1)) % NUM_COLOURS + 1})"


def line_chart(series: Mapping[str, Sequence[tuple[float, float]]], *, label: str, smooth: bool = True) -> str:
    """Lines through (step, value) points, one per name; `smooth` draws long ones as a moving average over the raw line.

    `label` describes the figure to screen readers.
    """
    points = [point for line in series.values() for point in line]
    x = _scale([step for step, _ in points], LEFT, WIDTH - RIGHT, num_ticks=4)
    y = _scale([value for _, value in points], HEIGHT - BOTTOM, TOP, num_ticks=4)
    parts = [_grid_line(LEFT, y(tick), WIDTH - RIGHT, _number(tick, y.step)) for tick in y.ticks]
    parts += [
        f'<text x="{x(tick):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{_number(tick, x.step)}</text>'
        for tick in x.ticks
    ]
    for number, (name, line) in enumerate(series.items()):
        stroke = colour(number, len(series))
        drawn = list(line)
        if smooth and len(line) >= SMOOTH_FROM:
            parts.append(_polyline(line, x, y, stroke, 'stroke-width="1" opacity="0.3"'))
            averages = _smooth([value for _, value in line])
            drawn = [(step, value) for (step, _), value in zip(line, averages, strict=True)]
        title = f"<title>{escape(name)}: {_number(line[0][1])} at first, {_number(line[-1][1])} at last</title>"
        parts.append(_polyline(drawn, x, y, stroke, 'stroke-width="2"', title))
        for step, value in drawn if len(drawn) <= FEW else drawn[-1:]:
            parts.append(f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="3" fill="{stroke}"/>')
    return _svg(WIDTH, HEIGHT, label, parts)


def bar_chart(
    groups: Mapping[str, Mapping[str, float]],
    *,
    chance: Mapping[str, float],
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
    label: str,
    width: int = 760,
) -> str:
    """Bars from 0 to 100% in groups: group -> name -> fraction. A dashed mark in each group shows `chance[group]`.

    `intervals`, group -> name -> (low, high), become whiskers. Group names may have several lines.
    """
    bottom = 14 + 13 * max(group.count("\n") + 1 for group in groups)
    height = 200 + bottom
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    y = _scale([0.0, 1.0], height - bottom, TOP, num_ticks=5)
    parts = [_grid_line(LEFT, y(tick), width - RIGHT, f"{100 * tick:.0f}%") for tick in y.ticks]
    slot = (width - LEFT - RIGHT) / len(groups)
    bar = min(34.0, slot * 0.8 / len(names))
    for number, (group, bars) in enumerate(groups.items()):
        middle = LEFT + slot * (number + 0.5)
        first = middle - bar * len(names) / 2
        flat = escape(" ".join(group.split()))
        for name, value in bars.items():
            place = names.index(name)
            left = first + bar * place
            low, high = (intervals or {}).get(group, {}).get(name, (value, value))
            spread = f" ({100 * low:.1f} to {100 * high:.1f})" if intervals else ""
            title = f"<title>{escape(name)}, {flat}: {100 * value:.1f}%{spread}</title>"
            fill = colour(place, len(names))
            parts.append(
                f'<rect x="{left + 1:.1f}" y="{y(value):.1f}" width="{bar - 2:.1f}" height="{y(0) - y(value):.1f}" '
                f'rx="2" fill="{fill}">{title}</rect>'
                f'<text x="{left + bar / 2:.1f}" y="{y(high) - 4:.1f}" text-anchor="middle">{100 * value:.0f}</text>'
            )
            if intervals:
                parts.append(_whisker(left + bar / 2, y(low), y(high)))
        mark = y(chance[group])
        parts.append(
            f'<line x1="{first - 3:.1f}" x2="{first + bar * len(names) + 3:.1f}" y1="{mark:.1f}" y2="{mark:.1f}" '
            f'stroke="var(--ink)" stroke-dasharray="3 3"><title>chance: {100 * chance[group]:.2f}%</title></line>'
        )
        for row, word in enumerate(group.split("\n")):
            below = height - bottom + 15 + 13 * row
            parts.append(f'<text x="{middle:.1f}" y="{below}" text-anchor="middle">{escape(word)}</text>')
    return _svg(width, height, label, parts)


def histogram(counts: Mapping[str, int], *, label: str, kinds: Sequence[int] = (), width: int = 340) -> str:
    """A bar per bin, of the colour number `kinds[i]` (all alike without); every bin is named, the names are slanted."""
    height, bottom = 230, 52
    y = _scale([0, max([*counts.values(), 1])], height - bottom, TOP, num_ticks=4)
    parts = [_grid_line(LEFT, y(tick), width - RIGHT, _number(tick, y.step)) for tick in y.ticks if tick == int(tick)]
    slot = (width - LEFT - RIGHT) / len(counts)
    total = max(1, sum(counts.values()))
    for number, (name, count) in enumerate(counts.items()):
        left = LEFT + slot * number
        fill = colour(kinds[number] if kinds else 0, NUM_COLOURS if kinds else 1)
        title = f"<title>{escape(name)}: {count:,} ({count / total:.1%})</title>"
        x, under = left + slot / 2 + 3, height - bottom + 13
        parts.append(
            f'<rect x="{left + 1:.1f}" y="{y(count):.1f}" width="{slot - 2:.1f}" height="{y(0) - y(count):.1f}" '
            f'rx="2" fill="{fill}">{title}</rect>'
            f'<text x="{x:.1f}" y="{under}" text-anchor="end" transform="rotate(-40 {x:.1f} {under})">'
            f"{escape(name)}</text>"
        )
    return _svg(width, height, label, parts)


def heat_map(cells: Mapping[tuple[int, int], int], bounds: Sequence[int], *, label: str, axes: tuple[str, str]) -> str:
    """Counts in a square grid, (column, row) -> count, rows upwards; cell i reaches from bounds[i] to bounds[i + 1].

    The darkness is that of the count's logarithm.
    """
    size, edge = 300, 330 - TOP
    places = [index for cell in cells for index in cell]
    low, high = min(places, default=0), max(places, default=0)
    side = size / max(high - low + 1, 6)
    parts = [f'<text x="{LEFT + size / 2}" y="{edge + 30}" text-anchor="middle">{escape(axes[0])}</text>']
    parts.append(
        f'<text x="10" y="{edge - size / 2}" text-anchor="middle" transform="rotate(-90 10 {edge - size / 2})">'
    )
    parts.append(f"{escape(axes[1])}</text>")
    for number in range(0, max(high - low + 1, 6) + 1, 2):
        if low + number < len(bounds):
            at, name = side * number, bounds[low + number]
            parts.append(f'<text x="{LEFT + at:.1f}" y="{edge + 15}" text-anchor="middle">{name}</text>')
            parts.append(f'<text x="{LEFT - 5}" y="{edge - at + 4:.1f}" text-anchor="end">{name}</text>')
    parts.append(
        f'<rect x="{LEFT}" y="{edge - size}" width="{size}" height="{size}" fill="none" stroke="var(--rule)"/>'
    )
    most = math.log1p(max(cells.values(), default=1))
    for (column, row), count in sorted(cells.items()):
        x, y = LEFT + side * (column - low), edge - side * (row - low + 1)
        span = [f"{bounds[index]}\N{EN DASH}{bounds[index + 1] - 1}" for index in (column, row)]
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" height="{side:.1f}" fill="var(--series-2)" '
            f'fill-opacity="{0.15 + 0.85 * math.log1p(count) / most:.2f}">'
            f"<title>{span[0]} x {span[1]} pixels: {count:,}</title></rect>"
        )
    return _svg(LEFT + size + RIGHT, edge + 38, label, parts)


def _whisker(x: float, low: float, high: float) -> str:
    path = f"M{x - 3:.1f} {low:.1f}h6M{x:.1f} {low:.1f}V{high:.1f}M{x - 3:.1f} {high:.1f}h6"
    return f'<path class="whisker" d="{path}" stroke="var(--ink)" fill="none"/>'


def _svg(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}" class="figure">'
        f"{''.join(parts)}</svg>"
    )


def _grid_line(left: float, y: float, right: float, text: str) -> str:
    return (
        f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--rule)"/>'
        f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    )


def _polyline(line: Sequence[tuple[float, float]], x: Scale, y: Scale, stroke: str, style: str, title: str = "") -> str:
    points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in line)
    return (
        f'<polyline points="{points}" fill="none" stroke="{stroke}" stroke-linejoin="round" {style}>{title}</polyline>'
    )


def _scale(values: Sequence[float], start: float, end: float, *, num_ticks: int) -> Scale:
    """A scale over `values` whose ends are ticks; ticks are 1, 2 or 5 times a power of ten apart."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - abs(low) / 2 - 1e-12, high + abs(high) / 2 + 1e-12
    rough = (high - low) / num_ticks
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(step * number for number in range(first, last + 1))
    return Scale(ticks[0], ticks[-1], start, end, ticks)


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over a window of a twentieth of the line, centred, so that it does not lag; cut off at the ends."""
    reach = max(1, len(values) // 40)
    windows = [values[max(0, place - reach) : place + reach + 1] for place in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _number(value: float, step: float = 0.0) -> str:
    """A value in few characters, or a tick in as many as tell it from its neighbours `step` away."""
    if value == 0:
        return "0"
    if max(abs(value), step) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    if abs(value) >= 10_000 and step >= 100:
        return f"{value / 1000:.4g}k"
    digits = 3 if step == 0 else 1 + math.floor(math.log10(abs(value)) + 1e-9) - math.floor(math.log10(step) + 1e-9)
    return f"{value:.{max(3, digits)}g}"
