"""Charts are well-formed, safe, and put values where they belong."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffusion_rl.charts import BarChart, Line, LineChart, axis_ticks, draw_chart, format_number

NAN = float("nan")
HOSTILE = '</svg><script>alert("x")</script>&'


def line_chart(*lines: Line, **options) -> LineChart:
    return LineChart(title="reward", lines=lines, x_label="update", **options)


def parsed(chart) -> ElementTree.Element:
    return ElementTree.fromstring(draw_chart(chart))


def curves(chart, kind: str = "curve") -> list[list[tuple[float, float]]]:
    drawn = [p for p in parsed(chart).iter("polyline") if p.get("class") == kind]
    return [[tuple(map(float, at.split(","))) for at in p.get("points").split()] for p in drawn]


def test_a_straight_line_stays_straight_and_rises_upwards():
    (points,) = curves(line_chart(Line("a", range(11), [2.0 * x for x in range(11)])))
    rises = {round(high - low, 1) for (_, low), (_, high) in zip(points, points[1:], strict=False)}
    assert max(rises) < 0  # SVG counts downwards
    assert max(rises) - min(rises) < 0.15  # places are rounded to a tenth


def test_missing_values_leave_a_gap():
    runs = curves(line_chart(Line("a", range(6), [1.0, 2.0, NAN, 3.0, NAN, 4.0])))
    assert [len(run) for run in runs] == [2, 2, 2]  # the lone values are dots of two points
    assert runs[1][0][1] == runs[1][1][1]


def test_smoothing_averages_the_last_points_and_keeps_the_raw_curve():
    chart = line_chart(Line("a", range(4), [0.0, 1.0, 0.0, 1.0]), y_range=(0.0, 1.0), smooth=2)
    (raw,), (smooth,) = curves(chart, "raw"), curves(chart)
    bottom, top = raw[0][1], raw[1][1]
    assert [y for _, y in smooth] == [bottom] + [pytest.approx((bottom + top) / 2)] * 3


def test_values_outside_the_range_stay_on_the_plane():
    (points,) = curves(line_chart(Line("a", [0, 1], [-5.0, 5.0]), y_range=(0.0, 1.0)))
    (inside,) = curves(line_chart(Line("a", [0, 1], [0.0, 1.0]), y_range=(0.0, 1.0)))
    assert points == inside


def test_several_curves_have_a_legend():
    chart = line_chart(Line("tuned", [0, 1], [0.0, 1.0]), Line("base", [0, 1], [1.0, 1.0]))
    legend = parsed(chart).find("div[@class='legend']")
    assert ["".join(entry.itertext()) for entry in legend] == ["tuned", "base"]
    assert parsed(line_chart(Line("one", [0, 1], [0.0, 1.0]))).find("div") is None


@pytest.mark.parametrize(
    "chart",
    [
        line_chart(),
        line_chart(Line("a", [], [])),
        line_chart(Line("a", [0, 1], [NAN, NAN])),
        BarChart(title="t", labels=["a"], series={"base": [NAN]}),
    ],
)
def test_a_chart_of_nothing_says_so(chart):
    assert "nothing was recorded" in draw_chart(chart)


@pytest.mark.parametrize("values", [[3.0], [3.0, 3.0], [0.0, 0.0], [-2.0, -2.0]])
def test_constant_values_are_drawn(values):
    (points,) = curves(line_chart(Line("a", range(len(values)), values)))
    assert all(math.isfinite(number) for point in points for number in point)


def test_bars_are_as_long_as_their_values():
    chart = BarChart(
        title="faults", labels=["vanish", "freeze"], series={"base": [0.4, 0.2], "tuned": [0.1, 0]}
    )
    widths = [float(bar.get("width")) for bar in parsed(chart).iter("rect")]
    assert widths[0] == pytest.approx(4 * widths[1], abs=0.1 / 10)
    assert widths[0] == pytest.approx(2 * widths[2])
    assert widths[3] == 1.0  # a hair for zero


def test_percent_is_written_on_axes_and_bars():
    bars = BarChart(title="t", labels=["a"], series={"base": [0.25]}, percent=True)
    assert "25.0%" in draw_chart(bars)
    lines = line_chart(Line("a", [0, 1], [0.0, 1.0]), percent=True, y_range=(0.0, 1.0))
    assert re.search(">20%<", draw_chart(lines))


@pytest.mark.parametrize(
    "chart",
    [
        LineChart(
            title=HOSTILE,
            caption=HOSTILE,
            x_label=HOSTILE,
            y_label=HOSTILE,
            lines=[Line(HOSTILE, [0, 1], [0.0, 1.0]), Line("b", [0, 1], [0.0, 1.0])],
        ),
        BarChart(
            title=HOSTILE, caption=HOSTILE, labels=[HOSTILE], series={HOSTILE: [1.0], "b": [1.0]}
        ),
    ],
)
def test_text_is_escaped(chart):
    drawn = draw_chart(chart)
    assert "<script>" not in drawn
    assert HOSTILE in "".join(ElementTree.fromstring(drawn).itertext())


# A busy machine is no fault of the code.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    low=st.floats(-1e6, 1e6, allow_nan=False),
    size=st.floats(1e-6, 1e6, allow_nan=False),
    count=st.integers(2, 10),
)
def test_ticks_cover_the_range_in_about_the_number_asked_for(low, size, count):
    high = low + size
    ticks = axis_ticks(low, high, count)
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low + 1e-6 * step + 1e-9
    assert ticks[-1] >= high - 1e-6 * step - 1e-9
    assert 2 <= len(ticks) <= count + 3


def test_ticks_are_round_numbers():
    assert axis_ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert axis_ticks(3.0, 47.0) == [0.0, 10.0, 20.0, 30.0, 40.0, 50.0]


@pytest.mark.parametrize(
    ("value", "percent", "text"),
    [
        (NAN, False, "-"),
        (math.inf, False, "inf"),
        (-math.inf, True, "-inf"),
        (0.5, True, "50.0%"),
        (6400.0, False, "6,400"),
        (1234.56, False, "1,235"),
        (0.03, False, "0.0300"),
        (583.1, False, "583"),
    ],
)
def test_numbers_are_written_for_readers(value, percent, text):
    assert format_number(value, percent=percent) == text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: line_chart(Line("a", [1], [])), r"y of line 'a' must have .* x \(1\), got 0"),
        (lambda: line_chart(smooth=0), "smooth must be at least 1, got 0"),
        (
            lambda: BarChart(title="t", labels=["a", "b"], series={"s": [1.0]}),
            r"series 's' must have one value per label \(2\), got 1",
        ),
        (
            lambda: BarChart(title="t", labels=["a"], series={"s": [-1.0]}),
            "series 's' must be at least 0, got -1.0",
        ),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
