"""How far a measure would move with other recordings: percentile bootstrap over groups of clips."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Measure = Callable[[Tensor], Mapping[str, float]]
"""Values by name for weights [N], a whole number for each clip; NaN where a value has no base."""


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; NaN where there is none."""

    value: float
    low: float
    high: float


def bootstrap(
    measure: Measure,
    groups: Sequence[str],
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Measure all clips, and again with groups of clips drawn anew, with replacement.

    Args:
        measure: What is measured.
        groups: [N] the group of each clip. Clips of one recording are drawn together: they are
            not independent, and drawn one by one they would make the interval too narrow.
        draws: at least 0; with 0 there are no intervals.
        level: Share of the draws inside the interval, in (0, 1).
        seed: Of the draws; the same seed gives the same intervals.

    Returns:
        By name the value over all clips, and the interval's ends: quantiles of the draws in which
        the value has a base. NaN ends where that is fewer than half of the draws.

    Raises:
        ValueError: If a setting is out of range or there is no clip.

    Source:
        Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile).
    """
    if draws < 0:
        raise ValueError(f"draws must be at least 0, got {draws}")
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    if not groups:
        raise ValueError("groups must hold at least one clip, got none")
    values = measure(torch.ones(len(groups), dtype=torch.float64))
    drawn: dict[str, list[float]] = {name: [] for name in values}
    for weights in _draws(groups, draws, seed):
        for name, value in measure(weights).items():
            if not math.isnan(value):
                drawn[name].append(value)
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    estimates = {}
    for name, value in values.items():
        low = high = math.nan
        if draws and not math.isnan(value) and 2 * len(drawn[name]) >= draws:
            spread = torch.tensor(drawn[name], dtype=torch.float64)
            low, high = spread.quantile(ends).tolist()
        estimates[name] = Estimate(value, low, high)
    return estimates


def _draws(groups: Sequence[str], draws: int, seed: int) -> Iterator[Tensor]:
    """How often each clip is in a draw."""
    places = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    member = torch.tensor([places[group] for group in groups])
    generator = torch.Generator().manual_seed(seed)
    for _ in range(draws):
        picked = torch.randint(len(places), (len(places),), generator=generator)
        yield picked.bincount(minlength=len(places))[member].double()
