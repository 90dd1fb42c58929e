"""What a fine-tuning run is told, what it remembers and what it reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from diffusion_rl.credit import CreditSettings
from diffusion_rl.guards import GuardSettings
from diffusion_rl.optimizers import OptimizerSettings
from diffusion_rl.prompt_sampling import PromptSamplingSettings, Statistics
from diffusion_rl.rollout import RolloutSettings
from diffusion_rl.row_kinds import AlgorithmSettings, RecordedSettings
from diffusion_rl.row_settings import GrpoSettings, MixGrpoSettings, RaftSettings
from diffusion_rl.transitions import DETERMINISTIC_AT_THE_END, name_of
from diffusion_rl.trends import Series, TrendSettings


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """What the loop needs besides its parts."""

    algorithm: AlgorithmSettings = field(default_factory=GrpoSettings)
    """A row of the table with its options."""
    credit: CreditSettings = field(default_factory=CreditSettings)
    """Where in a video its advantage goes."""
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    """How videos are drawn."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    """How the adapter moves."""
    guards: tuple[GuardSettings, ...] = ()
    """What must not fall below the base policy's level."""
    updates: int = 60
    """The loop ends after this many updates, counted over resumed runs; at least 1."""
    seed: int = 0
    """Fixes prompts, noise and noise levels of every update; at least 0."""
    missing_limit: float = 0.5
    """Share of unjudged videos at which the run stops, in [0, 1)."""
    staleness: int = 0
    """1 draws the next update's videos while this one's are judged, so that they are by the policy
    of one update earlier; only for rows that replay, whose ratios know who drew a video."""
    prompt_sampling: PromptSamplingSettings = field(default_factory=PromptSamplingSettings)
    """How the prompts of an update are chosen."""
    hacking_alarm: TrendSettings = field(default_factory=TrendSettings)
    """When something falls while the reward rises."""

    def __post_init__(self) -> None:
        if self.updates < 1:
            raise ValueError(f"updates must be at least 1, got {self.updates}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if self.optimizer.warmup_updates >= self.updates:
            raise ValueError(
                f"optimizer.warmup_updates must be below updates={self.updates}, got "
                f"{self.optimizer.warmup_updates}"
            )
        if not 0 <= self.missing_limit < 1:
            raise ValueError(f"missing_limit must be in [0, 1), got {self.missing_limit}")
        if isinstance(self.algorithm, RaftSettings) and self.credit.name != "uniform":
            raise ValueError(
                f"credit.name must be uniform with algorithm 'raft', got {self.credit.name}; no "
                "video is pushed away there, so that no fault has a place"
            )
        if self.staleness not in (0, 1):
            raise ValueError(f"staleness must be 0 or 1, got {self.staleness}")
        if self.staleness and not isinstance(self.algorithm, RecordedSettings):
            raise ValueError(
                f"staleness must be 0 with algorithm '{self.algorithm.name}', got "
                f"{self.staleness}; it records no log-probability by which a video of an earlier "
                "policy could be weighed"
            )
        if isinstance(self.algorithm, RecordedSettings):
            self._check_recorded_steps(self.algorithm)
        elif self.credit.clip != "video":
            raise ValueError(
                f"credit.clip must be left out with algorithm '{self.algorithm.name}', got "
                f"{self.credit.clip}; noised videos have no ratio at each position"
            )

    def _check_recorded_steps(self, row: RecordedSettings) -> None:
        if self.rollout.stochastic_steps > self.rollout.num_eligible:
            raise ValueError(
                f"rollout.stochastic_steps must be at most the {self.rollout.num_eligible} "
                f"eligible steps, got {self.rollout.stochastic_steps}"
            )
        if self.rollout.steps_of == "group" and isinstance(row, MixGrpoSettings):
            raise ValueError(
                "rollout.steps_of must be update with algorithm 'mix_grpo', got group; its window "
                "is that of all videos"
            )
        if self.rollout.learning_guidance != self.rollout.guidance_scale:
            raise ValueError(
                f"rollout.train_guidance must be left out with algorithm '{row.name}', "
                f"got {self.rollout.train_guidance}; a step can only be replayed as it was taken"
            )
        transition = name_of(row.transition_function)
        if transition in DETERMINISTIC_AT_THE_END and self.rollout.noise_level > 1:
            raise ValueError(
                f"rollout.noise_level must be in (0, 1] with transition '{transition}', got "
                f"{self.rollout.noise_level}; it cannot replace more noise than there is, so lower "
                "it or choose another algorithm.transition"
            )
        last = self.rollout.num_inference_steps
        if transition in DETERMINISTIC_AT_THE_END and self.rollout.num_eligible == last:
            raise ValueError(
                f"rollout.eligible_steps must be below num_inference_steps={last} with transition "
                f"'{transition}', got {self.rollout.num_eligible}; its last step adds no noise"
            )


@dataclass
class FinetuneState:
    """What an update changes besides the adapter; saved and restored by `checkpoint`."""

    optimizer: torch.optim.Optimizer
    """Over the adapter's parameters."""
    step: int = 0
    """Updates done."""
    reference_levels: dict[str, float] = field(default_factory=dict)
    """The base policy's level of every guarded statistic."""
    running_levels: dict[str, float] = field(default_factory=dict)
    """The trained policy's, as a running mean over updates."""
    history: dict[int, list[float]] = field(default_factory=dict)
    """The latest scores of each prompt by its number, for rows that compare with them."""
    prompts: Statistics = field(default_factory=dict)
    """What is known of each prompt that was drawn, by its number."""
    series: dict[str, Series] = field(default_factory=dict)
    """The latest values of what the alarm for hacking watches."""
    warned: dict[str, int] = field(default_factory=dict)
    """The update of the last such warning, by what fell."""
    ahead: dict[str, Any] = field(default_factory=dict)
    """With staleness: how the next update's videos were drawn, to draw them again: `policy`
    (weights by name), `prompts` and `policy_step`, the updates that policy had."""
    videos_generated: int = 0
    """Since the first start, those for the guards' reference levels included."""
    reward_calls: int = 0
    """Videos judged times rewards."""
    seconds: float = 0.0
    """Wall time spent in updates."""


@dataclass(frozen=True)
class StepReport:
    """One update in numbers; the field names are the metric names."""

    step: int
    """Updates done, this one included."""
    reward: float
    """Mean over judged videos of the weighted sum of rewards, guards' penalties not taken off."""
    rewards: Mapping[str, float]
    """Mean over judged videos of each reward by name, unweighted."""
    penalty: float
    """Mean over videos of what the guards took off."""
    guards: Mapping[str, float]
    """Mean of each guarded statistic, as a share of the base policy's level."""
    alarms: tuple[str, ...]
    """Guarded statistics whose mean fell below their floor."""
    hacking: tuple[str, ...]
    """What falls while the reward rises, by the trend of the latest updates: a guarded statistic,
    `rewards/NAME` or `evaluation/NAME`."""
    evaluation: Mapping[str, float]
    """Mean over judged videos of each evaluation reward by name; empty where none was due."""
    staleness: int
    """Updates that the policy had made since it drew these videos."""
    score_std: float
    """Spread over judged videos of reward minus penalty."""
    advantage_size: float
    """Mean |advantage| over videos."""
    focused_share: float
    """Share of all negative advantage that is laid on blamed regions beyond their even part, in
    [0, 1]; 0 with uniform credit."""
    focus_area: float
    """Mean over videos with a focus of the share of the latent that it is on, in (0, 1]; NaN where
    there is none."""
    tied_share: float
    """Share of groups whose judged scores are all equal, which teach nothing."""
    missing_share: float
    """Share of videos that no score exists for."""
    unanswered: int
    """Videos that rewards left unjudged because a call failed to its last retry, added up over
    rewards."""
    loss: float
    """As in UpdateStatistics."""
    ratio_deviation: float
    """As in UpdateStatistics."""
    clip_fraction: float
    """As in UpdateStatistics."""
    kl: float
    """As in UpdateStatistics."""
    grad_norm: float
    """As in UpdateStatistics."""
    skipped_steps: int
    """As in UpdateStatistics."""
    collect_seconds: float
    """Drawing and decoding the videos."""
    judge_seconds: float
    """Rewards and guards; with staleness what of it was waited for."""
    update_seconds: float
    """Gradients and optimiser steps."""
    evaluation_seconds: float
    """Drawing and judging held-out videos; 0 where none were due."""
    videos_generated: int
    """Since the first start, those for the guards' reference levels included."""
    reward_calls: int
    """Videos judged times rewards, since the first start."""
    seconds: float
    """Wall time of all updates since the first start."""
