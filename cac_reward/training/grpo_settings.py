"""What a stage's YAML says of learning from rewards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cac_reward.training.lesson_kinds import LESSONS
from cac_reward.training.rules import above_zero, at_least, check_shares, one_of, within
from cac_reward.training.stage_rewards import REWARDS, rewards_of

LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "vespo")
SPREADS = ("group", "batch", "none")


@dataclass(kw_only=True)
class RolloutSettings:
    """How GRPO's answers are drawn."""

    group: int = 8
    """Answers to each question, at least 2."""
    temperature: float = 1.0
    """Above 0."""
    max_call_tokens: int = 128
    """Most tokens of turn 1."""
    max_answer_tokens: int = 512
    """Most tokens of turn 2, or of a single-turn answer."""
    vllm: bool = False
    """Draw them with vLLM beside the training (colocate); needs vllm installed."""
    vllm_memory: float = 0.3
    """Share of the GPU that vLLM may take, in (0, 1)."""

    def __post_init__(self) -> None:
        at_least("rollout.group", self.group, 2)
        above_zero("rollout.temperature", self.temperature)
        for name in ("max_call_tokens", "max_answer_tokens"):
            at_least(f"rollout.{name}", getattr(self, name), 1)
        if not 0 < self.vllm_memory < 1:
            raise ValueError(f"rollout.vllm_memory must be in (0, 1), got {self.vllm_memory}")


@dataclass(kw_only=True)
class GrpoSettings:
    """The loss of GRPO, by TRL's names."""

    kl_weight: float = 0.0
    """beta: of the divergence from where the stage began, at least 0."""
    loss_type: str = "dapo"
    """As TRL's: 'grpo', 'dr_grpo', 'dapo', 'bnpo', 'cispo', 'sapo' or 'vespo'."""
    scale_rewards: str = "group"
    """'group', 'batch' or 'none': by what spread a reward is divided."""
    clip_low: float = 0.2
    """The ratio of new to old chance is clipped below 1 - clip_low."""
    clip_high: float = 0.2
    """And above 1 + clip_high."""
    updates_per_rollout: int = 1
    """Optimiser steps on each set of answers, at least 1."""

    def __post_init__(self) -> None:
        at_least("grpo.updates_per_rollout", self.updates_per_rollout, 1)
        one_of("grpo.loss_type", self.loss_type, LOSSES)
        one_of("grpo.scale_rewards", self.scale_rewards, SPREADS)
        within("grpo.clip_low", self.clip_low, 0, 1, closed=True)
        for name in ("kl_weight", "clip_high"):
            at_least(f"grpo.{name}", getattr(self, name), 0)


def check_rewards(
    lessons: Mapping[str, float], options: Mapping[str, float], rewards: Mapping[str, float]
) -> None:
    """Refuse rewards and lessons of GRPO that have nothing to do with each other.

    Raises:
        ValueError: If a lesson with a share has no reward with a weight, or a reward no lesson.
    """
    check_shares("rewards", rewards, REWARDS)
    asked = [name for name, share in lessons.items() if share]
    weighed = [name for name, weight in rewards.items() if weight]
    silent = [name for name in asked if not LESSONS[name].answered]
    if silent:
        raise ValueError(f"lessons must be ones that rewards can judge, got {silent[0]!r}")
    reflects = options.get("reflection", 0) > 0
    given = {name: rewards_of(name, reflects=reflects) for name in asked}
    for name, known in given.items():
        if not set(known) & set(weighed):
            raise ValueError(
                f"rewards must have one that lessons.{name} can earn, got {', '.join(weighed)}; "
                f"add one of {', '.join(known)}, or leave the lesson out"
            )
    for name in weighed:
        if not any(name in known for known in given.values()):
            raise ValueError(
                f"rewards.{name} must be one that a lesson can earn, got lessons "
                f"{', '.join(asked)}; set it to 0, or {_remedy(name)}"
            )


def _remedy(reward: str) -> str:
    """What a stage lacks in which a reward cannot be earned."""
    answered = [name for name, kind in LESSONS.items() if kind.answered]
    fitting = [name for name in answered if reward in rewards_of(name)]
    return f"add lessons.{fitting[0]}" if fitting else "set options.reflection above 0"
