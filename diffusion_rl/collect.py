"""Draw the videos of one update; everything random follows from the seed and its number.

Axes: B videos of this process, N of the update, K denoising steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_rl.algorithms import algorithm
from diffusion_rl.generators.base import AbstractVideoGenerator, PromptEmbeddings
from diffusion_rl.outcomes import implied_outcomes, with_outcomes
from diffusion_rl.policies import old_policy
from diffusion_rl.processes import gather_rows
from diffusion_rl.progress import FinetuneSettings
from diffusion_rl.prompt_sampling import choose_prompts, update_source
from diffusion_rl.rollout import Trajectory, eligible_steps, rollout
from diffusion_rl.row_kinds import RecordedSettings
from diffusion_rl.row_settings import MixGrpoSettings
from diffusion_rl.shares import own_share

# Seeds of training videos start here, so that small seeds stay unseen for evaluation.
FIRST_TRAINING_SEED = 1 << 31


class Batch(NamedTuple):
    """One update's videos; every field follows from the settings' seed and the update's number."""

    trajectory: Trajectory
    """What this process drew."""
    group: Tensor
    """[N] long: videos of one group share a prompt slot."""
    prompt_index: Tensor
    """[N] long: which prompt each shows."""
    seeds: tuple[int, ...]
    """N, one for each video."""

    @property
    def own_group(self) -> Tensor:
        """[B] long: the group of what was drawn here."""
        return self.group[self.trajectory.rows]

    def gather(self, own: Tensor) -> Tensor:
        """Put [B ...] of each process together as [N ...], in the videos' order."""
        return gather_rows(own, self.trajectory.rows, self.trajectory.total)


def collect(
    generator: AbstractVideoGenerator,
    embeddings: PromptEmbeddings,
    settings: FinetuneSettings,
    *,
    step: int,
    prompts: Tensor | None = None,
) -> Batch:
    """Draw this process's share of the videos of update `step`.

    Prompts, seeds and stochastic steps of all of them follow from the settings' seed and `step`,
    whatever the number of processes.

    Args:
        generator: draws with its active policy, or its old one.
        embeddings: of all prompts.
        settings: of the run.
        step: number of the update, from 1; 0 is drawn by the base.
        prompts: [groups] long, the prompt of each group; None goes through them in passes.
    """
    source = update_source(settings.seed, step)
    options = settings.rollout
    groups, members = options.prompts_per_update, options.videos_per_prompt
    chosen = prompts
    if chosen is None:
        chosen = choose_prompts(len(embeddings), groups, settings.seed, step)
    group = torch.arange(groups).repeat_interleave(members)
    seeds = torch.randint(1 << 31, (groups * members,), generator=source) + FIRST_TRAINING_SEED
    if options.shared_noise:
        seeds = seeds[::members].repeat_interleave(members)
    prompt_index = chosen[group]
    row = algorithm(settings.algorithm.name)
    slow = row.old_policy == "draws" and step > 0
    transition, steps, inner_steps = row.transition, torch.zeros(0, dtype=torch.long), 1
    if isinstance(settings.algorithm, RecordedSettings):
        transition = settings.algorithm.transition_function
        steps = steps_of_videos(settings, step, source, group, eligible_steps(generator, options))
        inner_steps = settings.algorithm.inner_steps
    with old_policy(generator.transformer) if slow else nullcontext():
        trajectory = rollout(
            generator,
            embeddings,
            prompt_index,
            seeds.tolist(),
            options,
            transition=transition,
            stochastic=steps,
            share=own_share(len(group), options.micro_batch, inner_steps),
        )
    trajectory = replace(trajectory, group=group)
    if len(trajectory.steps) and options.outcome == "implied":
        implied = implied_outcomes(trajectory, options)
        trajectory = with_outcomes(generator, trajectory, implied, options)
    return Batch(trajectory, group, prompt_index, tuple(seeds.tolist()))


def steps_of_videos(
    settings: FinetuneSettings,
    step: int,
    source: torch.Generator,
    group: Tensor,
    eligible: Sequence[int],
) -> Tensor:
    """Places [S N] long of the stochastic steps of each of update `step`'s videos, in groups [N];
    [S] where they are those of all."""
    if settings.rollout.steps_of == "update":
        return torch.tensor(choose_steps(settings, step, source, eligible))
    count = settings.rollout.prompts_per_update
    chosen = [choose_steps(settings, step, source, eligible) for _ in range(count)]
    return torch.tensor(chosen).T[:, group]


def choose_steps(
    settings: FinetuneSettings, step: int, source: torch.Generator, eligible: Sequence[int]
) -> list[int]:
    """Places of update `step`'s stochastic steps among the eligible; there are always as many."""
    count = settings.rollout.stochastic_steps
    own = settings.algorithm
    if not isinstance(own, MixGrpoSettings):
        chosen = torch.randperm(len(eligible), generator=source)[:count]
        return sorted(eligible[place] for place in chosen.tolist())
    last = len(eligible) - count
    turn = max(step - 1, 0) // own.updates_per_window
    if own.window == "random":
        source = update_source(settings.seed, turn, purpose=3)
        first = int(torch.randint(last + 1, (), generator=source))
    else:
        starts = [*range(0, last, own.window_stride), last]
        first = starts[turn % len(starts)]
    return list(eligible[first : first + count])
