"""What recorded steps learn from: the outcomes that they drew, or those that their videos imply.

Axes: B videos, S recorded steps, latents [B C T H W].
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from diffusion_rl.generators.base import AbstractVideoGenerator
from diffusion_rl.rollout import RolloutSettings, Trajectory, predict_in_chunks, retake
from diffusion_rl.shares import chunks


def implied_outcomes(trajectory: Trajectory, settings: RolloutSettings) -> Tensor:
    """Where recorded steps would have led to had they gone straight for the finished video.

    That is the mean of a step with the velocity (latent - final_latent) / sigma. If the sampler
    reverses the noising of data exactly, it is the mean of all outcomes that lie on the way from
    the latent to that video. The logarithm of a ratio is linear in the outcome, so that the noise
    which leaves no trace in the video, and which no reward can tell, is gone from it. With
    deterministic steps in between, or another spread, it is a guess at that mean.

    Args:
        trajectory: as drawn.
        settings: noise level.

    Returns:
        [S B C T H W].

    Source:
        That likelihoods of steps match noisy targets where the finished video is a clean one:
        advantage weighted matching, arXiv:2509.25050, abstract.
    """
    implied = torch.empty_like(trajectory.next_latents)
    for index in range(len(trajectory.steps)):
        sigma, _ = trajectory.levels(index, slice(None))
        far = trajectory.latents[index] - trajectory.final_latent
        velocity = far / sigma.view(-1, *[1] * (far.ndim - 1))
        implied[index] = retake(trajectory, index, slice(None), velocity, settings).mean
    return implied


@torch.no_grad()
def with_outcomes(
    generator: AbstractVideoGenerator,
    trajectory: Trajectory,
    outcomes: Tensor,
    settings: RolloutSettings,
) -> Trajectory:
    """The trajectory as if its recorded steps had led to `outcomes` [S B C T H W].

    How likely the active policy finds them is asked once more, in the passes of an update.
    """
    trajectory = replace(trajectory, next_latents=outcomes)
    parts = chunks(len(trajectory.final_latent), settings.learning_micro_batch)
    steps = []
    for index in range(len(trajectory.steps)):
        sigma, _ = trajectory.levels(index, slice(None))
        prediction = predict_in_chunks(
            *(generator, trajectory.latents[index], sigma),
            *(trajectory.embeddings, settings.learning_guidance, parts),
        )
        steps.append(retake(trajectory, index, slice(None), prediction, settings))
    return replace(
        trajectory,
        log_probs=torch.stack([step.log_prob for step in steps]).T,
        log_prob_maps=torch.stack([step.log_prob_map for step in steps]).transpose(0, 1),
    )
