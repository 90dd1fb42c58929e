"""Rewards that measure and never train: what the policy is worth to somebody it does not know.

Axes: B videos of this process, N of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from diffusion_rl.generators.base import AbstractVideoGenerator, PromptEmbeddings
from diffusion_rl.policies import saved_policy
from diffusion_rl.processes import together
from diffusion_rl.prompts import read_prompts
from diffusion_rl.reward_contract import RewardSettings
from diffusion_rl.rewards import (
    Reward,
    ask_for_team,
    build_rewards,
    check_missing,
    gather_answers,
)
from diffusion_rl.rollout import RolloutSettings, Trajectory, rollout
from diffusion_rl.shares import own_share


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Rewards that take no part in training, and the videos that they see."""

    rewards: tuple[RewardSettings, ...]
    """At least one; weights mean nothing here."""
    prompts: str | None = None
    """A file of prompts as for training, better none of those: the same videos (prompts and noise)
    are drawn each time by what the run would save. None asks about the update's own videos."""
    every: int = 10
    """Updates between two measurements, at least 1; the first update is measured, too."""
    videos_per_prompt: int = 1
    """Of each held-out prompt, at least 1."""
    seed: int = 0
    """Of the first held-out video, in [0, 2^31); training never draws there."""

    def __post_init__(self) -> None:
        names = [reward.name for reward in self.rewards]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"rewards must be at least one and have different names, got {names}")
        for name in ("every", "videos_per_prompt"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 1 << 31:
            raise ValueError(f"seed must be in [0, 2^31), got {self.seed}")
        for name, default in (("videos_per_prompt", 1), ("seed", 0)):
            if self.prompts is None and getattr(self, name) != default:
                raise ValueError(
                    f"{name} must be left out without prompts, got {getattr(self, name)}; the "
                    "update's own videos are measured"
                )

    def due(self, step: int) -> bool:
        """Whether update `step`, counted from 1, is measured."""
        return step == 1 or step % self.every == 0


@dataclass(frozen=True)
class HeldOut:
    """Evaluation rewards ready to be asked."""

    settings: EvaluationSettings
    """When, and about how many videos."""
    rewards: Sequence[Reward]
    """At least one."""
    prompts: Sequence[str] = ()
    """Held-out texts; none for the update's own videos."""
    embeddings: PromptEmbeddings | None = None
    """Of these texts."""

    def measure(
        self,
        generator: AbstractVideoGenerator,
        options: RolloutSettings,
        missing_limit: float,
        own: Trajectory,
        texts: Sequence[str],
    ) -> tuple[dict[str, float], int, int]:
        """Ask every reward.

        Args:
            generator: with what learns attached.
            options: how training videos are drawn; these take no stochastic step.
            missing_limit: as in `check_missing`.
            own: the update's videos of this process.
            texts: the prompt of each.

        Returns:
            Means over judged videos by reward; videos drawn for them; videos judged times rewards.

        Raises:
            RuntimeError: A reward raised, or left too many videos unjudged.
        """
        trajectory, shown, drawn = own, texts, 0
        if self.embeddings is not None:
            index = torch.arange(len(self.prompts))
            index = index.repeat_interleave(self.settings.videos_per_prompt)
            seeds = range(self.settings.seed, self.settings.seed + len(index))
            with together("drawing held-out videos"), saved_policy(generator.transformer):
                share = own_share(len(index), options.micro_batch)
                trajectory = rollout(generator, self.embeddings, index, seeds, options, share=share)
            shown = [self.prompts[place] for place in trajectory.prompt_index.tolist()]
            drawn = len(index)
        with together("sending held-out videos to rewards"):
            asked = ask_for_team(self.rewards, trajectory.videos, shown, fps=generator.fps)
        places = (trajectory.videos, trajectory.rows, trajectory.total)
        said = gather_answers(asked, "judging held-out videos", *places)
        check_missing(self.rewards, said, missing_limit)
        means = {name: one.score[~one.score.isnan()].mean().item() for name, one in said.items()}
        return means, drawn, trajectory.total * len(self.rewards)


def build_held_out(
    settings: EvaluationSettings | None,
    column: str,
    generator: AbstractVideoGenerator,
    undo: ExitStack,
) -> HeldOut | None:
    """Build evaluation rewards and encode their prompts; None where there are none.

    Args:
        settings: of the run's evaluation.
        column: key or column of the prompts where the file has such.
        generator: its text encoder must not be released yet.
        undo: closes the rewards.
    """
    if settings is None:
        return None
    rewards = build_rewards(settings.rewards, undo)
    if settings.prompts is None:
        return HeldOut(settings, rewards)
    prompts = read_prompts(settings.prompts, column)
    return HeldOut(settings, rewards, prompts, generator.encode_prompts(prompts))
