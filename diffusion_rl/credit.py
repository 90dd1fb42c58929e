"""Where in a video its advantage goes: spread over the whole latent, or to the fault.

A step's log-probability is a mean over latent positions, and so is the policy gradient of a video:
advantage * mean over positions of the gradient of each position's log-probability. If a judge says
where and when the fault is, the positions that drew it can take the blame and the rest be spared:

    advantage at a position = advantage * weight,  the mean of a video's weights being 1
    weight = 1 + mix * share * (blame / mean blame - 1)

`blame` is the judge's map as a mean over what each latent position shows, and `share` in [0, 1]
says how much of a video's disadvantage is the judge's (see `blamed_shares`).

Axes: B videos, F frames, R rewards; of the latent T frames, H, W, and P = T * H * W positions; of a
blame map Y and X, which may be any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_rl.blame import LatentGrid, blame_weights, move_at_random, pool_blame
from diffusion_rl.processes import gather_rows
from diffusion_rl.shapes import check_shape

CREDITS = ("uniform", "grounded", "random")
CLIPS = ("video", "position")


@dataclass(frozen=True, kw_only=True)
class CreditSettings:
    """How an advantage is laid on the positions of a latent."""

    name: str = "uniform"
    """`uniform` spreads it; `grounded` focuses what is below average where the rewards' blame is;
    `random` moves that blame to a random place of the video first: the control."""
    mix: float | None = None
    """Share of the blamed disadvantage that is focused, in [0, 1]; None is 1. With 0 all is spread,
    with 1 what lies outside the blame learns nothing of it. `uniform` takes none."""
    balanced: bool = False
    """Lay what is above average where its group's blame is, too, so that the advantages of a group
    cancel at every position and not only over whole videos (see `balance`)."""
    clip: str = "video"
    """Whether a `video` has one ratio, of the mean of its log-probabilities under the weights, or
    each latent `position` its own. Only for rows that replay recorded steps."""

    def __post_init__(self) -> None:
        for name, value, known in (("name", self.name, CREDITS), ("clip", self.clip, CLIPS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value}")
        if self.name == "uniform" and self.balanced:
            raise ValueError(
                "balanced must be left out with name 'uniform', got True; it would be ignored"
            )
        if self.mix is None:
            return
        if self.name == "uniform":
            raise ValueError(
                f"mix must be left out with name 'uniform', got {self.mix}; it would be ignored"
            )
        if not 0 <= self.mix <= 1:
            raise ValueError(f"mix must be in [0, 1], got {self.mix}")

    @property
    def focus(self) -> float:
        """Share of the blamed disadvantage that is focused."""
        if self.name == "uniform":
            return 0.0
        return 1.0 if self.mix is None else self.mix


class ScorePart(NamedTuple):
    """One addend of the videos' scores: a weighted reward, or what the guards take off."""

    score: Tensor
    """[B] NaN where it could not judge."""
    blame: Tensor | None = None
    """[B F Y X] at least 0: where and when the fault is; None if it never says."""


@dataclass(frozen=True)
class Credit:
    """Advantages and where in each video they go."""

    advantages: Tensor
    """[B] of whole videos."""
    weights: Tensor | None = None
    """[B T H W] at least 0, of mean 1 in each video; None spreads every advantage."""
    clip: str = "video"
    """As in CreditSettings."""

    def __getitem__(self, videos: slice | Tensor) -> Credit:
        """Only some videos: a slice, or [B] bool."""
        weights = None if self.weights is None else self.weights[videos]
        return replace(self, advantages=self.advantages[videos], weights=weights)

    def to(self, like: Tensor) -> Credit:
        """On the device and in the precision of `like`."""
        weights = None if self.weights is None else self.weights.to(like)
        return replace(self, advantages=self.advantages.to(like), weights=weights)

    @property
    def focused(self) -> Tensor:
        """[B] bool: whether a video's weights differ from 1 anywhere."""
        if self.weights is None:
            return torch.zeros_like(self.advantages, dtype=torch.bool)
        return (self.weights != 1).flatten(1).any(dim=1)

    @property
    def moved(self) -> Tensor:
        """[B] float64 share of each video's advantage that is not spread, in [0, 1): what has to be
        moved from even weights to get these."""
        if self.weights is None:
            return torch.zeros_like(self.advantages, dtype=torch.float64)
        return (self.weights.double() - 1).clamp_min(0).flatten(1).mean(dim=1)

    @property
    def areas(self) -> Tensor:
        """[B] share of the latent that counts, 1 / mean(weights^2), of focused videos; else NaN.

        In (0, 1]: the area itself where one region has all the weight.
        """
        if self.weights is None:
            return torch.full_like(self.advantages, torch.nan)
        return torch.where(self.focused, 1 / self._concentration(), torch.nan)

    @property
    def focused_share(self) -> float:
        """As in `focused_share`, of these videos."""
        return focused_share(self.advantages, self.moved)

    @property
    def focus_area(self) -> float:
        """Mean of `areas` over focused videos; NaN if no video is focused."""
        return self.areas.nanmean().item()

    def columns(self, whole: Tensor, positions: Tensor) -> Tensor:
        """A mean over latents the way that ratios see it: of each video, or of each position.

        Args:
            whole: [B] mean over all elements.
            positions: [B T H W] mean over channels of the same.

        Returns:
            [B P] if clip is position; else [B 1], under the weights. Videos without a focus keep
            `whole` to the last bit.
        """
        if self.clip == "position":
            return positions.flatten(1)
        if self.weights is None:
            return whole[:, None]
        weighted = (self.weights * positions).flatten(1).mean(dim=1)
        return torch.where(self.focused, weighted, whole)[:, None]

    def column_advantages(self, positions: int) -> Tensor:
        """[B], or [B P] if clip is position."""
        if self.clip == "video":
            return self.advantages
        advantages = self.advantages[:, None].expand(-1, positions)
        return advantages if self.weights is None else advantages * self.weights.flatten(1)

    def widths(self, positions: int) -> Tensor | None:
        """How much wider than of whole latents the logarithms of these ratios spread; None is 1.

        width = sqrt(mean(weights^2)), which is sqrt(P) for one position. They are means of so many
        fewer independent terms; a clip range that is meant for whole latents is widened by it, so
        that it stops a policy at the same movement of its means.

        Returns:
            [B 1] or, if clip is position, [B P].
        """
        if self.clip == "position":
            return torch.full_like(self.advantages, positions**0.5)[:, None].expand(-1, positions)
        return None if self.weights is None else self._concentration().sqrt()[:, None]

    def _concentration(self) -> Tensor:
        """[B] mean(weights^2), at least 1."""
        assert self.weights is not None
        return (self.weights**2).flatten(1).mean(dim=1)


def focused_share(advantages: Tensor, moved: Tensor) -> float:
    """Share of all negative advantage that is not spread, in [0, 1]; 0 if none is negative.

    Args:
        advantages: [B] of whole videos.
        moved: [B], as in `Credit`.
    """
    size = advantages.clamp(max=0).double().abs()
    return ((size * moved).sum() / size.sum()).item() if bool(size.any()) else 0.0


def check_blame(blames: Sequence[Tensor | None], settings: CreditSettings) -> None:
    """Refuse credit that no reward grounds, which is a mistake of the configuration.

    To be asked once, of the first videos of a run: a judge may leave blame out where it finds no
    fault, or could not say, and `assign_credit` then spreads.

    Args:
        blames: [B F Y X] of each reward of weight other than 0; None where it returned none.
        settings: uniform, grounded or random.

    Raises:
        ValueError: There is nothing to ground credit in.
    """
    if settings.name != "uniform" and all(blame is None for blame in blames):
        raise ValueError(
            f"credit.name must be uniform for rewards that return no blame, got {settings.name}; "
            "let one of weight other than 0 return {'score': [B], 'blame': [B F H W]}"
        )


def assign_credit(
    advantages: Tensor,
    parts: Sequence[ScorePart],
    group: Tensor,
    grid: LatentGrid,
    seeds: Sequence[int],
    settings: CreditSettings,
    rows: Tensor | None = None,
) -> Credit:
    """Lay the advantages on the latents' positions.

    Advantages of at least 0 are spread unless they are balanced: that nothing is wrong is said of
    all of a video. So is the advantage of a video without blame, or with the same blame everywhere,
    and all of them where no part has blame (`check_blame` refuses what never will).

    Args:
        advantages: [B], 0 for videos not judged.
        parts: What the scores are the sum of.
        group: [B] integer, equal for the videos of one prompt.
        grid: Of the latents.
        seeds: One for each video; `random` moves a video's blame by its seed, and by which of the
            videos with that seed it is.
        settings: uniform, grounded or random, and how much.
        rows: [R] places of the videos that `blame` is of, and that credit is wanted for, where
            other processes have the others; None is all. All of them call this where advantages
            are balanced.

    Raises:
        ValueError: A shape is wrong.
    """
    axes = check_shape("advantages", advantages, "B")
    rows = torch.arange(axes["B"]) if rows is None else rows
    uniform = Credit(advantages[rows], None, settings.clip)
    if settings.focus == 0:
        return uniform
    shares = blamed_shares(torch.stack([part.score for part in parts]), group)
    shares = (shares * (advantages < 0))[:, rows]
    size = (len(rows), len(grid.frame_groups), grid.height, grid.width)
    weights = torch.ones(size, dtype=torch.float64)
    for part, share in zip(parts, shares, strict=True):
        if part.blame is None:
            continue
        focus = blame_weights(pool_blame(part.blame, grid), grid)
        if settings.name == "random":
            focus = move_at_random(focus, grid, seeds, rows)
        weights += settings.focus * share.double().view(-1, 1, 1, 1) * (focus - 1)
    if settings.balanced:
        weights = balance(gather_rows(weights, rows, axes["B"]), advantages, group)[rows]
    # Float64 so far, so that even blame is 1 and no weight below 0 after rounding.
    credit = replace(uniform, weights=weights.float().clamp_min(0))
    return credit if bool(credit.focused.any()) else uniform


def balance(weights: Tensor, advantages: Tensor, group: Tensor) -> Tensor:
    """Give what is above average in a group the weights of what is below it, as a mean.

    weights of advantages above 0 = sum of |advantage| * weights / sum of |advantage|,
                                    over the group's advantages below 0

    Advantages of a group cancel over whole videos: what its videos have in common is neither learnt
    nor unlearnt. Focused ones alone no longer cancel position by position: where faults are blamed
    often, all of the group is pushed away from, and drawn to elsewhere. Where the gradient of what
    a policy has drawn is 0 on average, as of an exact log-probability, that is noise. The losses of
    the forward process only come near to it, and have no end in one direction.

    Args:
        weights: [B T H W] of mean 1 in each video, as the disadvantage is laid.
        advantages: [B].
        group: [B] integer, equal for the videos of one prompt.

    Returns:
        [B T H W] of mean 1; those of advantages of at most 0, and of groups that have none below 0,
        as they were.
    """
    balanced = weights.clone()
    for index in group.unique():
        above, below = (group == index) & (advantages > 0), (group == index) & (advantages < 0)
        if not bool(below.any()):
            continue
        size = advantages[below].double().abs().view(-1, 1, 1, 1)
        balanced[above] = (size * weights[below]).sum(dim=0) / size.sum()
    return balanced


def blamed_shares(scores: Tensor, group: Tensor) -> Tensor:
    """Say how much of a video's disadvantage each part of its score answers for.

    shortfall = max(0, mean of the part over the group - part)
    share     = shortfall / sum over R of shortfall

    A score is a sum: the judge's reward has blame, while prompt alignment or what the guards charge
    for lost motion and diversity is a matter of the whole video and has no place. Only the share of
    parts with blame may be focused. It is a share of the advantage as it is, whatever normalised or
    clipped it, so that the total of a video stays what it would be with uniform credit. The other
    way to split, into one advantage for each part, would have parts of opposite signs: a broken
    video that follows its prompt would be encouraged outside its fault, and pushed from inside it
    with more than its disadvantage. Here every position of a video is moved in one direction.

    Args:
        scores: [R B] weighted; NaN where a part could not judge.
        group: [B] integer, equal for the videos of one prompt.

    Returns:
        [R B] in [0, 1], summing to 1 over R, or to 0 where nothing falls short of its group: for
        videos not judged, and for those that only their prompt's history is better than.

    Example:
        >>> blamed_shares(torch.tensor([[0.0, 1.0], [0.5, 1.0]]), torch.tensor([0, 0]))[:, 0]
        tensor([0.6667, 0.3333])
    """
    axes = check_shape("scores", scores, "R B")
    check_shape("group", group, "B", B=axes["B"])
    judged = ~scores.isnan().any(dim=0)
    shortfall = torch.zeros_like(scores)
    for index in group.unique():
        members = judged & (group == index)
        own = scores[:, members]
        shortfall[:, members] = (own.mean(dim=1, keepdim=True) - own).clamp_min(0)
    total = shortfall.sum(dim=0)
    return torch.where(total > 0, shortfall / total, 0.0)
