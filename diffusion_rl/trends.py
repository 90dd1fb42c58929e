"""An alarm for hacking: the reward goes up while something it should not cost goes down.

Guards compare with the base policy's level; a trend is seen before a level is left, and also where
there is no level, as in another judge's scores.
"""

from __future__ import annotations

import functools
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

logger = logging.getLogger(__name__)

REWARD = "reward"
"""The series that all others are held against."""
LEAST = 5
"""Values that a trend needs."""
EXACT = 30
"""Values up to which the chance of a trend is counted out; beyond, the normal law is as good."""
Series = list[list[float]]
"""[update, value], oldest first; plain lists, to be saved with a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class TrendSettings:
    """When a fall beside a rise counts."""

    window: int = 20
    """Latest values of a series that are looked at, in [5, 200]; fewer than 5 are no trend."""
    p_value: float = 0.01
    """Chance in (0, 0.5) at which a series without trend is taken for a rise, and for a fall."""

    def __post_init__(self) -> None:
        if not LEAST <= self.window <= 200:
            raise ValueError(f"window must be in [{LEAST}, 200], got {self.window}")
        if not 0 < self.p_value < 0.5:
            raise ValueError(f"p_value must be in (0, 0.5), got {self.p_value}")


def rise_p_value(values: Sequence[float]) -> float:
    """Say how likely a rise as steady as this is where there is no trend (Mann-Kendall).

    S = pairs of values that rise - pairs that fall;  p = P(S or more), all orders alike

    Exact for up to 30 values of which no two are equal; else by the normal law of S with the
    variance of ties and a continuity correction of 1. Values are taken for independent but for the
    trend: an update's videos are drawn anew. Give -values for a fall.

    Args:
        values: finite, oldest first.

    Returns:
        In (0, 1]; 1 for fewer than 2 values.

    Source:
        Mann, Econometrica 13 (1945); Kendall, Rank Correlation Methods (1948).

    Example:
        >>> round(rise_p_value([1.0, 2.0, 3.0, 4.0, 5.0]) * math.factorial(5), 6)
        1.0
    """
    count = len(values)
    pairs = count * (count - 1) // 2
    score = sum(
        (values[later] > values[earlier]) - (values[later] < values[earlier])
        for later in range(count)
        for earlier in range(later)
    )
    ties = [size for size in Counter(values).values() if size > 1]
    if not ties and count <= EXACT:
        chances = _inversion_chances(count)
        return min(1.0, sum(chances[: (pairs - score) // 2 + 1]))
    variance = sum(
        sign * size * (size - 1) * (2 * size + 5)
        for sign, size in [(1, count), *((-1, tie) for tie in ties)]
    )
    if not variance:
        return 1.0
    return 1 - NormalDist().cdf((score - 1) / math.sqrt(variance / 18))


@functools.cache
def _inversion_chances(count: int) -> tuple[float, ...]:
    """Chance of each number of falling pairs in a random order of `count` different values."""
    chances = [1.0]
    for size in range(2, count + 1):
        # The next value falls below 0 to size - 1 of those before it, all alike.
        wider = [0.0] * (len(chances) + size - 1)
        for place, chance in enumerate(chances):
            for more in range(size):
                wider[place + more] += chance / size
        chances = wider
    return tuple(chances)


def add_values(
    series: Mapping[str, Series], step: int, values: Mapping[str, float], keep: int
) -> dict[str, Series]:
    """The series with an update's values, each at most `keep` long; NaN is left out."""
    found = {name: list(past) for name, past in series.items()}
    for name, value in values.items():
        if math.isfinite(value):
            found[name] = [*found.get(name, []), [step, value]][-keep:]
    return found


def falling_beside(series: Mapping[str, Series], settings: TrendSettings) -> tuple[str, ...]:
    """Names of the series that fall while the reward rises.

    A series falls when its latest `window` values do, at `p_value`; the reward is looked at over
    the same updates.

    Args:
        series: By name, REWARD among them.
        settings: Window and chance.
    """
    found = []
    for name, past in series.items():
        latest = past[-settings.window :]
        if name == REWARD or len(latest) < LEAST:
            continue
        first = latest[0][0]
        reward = [value for step, value in series.get(REWARD, []) if step >= first]
        if len(reward) < LEAST:
            continue
        chance = max(rise_p_value(reward), rise_p_value([-value for _, value in latest]))
        if chance < settings.p_value:
            found.append(name)
    return tuple(found)


def warn_of(
    falling: Sequence[str],
    warned: Mapping[str, int],
    step: int,
    series: Mapping[str, Series],
    settings: TrendSettings,
) -> dict[str, int]:
    """Warn of what begins to fall; of the same thing again after `window` updates at the earliest.

    Returns:
        The update of the last warning of each name.
    """
    found = dict(warned)
    for name in falling:
        if step - found.get(name, -settings.window) < settings.window:
            continue
        past = series[name][-settings.window :]
        first = past[0][0]
        logger.warning(
            "possible reward hacking: since update %d %s falls by %.2g an update while the reward "
            "rises by %.2g (median slopes, p < %g each); look at videos, and give what falls a "
            "weight or a guard",
            first,
            name,
            -theil_sen(past),
            theil_sen([[at, value] for at, value in series[REWARD] if at >= first]),
            settings.p_value,
        )
        found[name] = step
    return found


def theil_sen(series: Series) -> float:
    """Median slope over all pairs of a series, per update; 0 for fewer than 2 values.

    Source:
        Theil (1950); Sen, JASA 63 (1968).
    """
    slopes = sorted(
        (value - before) / (step - start)
        for place, (step, value) in enumerate(series)
        for start, before in series[:place]
    )
    if not slopes:
        return 0.0
    middle = len(slopes) // 2
    return (slopes[middle] + slopes[~middle]) / 2
