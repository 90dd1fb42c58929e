"""Videos to look at and to measure, drawn without learning from them.

Axes: N prompts, B videos [B F C H W].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diffusion_rl.generators.base import AbstractVideoGenerator, PromptEmbeddings
from diffusion_rl.rollout import RolloutSettings, rollout
from diffusion_rl.transitions import cps


def draw_videos(
    generator: AbstractVideoGenerator,
    embeddings: PromptEmbeddings,
    prompt_index: Tensor,
    seeds: Sequence[int],
    settings: RolloutSettings,
    noise_level: float = 0.0,
) -> Tensor:
    """Videos [B F C H W] to look at, not to learn from.

    Args:
        generator: the policy.
        embeddings: [N ...] of the prompts.
        prompt_index: [B] long into `embeddings`.
        seeds: B integers.
        settings: steps, guidance and micro batch.
        noise_level: of coefficients-preserving steps, which then take the place of all plain steps
            but the last; in [0, 1]. Generators that learnt by `awm` may draw better with it.

    Raises:
        ValueError: the noise level is outside its range, or no step could take it.
    """
    drawn = (generator, embeddings, prompt_index, seeds)
    check_noise_level(noise_level, settings)
    if not noise_level:
        return rollout(*drawn, settings).videos
    noisy = range(settings.num_inference_steps - 1)
    settings = replace(settings, noise_level=noise_level)
    return rollout(*drawn, settings, transition=cps, stochastic=noisy, keep=False).videos


def check_noise_level(noise_level: float, settings: RolloutSettings) -> None:
    """Refuse a noise level that `draw_videos` could not draw with.

    Raises:
        ValueError: it is outside its range, or no step could take it.
    """
    if not 0 <= noise_level <= 1:
        raise ValueError(f"noise_level must be in [0, 1], got {noise_level}; 0 means plain steps")
    if noise_level and settings.num_inference_steps == 1:
        raise ValueError(
            f"noise_level must be 0 with one denoising step, got {noise_level}; the last one adds "
            "no noise, so raise rollout.num_inference_steps"
        )


def sample_videos(
    generator: AbstractVideoGenerator,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_inference_steps: int = 10,
    guidance_scale: float = 1.0,
    micro_batch: int = 16,
    noise_level: float = 0.0,
) -> Tensor:
    """Videos [B F C H W] for prompts and seeds of equal number, as `draw_videos` has them.

    Needs the text encoder; each distinct prompt is encoded once.
    """
    if len(prompts) != len(seeds):
        raise ValueError(
            f"seeds must be one for each of the {len(prompts)} prompts, got {len(seeds)}"
        )
    distinct = list(dict.fromkeys(prompts))
    settings = RolloutSettings(
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        micro_batch=micro_batch,
    )
    index = torch.tensor([distinct.index(prompt) for prompt in prompts])
    embeddings = generator.encode_prompts(distinct)
    return draw_videos(generator, embeddings, index, seeds, settings, noise_level)
