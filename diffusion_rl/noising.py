"""Videos with noise, as rows of the forward process learn from them.

Axes: B videos of this process, N of the update, K denoising steps; latents [B C T H W].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_rl.generators.base import AbstractVideoGenerator
from diffusion_rl.rollout import Trajectory


class NoisedVideos(NamedTuple):
    """Final latents with noise, as flow matching adds it."""

    latent: Tensor
    """[B C T H W] (1 - sigma) * data + sigma * noise."""
    sigma: Tensor
    """[B]."""


def groups_of(trajectory: Trajectory) -> Tensor:
    """[N] long: the group of each video of the update.

    Raises:
        ValueError: it was not drawn for an update.
    """
    if trajectory.group is None:
        raise ValueError("trajectory.group must say which videos are compared, got None")
    return trajectory.group


def noise_videos(
    generator: AbstractVideoGenerator,
    trajectory: Trajectory,
    source: torch.Generator,
    of_groups: bool = False,
) -> NoisedVideos:
    """Every video, or every group, at a noise and level of its own, where what learns takes part.

    Both follow from the place among all of the update's, so that `source` moves on alike on every
    process.
    """
    data, slots, count = trajectory.final_latent, trajectory.rows, trajectory.total
    if of_groups:
        distinct, slots = groups_of(trajectory).unique(return_inverse=True)
        slots, count = slots[trajectory.rows], len(distinct)
    noise = torch.zeros(data.shape)
    for slot in range(count):
        noise[slots == slot] = torch.randn(data.shape[1:], generator=source)
    noise = noise.to(data)
    schedule = generator.learning_schedule(trajectory.sigmas)
    sigma = draw_sigmas(schedule, count, source)
    sigma = sigma[slots.to(sigma.device)]
    level = sigma.view(-1, *[1] * (data.ndim - 1))
    return NoisedVideos((1 - level) * data + level * noise, sigma)


def draw_sigmas(schedule: Tensor, count: int, source: torch.Generator) -> Tensor:
    """Noise levels [B] between those of the schedule [K+1], as dense as it is.

    One falls in each B-th of the schedule, so that an update's loss depends less on luck than
    with independent draws.
    """
    steps = len(schedule) - 1
    place = (torch.rand(count, generator=source) + torch.randperm(count, generator=source)) / count
    place = (place * steps).clamp(max=steps - 1e-3)
    weight = (place - place.long()).to(schedule)
    lower = place.long().to(schedule.device)
    return (1 - weight) * schedule[lower] + weight * schedule[lower + 1]
