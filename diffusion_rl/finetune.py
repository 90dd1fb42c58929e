"""The loop: draw videos, judge them, move the adapter; one StepReport for each update.

Axes: B videos, K denoising steps, S recorded ones.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion_rl.advantages import missing_share, tied_share
from diffusion_rl.algorithms import algorithm
from diffusion_rl.generators.base import AbstractVideoGenerator, PromptEmbeddings
from diffusion_rl.guards import GuardReport, GuardSettings, apply_guards, measure_reference
from diffusion_rl.lora import old_policy, reference_policy, trained_parameters, update_old_policy
from diffusion_rl.rewards import JudgedBatch, Reward, judge_videos
from diffusion_rl.rollout import RolloutSettings, Trajectory, rollout
from diffusion_rl.self_check import self_check
from diffusion_rl.updates import (
    AlgorithmSettings,
    GrpoSettings,
    NftSettings,
    OptimizerSettings,
    UpdateStatistics,
    build_optimizer,
    update_policy,
)

logger = logging.getLogger(__name__)

# Seeds of training videos start here, so that small seeds stay unseen for evaluation.
FIRST_TRAINING_SEED = 1 << 31


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """What the loop needs besides its parts."""

    algorithm: AlgorithmSettings = field(default_factory=GrpoSettings)
    """A row of the table with its options."""
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

    def __post_init__(self) -> None:
        if self.updates < 1:
            raise ValueError(f"updates must be at least 1, got {self.updates}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if not 0 <= self.missing_limit < 1:
            raise ValueError(f"missing_limit must be in [0, 1), got {self.missing_limit}")
        replays = algorithm(self.algorithm.name).learning_steps == "recorded"
        if replays and self.rollout.learning_guidance != self.rollout.guidance_scale:
            raise ValueError(
                f"rollout.train_guidance must be left out with algorithm '{self.algorithm.name}', "
                f"got {self.rollout.train_guidance}; a step can only be replayed as it was taken"
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
    videos_generated: int = 0
    """Since the first start, those for the guards' reference levels included."""
    reward_calls: int = 0
    """Videos judged times rewards."""
    seconds: float = 0.0
    """Wall time spent in updates."""


class Batch(NamedTuple):
    """One update's videos; every field follows from the settings' seed and the update's number."""

    trajectory: Trajectory
    """What was drawn."""
    group: Tensor
    """[B] long: videos of one group share a prompt slot."""


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
    score_std: float
    """Spread over judged videos of reward minus penalty."""
    advantage_size: float
    """Mean |advantage| over videos."""
    tied_share: float
    """Share of groups whose judged scores are all equal, which teach nothing."""
    missing_share: float
    """Share of videos that no score exists for."""
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
    collect_seconds: float
    """Drawing and decoding the videos."""
    judge_seconds: float
    """Rewards and guards."""
    update_seconds: float
    """Gradients and optimiser steps."""
    videos_generated: int
    """Since the first start, those for the guards' reference levels included."""
    reward_calls: int
    """Videos judged times rewards, since the first start."""
    seconds: float
    """Wall time of all updates since the first start."""


def begin(generator: AbstractVideoGenerator, settings: FinetuneSettings) -> FinetuneState:
    """The state before the first update; the adapter must be attached."""
    parameters = trained_parameters(generator.transformer)
    if not parameters:
        raise ValueError("generator must carry a LoRA, got none; call attach_lora first")
    return FinetuneState(build_optimizer(parameters, settings.optimizer))


def finetune(
    generator: AbstractVideoGenerator,
    rewards: Sequence[Reward],
    prompts: Sequence[str],
    settings: FinetuneSettings,
    state: FinetuneState | None = None,
    embeddings: PromptEmbeddings | None = None,
) -> Iterator[StepReport]:
    """Yield one report for each update until `settings.updates` are done.

    Between two reports generator and state are whole: the caller may save, stop or go on.

    Args:
        generator: with an adapter from `attach_lora` (and the old policy, where the row uses it).
        rewards: at least one.
        prompts: at least one text.
        settings: everything else.
        state: where to go on from; None begins.
        embeddings: of the prompts, if they are known already; else they are encoded here, once.
    """
    if not prompts:
        raise ValueError("prompts must be at least one text, got none")
    state = begin(generator, settings) if state is None else state
    embeddings = generator.encode_prompts(prompts) if embeddings is None else embeddings
    check = self_check(generator, embeddings, settings.algorithm, settings.rollout)
    if check.videos:
        logger.info("self-check: ratio 1 within %.1e on replay", check.ratio_deviation)
    state.videos_generated += check.videos if state.step == 0 else 0
    if settings.guards and not state.reference_levels:
        with reference_policy(generator.transformer):
            batch = collect(generator, embeddings, settings, step=0)
        state.reference_levels = measure_reference(
            settings.guards, batch.trajectory.videos, batch.group
        )
        state.videos_generated += len(batch.group)
    while state.step < settings.updates:
        started = time.monotonic()
        batch = collect(generator, embeddings, settings, step=state.step + 1)
        collected = time.monotonic()
        texts = [prompts[index] for index in batch.trajectory.prompt_index.tolist()]
        judged, guarded = judge(generator, rewards, batch, texts, settings, state)
        judged_at = time.monotonic()
        score = judged.score - guarded.penalty
        advantages = compare(score, batch.group, settings.algorithm)
        statistics = update(generator, batch.trajectory, score, advantages, settings, state)
        ended = time.monotonic()
        state.step += 1
        state.videos_generated += len(score)
        state.reward_calls += len(score) * len(rewards)
        state.seconds += ended - started
        yield StepReport(
            step=state.step,
            reward=_mean(judged.score),
            rewards={name: _mean(one.score) for name, one in judged.judgements.items()},
            penalty=guarded.penalty.mean().item(),
            guards={
                name: level / state.reference_levels[name] for name, level in guarded.levels.items()
            },
            alarms=guarded.alarms,
            score_std=score[~score.isnan()].std(correction=0).item(),
            advantage_size=advantages.abs().mean().item(),
            tied_share=tied_share(score, batch.group),
            missing_share=missing_share(score),
            **dataclasses.asdict(statistics),
            collect_seconds=collected - started,
            judge_seconds=judged_at - collected,
            update_seconds=ended - judged_at,
            videos_generated=state.videos_generated,
            reward_calls=state.reward_calls,
            seconds=state.seconds,
        )


def collect(
    generator: AbstractVideoGenerator,
    embeddings: PromptEmbeddings,
    settings: FinetuneSettings,
    *,
    step: int,
) -> Batch:
    """Draw the videos of update `step`, which fixes prompts, seeds and stochastic steps."""
    source = update_source(settings.seed, step)
    options = settings.rollout
    groups, members = options.prompts_per_update, options.videos_per_prompt
    chosen = choose_prompts(len(embeddings), groups, settings.seed, step)
    group = torch.arange(groups).repeat_interleave(members)
    seeds = torch.randint(1 << 31, (groups * members,), generator=source) + FIRST_TRAINING_SEED
    row = algorithm(settings.algorithm.name)
    steps: list[int] = []
    if row.learning_steps == "recorded":
        order = torch.randperm(options.num_eligible, generator=source)
        steps = sorted(order[: options.stochastic_steps].tolist())
    slow = row.uses_old_policy and step > 0
    with old_policy(generator.transformer) if slow else nullcontext():
        trajectory = rollout(
            generator,
            embeddings,
            chosen[group],
            seeds.tolist(),
            options,
            transition=row.transition,
            stochastic=steps,
        )
    return Batch(trajectory, group)


def judge(
    generator: AbstractVideoGenerator,
    rewards: Sequence[Reward],
    batch: Batch,
    prompts: Sequence[str],
    settings: FinetuneSettings,
    state: FinetuneState,
) -> tuple[JudgedBatch, GuardReport]:
    """Ask the rewards and the guards about the videos."""
    videos = batch.trajectory.videos
    judged = judge_videos(
        rewards, videos, prompts, fps=generator.fps, missing_limit=settings.missing_limit
    )
    return judged, apply_guards(settings.guards, state.reference_levels, videos, batch.group)


def compare(score: Tensor, group: Tensor, settings: AlgorithmSettings) -> Tensor:
    """Advantages [B] the way the row forms them; 0 for videos not judged."""
    return algorithm(settings.name).advantages(
        score, group, std=settings.advantage_std, clip=settings.advantage_clip
    )


def update(
    generator: AbstractVideoGenerator,
    trajectory: Trajectory,
    score: Tensor,
    advantages: Tensor,
    settings: FinetuneSettings,
    state: FinetuneState,
) -> UpdateStatistics:
    """Move the adapter, and the old policy after it; unjudged videos teach nothing."""
    judged = ~score.isnan()
    if not bool(judged.all()):
        trajectory, advantages = trajectory.keep(judged), advantages[judged]
    statistics = update_policy(
        generator,
        trajectory,
        advantages,
        settings.algorithm,
        settings.rollout,
        state.optimizer,
        update_source(settings.seed, state.step + 1, purpose=1),
    )
    if isinstance(settings.algorithm, NftSettings):
        decay = settings.algorithm.old_decay(state.step + 1)
        update_old_policy(generator.transformer, decay)
    return statistics


def update_source(seed: int, step: int, purpose: int = 0) -> torch.Generator:
    """Random numbers of one update, the same whether or not the run was interrupted before."""
    words = np.random.SeedSequence((seed, step, purpose)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))


def choose_prompts(count: int, wanted: int, seed: int, step: int) -> Tensor:
    """Which of `count` prompts update `step` uses: shuffled passes over all of them."""
    first = max(step - 1, 0) * wanted
    places = range(first, first + wanted)
    orders = {
        turn: torch.randperm(count, generator=update_source(seed, turn, purpose=2))
        for turn in {place // count for place in places}
    }
    return torch.stack([orders[place // count][place % count] for place in places])


def _mean(score: Tensor) -> float:
    """Over judged videos; NaN where there are none."""
    return score[~score.isnan()].mean().item()
