"""Scores to advantages: how much better a video is than what it is compared with.

Axes: B videos. A score of NaN is a video that could not be judged.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from diffusion_rl.shapes import check_shape

Spread = Literal["group", "batch"]


def group_advantages(
    scores: Tensor,
    group: Tensor,
    *,
    std: Spread = "group",
    unbiased: bool = False,
    clip: float = 5.0,
    min_std: float = 1e-4,
) -> Tensor:
    """Compare every video with the others of its prompt.

    advantage = clamp((scores - mean of the group) / max(spread, min_std), -clip, clip)

    Args:
        scores: [B] higher is better; NaN takes no part in any mean or spread.
        group: [B] integer, equal for the videos of one prompt.
        std: "group" divides by the spread of the video's own group, "batch" by that of all
            judged scores together.
        unbiased: Divide the squares by n - 1 instead of n.
        clip: Largest size of an advantage, above 0.
        min_std: Spreads below it count as it, so that rounding in near-equal scores is not blown
            up to full advantages; in units of the score, above 0.

    Returns:
        [B] float32, no gradient. Exactly 0 for unjudged videos, for ties (all judged scores of
        the group equal) and for a video that is alone in its group.

    Raises:
        ValueError: A shape is wrong, a score is infinite or an option is outside its range.

    Example:
        >>> group_advantages(torch.tensor([1.0, 3.0, 5.0, 5.0]), torch.tensor([0, 0, 1, 1]))
        tensor([-1.,  1.,  0.,  0.])
    """
    if std not in ("group", "batch"):
        raise ValueError(f"std must be 'group' or 'batch', got '{std}'")
    if not clip > 0:
        raise ValueError(f"clip must be above 0, got {clip}")
    if not min_std > 0:
        raise ValueError(f"min_std must be above 0, got {min_std}")
    scores, group = _check(scores, group)

    # Ties are looked for, not computed: the mean of equal scores may differ from them by a rounding
    # error, which a small spread would turn into an advantage.
    advantages = torch.zeros_like(scores)
    judged = ~scores.isnan()
    batch_spread = _spread(scores[judged], unbiased)
    for index in group.unique():
        members = judged & (group == index)
        values = scores[members]
        if len(values) < 2 or bool((values == values[0]).all()):
            continue
        spread = batch_spread if std == "batch" else _spread(values, unbiased)
        advantages[members] = (values - values.mean()) / spread.clamp_min(min_std)
    return advantages.clamp(-clip, clip).float()


def tied_share(scores: Tensor, group: Tensor) -> float:
    """Say what share of the groups teaches nothing because no two judged scores differ.

    Args:
        scores: [B]; NaN for an unjudged video.
        group: [B] integer, equal for the videos of one prompt.

    Returns:
        In [0, 1]; a group with fewer than two judged videos counts as tied.
    """
    scores, group = _check(scores, group)
    tied = []
    for index in group.unique():
        values = scores[group == index]
        tied.append(len(values[~values.isnan()].unique()) < 2)
    return sum(tied) / len(tied)


def missing_share(scores: Tensor) -> float:
    """Say what share of the videos could not be judged.

    Args:
        scores: [B]; NaN for an unjudged video.

    Returns:
        In [0, 1].
    """
    check_shape("scores", scores, "B")
    return scores.isnan().double().mean().item()


def _check(scores: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    axes = check_shape("scores", scores, "B")
    check_shape("group", group, "B", **axes)
    if not axes["B"]:
        raise ValueError("scores must hold at least one video, got none")
    if group.is_floating_point():
        raise ValueError(f"group must hold integers, got {group.dtype}")
    scores = scores.detach().double()
    if bool(scores.isinf().any()):
        raise ValueError("scores must be finite, or NaN for a video not judged, got infinity")
    return scores, group.to(scores.device)


def _spread(values: Tensor, unbiased: bool) -> Tensor:
    """Standard deviation; 0 when there are too few values for one."""
    if len(values) < 2:
        return values.new_zeros(())
    return values.std(correction=1 if unbiased else 0)
