"""Draw the videos of one update; everything random follows from the seed and its number.

Axes: B videos, K denoising steps.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion_rl.algorithms import algorithm
from diffusion_rl.generators.base import AbstractVideoGenerator, PromptEmbeddings
from diffusion_rl.lora import old_policy
from diffusion_rl.progress import FinetuneSettings
from diffusion_rl.rollout import Trajectory, rollout

# Seeds of training videos start here, so that small seeds stay unseen for evaluation.
FIRST_TRAINING_SEED = 1 << 31


class Batch(NamedTuple):
    """One update's videos; every field follows from the settings' seed and the update's number."""

    trajectory: Trajectory
    """What was drawn."""
    group: Tensor
    """[B] long: videos of one group share a prompt slot."""


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
