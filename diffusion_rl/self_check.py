"""Before anything is learnt: does replaying a step give back what was recorded?

A ratio that is not 1 at unchanged weights is the commonest silent fault of this method.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffusion_rl.credit import Credit
from diffusion_rl.generators.base import AbstractVideoGenerator, PromptEmbeddings
from diffusion_rl.rollout import RolloutSettings, eligible_steps, rollout
from diffusion_rl.row_kinds import AlgorithmSettings, ClippedSettings, RecordedSettings
from diffusion_rl.shares import chunks
from diffusion_rl.step_losses import replay, surrogate_of

# Rounding may differ between a pass with and one without gradient, never by this much.
MAX_NOISE = 0.05


@dataclass(frozen=True)
class SelfCheck:
    """Ratios at a learning rate of zero."""

    ratio_deviation: float
    """Largest |ratio - 1|: the numerical noise of the log-probability; 0 on an exact replay. Of
    ratios whose clip range is widened, as it would be of whole latents."""
    clip_fraction: float
    """Share of ratios outside the clip range; 0 in a run that may start."""
    videos: int
    """Videos drawn for the check."""


def self_check(
    generator: AbstractVideoGenerator,
    embeddings: PromptEmbeddings,
    settings: AlgorithmSettings,
    options: RolloutSettings,
    clip: str = "video",
) -> SelfCheck:
    """Record one micro batch, replay it with gradient on, and compare.

    Rows of the table that record no steps have nothing to compare; their check is empty.

    Raises:
        ValueError: The clip range is below the noise, so numerics alone would clip.
        RuntimeError: The replay is another step altogether.
    """
    if not isinstance(settings, RecordedSettings):
        return SelfCheck(0.0, 0.0, 0)
    count = min(options.micro_batch, options.prompts_per_update * options.videos_per_prompt)
    stochastic = eligible_steps(generator, options)[-options.stochastic_steps :]
    trajectory = rollout(
        generator,
        embeddings,
        torch.arange(count) % len(embeddings),
        range(count),
        options,
        transition=settings.transition_function,
        stochastic=stochastic,
    )
    ones = Credit(torch.ones(count), clip=clip)
    checked = [
        surrogate_of(
            replay(generator, trajectory, index, part, options),
            *(trajectory, index, part, ones, settings),
        )
        for part in chunks(count, options.learning_micro_batch)
        for index in range(len(trajectory.steps))
    ]
    widths = ones.widths(trajectory.log_prob_maps[0, 0].numel())
    log_ratios = torch.cat([one.log_ratios.flatten() for one in checked])
    if widths is not None:
        log_ratios = log_ratios / widths[0, 0]
    deviation = (torch.exp(log_ratios) - 1).abs()
    noise = deviation.max().item()
    if not noise < MAX_NOISE:
        raise RuntimeError(
            f"replaying a step must give ratio 1 at unchanged weights, got {1 + noise:.3g}; the "
            "generator's predict must not depend on anything but its arguments (dropout on?)"
        )
    if isinstance(settings, ClippedSettings):
        narrowest = min(settings.clip_range, settings.clip_range_high or settings.clip_range)
        if narrowest <= noise:
            raise ValueError(
                f"clip_range must be above the numerical noise of the ratio, {noise:.1e}, got "
                f"{narrowest}; raise algorithm.clip_range or use generator.dtype=float32"
            )
    clipped = torch.cat([one.outside.flatten() for one in checked]).double().mean().item()
    if clipped:
        raise ValueError(
            f"divergence_limit must be above the numerical noise of a replay, got a limit that "
            f"{clipped:.0%} of the steps pass at unchanged weights; raise algorithm."
            "divergence_limit or use generator.dtype=float32"
        )
    return SelfCheck(noise, clipped, count)
