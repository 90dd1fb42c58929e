"""Line and bar charts as inline SVG: no script, no library, no network.

Colours are CSS variables (--series-0 ...), so a page's light and dark themes reach them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 70, 14, 12, 42
NUM_COLOURS = 6
BAR, BAR_GAP, BAR_LABELS = 15, 14, 150


@dataclass(frozen=True)
class Line:
    """One named curve."""

    name: str
    """Shown in the legend."""
    x: Sequence[float]
    """Places, ascending."""
    y: Sequence[float]
    """Values, one per place; NaN leaves a gap."""


@dataclass(frozen=True, kw_only=True)
class LineChart:
    """Curves over a common axis."""

    title: str
    """What it shows."""
    lines: Sequence[Line]
    """The curves, in the order of the colours."""
    x_label: str
    """With unit."""
    y_label: str = ""
    """With unit."""
    y_range: tuple[float, float] | None = None
    """Ends of the vertical axis; None fits the values."""
    smooth: int = 1
    """Points averaged (those before count); above 1 the raw curve stays visible behind."""
    percent: bool = False
    """Whether 0.1 is written 10%."""
    caption: str = ""
    """A sentence below the title."""

    def __post_init__(self) -> None:
        if self.smooth < 1:
            raise ValueError(f"smooth must be at least 1, got {self.smooth}")
        for line in self.lines:
            if len(line.x) != len(line.y):
                raise ValueError(
                    f"y of line '{line.name}' must have one value per x ({len(line.x)}), "
                    f"got {len(line.y)}"
                )


@dataclass(frozen=True, kw_only=True)
class BarChart:
    """Values side by side, by label."""

    title: str
    """What it shows."""
    labels: Sequence[str]
    """One row of bars each."""
    series: Mapping[str, Sequence[float]]
    """Name to one value (at least 0, or NaN) for each label, in the order of the colours."""
    percent: bool = False
    """Whether 0.1 is written 10%."""
    caption: str = ""
    """A sentence below the title."""

    def __post_init__(self) -> None:
        for name, values in self.series.items():
            if len(values) != len(self.labels):
                raise ValueError(
                    f"series '{name}' must have one value per label ({len(self.labels)}), "
                    f"got {len(values)}"
                )
            if any(value < 0 for value in values):
                raise ValueError(f"series '{name}' must be at least 0, got {min(values)}")


def draw_chart(chart: LineChart | BarChart) -> str:
    """Draw a chart as an HTML figure with its title, legend and an inline SVG."""
    if isinstance(chart, LineChart):
        names, drawing = [line.name for line in chart.lines], _draw_lines(chart)
    else:
        names, drawing = list(chart.series), _draw_bars(chart)
    caption = f'<p class="caption">{escape(chart.caption)}</p>' if chart.caption else ""
    return (
        f'<figure class="chart"><figcaption>{escape(chart.title)}</figcaption>{caption}'
        f"{_legend(names)}{drawing}</figure>"
    )


def format_number(value: float, *, percent: bool = False) -> str:
    """Write a number for a reader: three figures or whole, thousands apart, "-" for NaN."""
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if percent:
        return f"{100 * value:.1f}%"
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.3g}".removesuffix(".")


def axis_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Choose round numbers that cover a range: steps of 1, 2 or 5 times a power of ten.

    Args:
        low: Lower end of the values.
        high: Upper end, at least low; an empty range is widened.
        count: About how many steps are wanted.
    """
    if high <= low:
        margin = abs(low) * 0.1 or 0.5
        low, high = low - margin, high + margin
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(place * step, 12) for place in range(first, last + 1)]


def _legend(names: Sequence[str]) -> str:
    if len(names) < 2:
        return ""
    entries = "".join(
        f'<span><i style="background:{_colour(index)}"></i>{escape(name)}</span>'
        for index, name in enumerate(names)
    )
    return f'<div class="legend">{entries}</div>'


def _colour(index: int) -> str:
    return f"var(--series-{index % NUM_COLOURS})"


@dataclass(frozen=True)
class _Plane:
    """From values to places in the drawing."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        share = (value - self.x_low) / ((self.x_high - self.x_low) or 1)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        inside = min(max(value, self.y_low), self.y_high)
        share = (inside - self.y_low) / ((self.y_high - self.y_low) or 1)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _draw_lines(chart: LineChart) -> str:
    points = [
        (x, y)
        for line in chart.lines
        for x, y in zip(line.x, line.y, strict=True)
        if math.isfinite(x) and math.isfinite(y)
    ]
    if not points:
        return '<p class="empty">nothing was recorded</p>'
    x_values, y_values = [x for x, _ in points], [y for _, y in points]
    y_ticks = axis_ticks(*(chart.y_range or (min(y_values), max(y_values))))
    ends = chart.y_range or (y_ticks[0], y_ticks[-1])
    plane = _Plane(min(x_values), max(x_values), *ends)
    parts = _axes(chart, plane, [tick for tick in y_ticks if ends[0] <= tick <= ends[1]])
    for index, line in enumerate(chart.lines):
        if chart.smooth > 1:
            parts += _polylines(line.x, line.y, plane, f'class="raw" stroke="{_colour(index)}"')
        averaged = _moving_average(line.y, chart.smooth)
        parts += _polylines(line.x, averaged, plane, f'class="curve" stroke="{_colour(index)}"')
    return _svg(chart.title, HEIGHT, parts)


def _axes(chart: LineChart, plane: _Plane, y_ticks: Sequence[float]) -> list[str]:
    parts = []
    for tick in y_ticks:
        y = plane.y(tick)
        label = f"{100 * tick:g}%" if chart.percent else f"{tick:g}"
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(_text(LEFT - 8, y + 4, label, "end"))
    for tick in axis_ticks(plane.x_low, plane.x_high, 6):
        if plane.x_low <= tick <= plane.x_high:
            label = f"{tick:g}"
            parts.append(_text(plane.x(tick), HEIGHT - BOTTOM + 18, label, "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, chart.x_label, "middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text text-anchor="middle" transform="translate(13 {middle}) rotate(-90)">'
        f"{escape(chart.y_label)}</text>"
    )
    return parts


def _polylines(x: Sequence[float], y: Sequence[float], plane: _Plane, style: str) -> list[str]:
    """One polyline for each run of finite values; a lone value is a dot."""
    runs: list[list[tuple[float, float]]] = [[]]
    for place, value in zip(x, y, strict=True):
        if math.isfinite(value):
            runs[-1].append((plane.x(place), plane.y(value)))
        elif runs[-1]:
            runs.append([])
    drawn = []
    for run in runs:
        if len(run) == 1:
            run = [run[0], (run[0][0] + 0.01, run[0][1])]
        if run:
            points = " ".join(f"{left:.1f},{top:.1f}" for left, top in run)
            drawn.append(f'<polyline {style} points="{points}"/>')
    return drawn


def _moving_average(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and those before it; NaN counts in none and stays NaN."""
    averaged = []
    for index, value in enumerate(values):
        near = [v for v in values[max(0, index - window + 1) : index + 1] if math.isfinite(v)]
        averaged.append(sum(near) / len(near) if math.isfinite(value) else math.nan)
    return averaged


def _draw_bars(chart: BarChart) -> str:
    finite = [v for values in chart.series.values() for v in values if math.isfinite(v)]
    if not finite:
        return '<p class="empty">nothing was recorded</p>'
    longest = max(finite) or 1.0
    space = WIDTH - BAR_LABELS - 70
    row = BAR * len(chart.series) + BAR_GAP
    parts = []
    for place, label in enumerate(chart.labels):
        top = place * row + BAR_GAP / 2
        middle = top + (row - BAR_GAP) / 2 + 4
        parts.append(_text(BAR_LABELS - 10, middle, label, "end"))
        for index, values in enumerate(chart.series.values()):
            value, y = values[place], top + index * BAR
            length = value / longest * space if math.isfinite(value) else 0.0
            parts.append(
                f'<rect x="{BAR_LABELS}" y="{y + 1:.1f}" width="{max(length, 1.0):.1f}" '
                f'height="{BAR - 2}" rx="2" fill="{_colour(index)}"/>'
            )
            number = format_number(value, percent=chart.percent)
            parts.append(_text(BAR_LABELS + length + 6, y + BAR - 3, number, "start"))
    return _svg(chart.title, row * len(chart.labels), parts)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(title: str, height: int, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )
