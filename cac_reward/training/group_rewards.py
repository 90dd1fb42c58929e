"""From the rewards of rollouts to what GRPO compares within a group of answers to one question."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

from cac_reward.training.rollouts import Rollout

TIE_TOLERANCE = 1e-6
"""Rewards that differ by no more are the same to GRPO."""
SUMMED_LOSSES = ("cispo", "dapo", "vespo")
"""TRL's that divide a sum over answers by a number which is fixed when they are drawn; in the
others each answer of a pass has a say in what the others weigh."""


def combine(values: Mapping[str, float | None], weights: Mapping[str, float]) -> float:
    """One reward of several: the mean of what is there, by weight.

    result = sum of weight * value / sum of weight, both over the rewards that are not missing;
             NaN where all are, or have weight 0

    Since what is missing depends on the clip alone, all answers of a group are averaged over the
    same rewards.

    Args:
        values: By name; NaN or None is missing.
        weights: By the same names, at least 0, one above 0; a reward of weight 0 is only watched.

    Raises:
        ValueError: If the names differ or a weight breaks its rule.

    Example:
        >>> combine({"accuracy": 1.0, "format": 0.0, "spatial_iou": None},
        ...         {"accuracy": 3.0, "format": 1.0, "spatial_iou": 1.0})
        0.75
    """
    if values.keys() != weights.keys():
        raise ValueError(
            f"weights must have the names of the values {sorted(values)}, got {sorted(weights)}"
        )
    bad = [one for one in weights.values() if not 0 <= one < math.inf]
    if bad or not any(weights.values()):
        raise ValueError(f"weights must be at least 0 and one above 0, got {dict(weights)}")
    missing = missing_rewards(values)
    present = {name: weight for name, weight in weights.items() if name not in missing and weight}
    if not present:
        return math.nan
    total = math.fsum(weight * float(values[name] or 0) for name, weight in present.items())
    return total / math.fsum(present.values())


def missing_rewards(values: Mapping[str, float | None]) -> list[str]:
    """Names of the rewards that are NaN or None, to be counted."""
    return [name for name, value in values.items() if value is None or math.isnan(value)]


def all_failed(rollouts: Sequence[Rollout]) -> bool:
    """Whether no answer of a group could be read: it must give no gradient, and is counted.

    Raises:
        ValueError: If the group is empty.
    """
    if not rollouts:
        raise ValueError("rollouts must hold a group's answers, got none")
    return all(rollout.failed for rollout in rollouts)


def tied(rewards: Sequence[float]) -> bool:
    """Whether a group's rewards say nothing of which answer is better; missing ones take no part.

    Example:
        >>> tied([0.5, 0.5, float("nan")]), tied([0.5, 0.6])
        (True, False)
    """
    present = [reward for reward in rewards if not math.isnan(reward)]
    return not present or max(present) - min(present) <= TIE_TOLERANCE


def only_moving(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A pass of TRL's without the answers of advantage 0, which have no gradient in SUMMED_LOSSES.

    Every process passes as many, some of advantage 0 where it must: TRL gathers a number of each.
    One is passed where all are such: a gradient of 0 is none that is missing, and processes with
    sharded weights pass together. All processes call it together.

    Args:
        inputs: of `GRPOTrainer.compute_loss`: tensors [B ...], pictures of all answers one after
            the other, and numbers of the whole batch.
    """
    moving = inputs["advantages"] != 0
    count = max(1, *gather_object([int(moving.sum())]))
    idle = (~moving).nonzero().flatten()
    moving[idle[: count - int(moving.sum())]] = True
    if bool(moving.all()):
        return dict(inputs)
    rows = moving.nonzero().flatten()
    split = split_pixel_values_by_grid(dict(inputs))
    chosen = {
        name: [value[row] for row in rows.tolist()]
        if isinstance(value, list)
        else value[rows]
        if isinstance(value, Tensor) and value.ndim
        else value
        for name, value in split.items()
    }
    return unsplit_pixel_values_by_grid(chosen)
