"""Rises and falls against brute force, and an alarm that is neither deaf nor a nuisance."""

from __future__ import annotations

import itertools
import random

import pytest
from scipy.stats import kendalltau, theilslopes

from diffusion_rl.trends import (
    REWARD,
    TrendSettings,
    add_values,
    falling_beside,
    rise_p_value,
    theil_sen,
    warn_of,
)

SETTINGS = TrendSettings()


def score(values: list[float]) -> int:
    return sum((b > a) - (b < a) for a, b in itertools.combinations(values, 2))


def test_the_chance_of_a_rise_is_that_of_all_orders() -> None:
    for values in ([3.0, 1.0, 2.0, 5.0, 4.0, 6.0], [1.0, 2.0], [2.0, 1.0, 3.0, 4.0, 0.0]):
        orders = [score(list(order)) for order in itertools.permutations(values)]
        expected = sum(one >= score(values) for one in orders) / len(orders)
        assert rise_p_value(values) == pytest.approx(expected, abs=1e-12)
    assert rise_p_value([1.0]) == rise_p_value([]) == rise_p_value([2.0, 2.0, 2.0]) == 1.0


def test_without_ties_it_is_scipys_exact_test_and_with_them_near_its_normal_one() -> None:
    source = random.Random(0)
    for _ in range(20):
        values = [source.gauss(0, 1) + 0.03 * place for place in range(20)]
        expected = kendalltau(range(20), values, method="exact", alternative="greater").pvalue
        assert rise_p_value(values) == pytest.approx(expected, rel=1e-6)
    for _ in range(20):
        values = [float(source.randrange(6)) for _ in range(30)]
        expected = kendalltau(range(30), values, method="asymptotic", alternative="greater").pvalue
        # scipy makes no continuity correction, which moves S by 1 towards less certain.
        assert 0 <= rise_p_value(values) - expected < 0.03


def test_beyond_what_is_counted_out_the_normal_law_is_near() -> None:
    source = random.Random(2)
    for _ in range(10):
        values = [source.gauss(0, 1) + 0.01 * place for place in range(60)]
        expected = kendalltau(range(60), values, method="exact", alternative="greater").pvalue
        assert rise_p_value(values) == pytest.approx(expected, abs=2e-3)


def test_the_median_slope_is_scipys_and_takes_gaps_as_they_are() -> None:
    source = random.Random(1)
    steps = [1, 2, 5, 6, 9, 20]
    series = [(step, source.gauss(0, 1)) for step in steps]
    expected = theilslopes([value for _, value in series], steps).slope
    assert theil_sen(series) == pytest.approx(expected)
    assert theil_sen([(3, 1.0)]) == 0.0


def simulate(updates: int, seed: int, **slopes: float) -> list[dict[str, float]]:
    """Series of unit noise on straight lines; a name's slope is in spreads an update."""
    source = random.Random(seed)
    return [
        {name: slope * step + source.gauss(0, 1) for name, slope in slopes.items()}
        for step in range(updates)
    ]


def watch(rows: list[dict[str, float]], settings: TrendSettings = SETTINGS):
    series, warned, found = {}, {}, []
    for step, row in enumerate(rows, start=1):
        series = add_values(series, step, row, keep=settings.window)
        falling = falling_beside(series, settings)
        warned = warn_of(falling, warned, step, series, settings)
        found.append(falling)
    return found


def test_a_fall_beside_a_rise_is_found_and_named_once_a_window(caplog) -> None:
    found = watch(simulate(60, 0, reward=0.3, motion=-0.3, contrast=0.0))
    assert found[:4] == [()] * 4  # Four values cannot be a trend.
    assert found[20:] == [("motion",)] * 40
    warnings = [record.getMessage() for record in caplog.records]
    assert 2 <= len(warnings) <= 3
    assert all("motion falls by 0.3" in one or "motion falls by 0.2" in one for one in warnings[1:])


@pytest.mark.parametrize(
    "slopes",
    [
        {"reward": 0.3, "motion": 0.3},
        {"reward": 0.0, "motion": -0.3},
        {"reward": -0.3, "motion": -0.3},
        {"reward": 0.3, "motion": 0.0},
    ],
)
def test_only_a_fall_and_a_rise_together_count(slopes: dict[str, float]) -> None:
    alarms = [bool(one) for seed in range(5) for one in watch(simulate(60, seed, **slopes))]
    assert sum(alarms) / len(alarms) < 0.04


def test_without_any_trend_it_hardly_ever_rings() -> None:
    rings = sum(bool(one) for s in range(20) for one in watch(simulate(60, s, reward=0, motion=0)))
    assert rings == 0


def test_what_is_measured_rarely_is_held_against_the_reward_of_the_same_updates() -> None:
    rows = simulate(100, 3, reward=0.0)
    for step, row in enumerate(rows, start=1):
        row["reward"] += 0.05 * step
        if step % 10 == 0:
            row["evaluation/judge"] = -float(step)
    series: dict = {}
    for step, row in enumerate(rows, start=1):
        series = add_values(series, step, row, keep=200)
    assert falling_beside(series, TrendSettings(window=10)) == ("evaluation/judge",)
    flat = {**series, REWARD: [(step, -value) for step, value in series[REWARD]]}
    assert falling_beside(flat, TrendSettings(window=10)) == ()
    before = {**series, REWARD: [(step, min(step, 60) - step / 1e3) for step, _ in series[REWARD]]}
    assert falling_beside(before, TrendSettings(window=5)) == ()  # It rose earlier, not meanwhile.
    assert falling_beside({"evaluation/judge": series["evaluation/judge"]}, SETTINGS) == ()


def test_values_are_kept_apart_in_order_and_bounded() -> None:
    before = add_values({}, 1, {"reward": 1.0, "motion": float("nan")}, keep=2)
    assert before == {"reward": [[1, 1.0]]}
    after = add_values(add_values(before, 2, {"reward": 2.0}, 2), 3, {"reward": 3.0}, 2)
    assert after == {"reward": [[2, 2.0], [3, 3.0]]}
    assert before == {"reward": [[1, 1.0]]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 4}, r"window must be in \[5, 200\], got 4"),
        ({"p_value": 0.5}, r"p_value must be in \(0, 0.5\), got 0.5"),
    ],
)
def test_settings_outside_their_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrendSettings(**options)
