"""Scores to advantages: how much better a video is than what it is compared with.

Axes: B videos. A score of NaN is a video that could not be judged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from diffusion_rl.shapes import check_shape

Spread = Literal["group", "batch", "largest"]

History = Mapping[int, Sequence[float]]
"""The latest judged scores of each prompt, oldest first, by the prompt's number."""


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
            judged scores together, "largest" by the largest spread of any group.
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
    if std not in ("group", "batch", "largest"):
        raise ValueError(f"std must be 'group', 'batch' or 'largest', got '{std}'")
    _check_limits(clip, min_std)
    scores, group = _check(scores, group)

    # Ties are looked for, not computed: the mean of equal scores may differ from them by a rounding
    # error, which a small spread would turn into an advantage.
    advantages = torch.zeros_like(scores)
    judged = ~scores.isnan()
    shared = {
        "batch": _spread(scores[judged], unbiased),
        "largest": max(_spread(scores[judged & (group == i)], unbiased) for i in group.unique()),
    }
    for index in group.unique():
        members = judged & (group == index)
        values = scores[members]
        if len(values) < 2 or bool((values == values[0]).all()):
            continue
        spread = _spread(values, unbiased) if std == "group" else shared[std]
        advantages[members] = (values - values.mean()) / spread.clamp_min(min_std)
    return advantages.clamp(-clip, clip).float()


def history_advantages(
    scores: Tensor,
    prompt: Tensor,
    history: History,
    *,
    capacity: int = 16,
    min_count: int = 16,
    clip: float = 5.0,
    min_std: float = 1e-4,
) -> tuple[Tensor, dict[int, list[float]]]:
    """Compare every video with what its prompt scored lately, this update's videos included.

    advantage = clamp((scores - mean of the history) / max(its spread, min_std), -clip, clip)

    A prompt with fewer than min_count scores in its history is compared with all judged scores of
    the batch instead.

    Args:
        scores: [B] higher is better; NaN takes no part and is not remembered.
        prompt: [B] integer, the number of the prompt that each video shows.
        history: before these scores.
        capacity: A prompt's latest scores that are remembered, at least min_count.
        min_count: At least 2.
        clip: Largest size of an advantage, above 0.
        min_std: Spreads below it count as it, above 0.

    Returns:
        [B] float32, no gradient, exactly 0 for unjudged videos and where all compared scores are
        equal; and the history after these scores.

    Raises:
        ValueError: A shape is wrong, a score is infinite or an option is outside its range.

    Source:
        DDPO, arXiv:2305.13301, PerPromptStatTracker of its published code.

    Example:
        >>> history_advantages(
        ...     torch.tensor([3.0]), torch.tensor([0]), {0: [1.0]}, capacity=2, min_count=2
        ... )
        (tensor([1.]), {0: [1.0, 3.0]})
    """
    if min_count < 2:
        raise ValueError(f"min_count must be at least 2, got {min_count}")
    if capacity < min_count:
        raise ValueError(f"capacity must be at least min_count={min_count}, got {capacity}")
    _check_limits(clip, min_std)
    scores, prompt = _check(scores, prompt)

    advantages = torch.zeros_like(scores)
    after = {number: list(past) for number, past in history.items()}
    judged = ~scores.isnan()
    for number in prompt[judged].unique().tolist():
        members = judged & (prompt == number)
        after[number] = [*after.get(number, []), *scores[members].tolist()][-capacity:]
        enough = len(after[number]) >= min_count
        compared = scores.new_tensor(after[number]) if enough else scores[judged]
        if bool((compared == compared[0]).all() and (scores[members] == compared[0]).all()):
            continue
        spread = _spread(compared, unbiased=False).clamp_min(min_std)
        advantages[members] = (scores[members] - compared.mean()) / spread
    return advantages.clamp(-clip, clip).float(), after


def separate_advantages(
    scores: Tensor,
    weights: Sequence[float],
    group: Tensor,
    *,
    clip: float = 5.0,
    min_std: float = 1e-4,
    std: Spread = "group",
    unbiased: bool = False,
) -> Tensor:
    """Give every reward the same say before weighting, whatever the spread of its scores.

    summed    = sum over R of  weights * group_advantages(scores, group)
    advantage = clamp(summed / max(spread of summed over the batch, min_std), -clip, clip)

    Args:
        scores: [R B] of R rewards; a video that one reward could not judge counts as not judged.
        weights: R factors, not all 0.
        group: [B] integer, equal for the videos of one prompt.
        clip: Largest size of an advantage, above 0.
        min_std: Spreads below it count as it, above 0.
        std: As in `group_advantages`, for each reward.
        unbiased: As in `group_advantages`, for each reward.

    Returns:
        [B] float32, no gradient; exactly 0 for unjudged videos and where all rewards tie.

    Raises:
        ValueError: A shape is wrong, a score is infinite or an option is outside its range.

    Source:
        GDPO, arXiv:2601.05242. Its mean over the batch is not taken off: that of each group is 0.
    """
    _check_limits(clip, min_std)
    terms = advantages_apart(scores, weights, group, min_std=min_std, std=std, unbiased=unbiased)
    summed, judged = terms.sum(dim=0), ~scores.isnan().any(dim=0)
    spread = _spread(summed[judged], unbiased=False).clamp_min(min_std)
    return (summed / spread).clamp(-clip, clip).float()


def advantages_apart(
    scores: Tensor,
    weights: Sequence[float],
    group: Tensor,
    *,
    min_std: float = 1e-4,
    std: Spread = "group",
    unbiased: bool = False,
) -> Tensor:
    """Say what each reward adds to `separate_advantages`, before the sum is scaled.

    Args:
        scores: As in `separate_advantages`; unweighted, since comparing divides a factor away.
        weights: As in `separate_advantages`.
        group: As in `separate_advantages`.
        min_std: As in `separate_advantages`.
        std: As in `group_advantages`, for each reward.
        unbiased: As in `group_advantages`, for each reward.

    Returns:
        [R B] float64, weights * group_advantages(scores, group); 0 in every row for a video that
        one reward could not judge.

    Raises:
        ValueError: A shape is wrong, a score is infinite or an option is outside its range.
    """
    axes = check_shape("scores", scores, "R B")
    if len(weights) != axes["R"] or not any(weights):
        raise ValueError(f"weights must be {axes['R']} factors, not all 0, got {list(weights)}")
    missing = scores.isnan().any(dim=0)
    terms = []
    for own, weight in zip(scores.double(), weights, strict=True):
        own = own.masked_fill(missing, torch.nan)
        advantages = group_advantages(
            own, group, std=std, unbiased=unbiased, clip=torch.inf, min_std=min_std
        )
        terms.append(weight * advantages.double())
    return torch.stack(terms)


def best_advantages(scores: Tensor, group: Tensor, *, keep: int = 1) -> Tensor:
    """Keep the best videos of every prompt, and none of the others.

    advantage = judged videos of the group / kept videos of the group  for those kept, 0 for others

    so that the mean of advantages * loss over judged videos is the mean over groups, each weighed
    by its judged videos, of the mean loss of what it keeps.

    Args:
        scores: [B] higher is better; NaN is never kept.
        group: [B] integer, equal for the videos of one prompt.
        keep: Best videos of a group that are kept, at least 1; more where some tie for the last
            place. The worst of a group never is.

    Returns:
        [B] float32, at least 0, no gradient. Exactly 0 for unjudged videos, for ties (all judged
        scores of the group equal) and for a video that is alone in its group.

    Raises:
        ValueError: A shape is wrong, a score is infinite or keep is below 1.

    Source:
        RAFT, arXiv:2304.06767, algorithm 1, for the choice; the weights keep groups alike where
        videos could not be judged.

    Example:
        >>> best_advantages(torch.tensor([1.0, 3.0, 5.0, 5.0]), torch.tensor([0, 0, 1, 1]))
        tensor([0., 2., 0., 0.])
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    scores, group = _check(scores, group)
    advantages = torch.zeros_like(scores)
    judged = ~scores.isnan()
    for index in group.unique():
        members = judged & (group == index)
        if not bool(members.any()):
            continue
        values = scores[members]
        last = values.topk(min(keep, len(values))).values[-1]
        kept = (values >= last) & (values > values.min())
        advantages[members] = kept.double() * len(values) / kept.sum().clamp_min(1)
    return advantages.float()


def paired_advantages(scores: Tensor, group: Tensor, *, pairs: int = 1) -> Tensor:
    """Set the best videos of every prompt against its worst.

    advantage = 1 for the best `pairs` judged videos of a group, -1 for its worst, 0 for others

    with fewer where they would meet: every preferred video scores more than every other one of the
    group that is not 0.

    Args:
        scores: [B] higher is better; NaN is left out.
        group: [B] integer, equal for the videos of one prompt.
        pairs: at least 1.

    Returns:
        [B] float32, no gradient. Among videos that tie for a place their order decides. A group
        whose judged scores all tie has no pair.

    Raises:
        ValueError: A shape is wrong, a score is infinite or pairs is below 1.

    Source:
        The choice of Flow-GRPO's published train_sd3_dpo.py (the best and the worst), which pairs
        videos that tie, too.

    Example:
        >>> scores, group = torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0]), torch.tensor([0, 0, 0, 1, 1])
        >>> paired_advantages(scores, group)
        tensor([-1.,  1.,  0.,  0.,  0.])
    """
    if pairs < 1:
        raise ValueError(f"pairs must be at least 1, got {pairs}")
    scores, group = _check(scores, group)
    advantages = torch.zeros_like(scores)
    for index in group.unique():
        places = (~scores.isnan() & (group == index)).nonzero().flatten()
        falling = places[scores[places].argsort(descending=True, stable=True)]
        count = min(pairs, len(places) // 2)
        while count and scores[falling[count - 1]] == scores[falling[-count]]:
            count -= 1
        if count:
            advantages[falling[:count]] = 1.0
            advantages[falling[-count:]] = -1.0
    return advantages.float()


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


def _check_limits(clip: float, min_std: float) -> None:
    if not clip > 0:
        raise ValueError(f"clip must be above 0, got {clip}")
    if not min_std > 0:
        raise ValueError(f"min_std must be above 0, got {min_std}")


def _spread(values: Tensor, unbiased: bool) -> Tensor:
    """Standard deviation; 0 when there are too few values for one."""
    if len(values) < 2:
        return values.new_zeros(())
    return values.std(correction=1 if unbiased else 0)
