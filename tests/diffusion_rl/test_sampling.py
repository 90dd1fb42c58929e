"""Videos to look at: the plain sampler, and the one that adds noise."""

from __future__ import annotations

import pytest
import torch

from diffusion_rl.before_after import build_samplers
from diffusion_rl.rollout import RolloutSettings, rollout
from diffusion_rl.sampling import draw_videos, sample_videos
from diffusion_rl.transitions import cps
from tests.toy_gaussian import ToyGenerator

SETTINGS = RolloutSettings(num_inference_steps=4, micro_batch=2)
INDEX, SEEDS = torch.tensor([0, 1, 0]), [5, 6, 7]


def test_sampling_needs_a_seed_for_each_prompt() -> None:
    generator = ToyGenerator()
    videos = sample_videos(generator, ["plain", "bright", "plain"], [1, 1, 2])
    assert videos.shape == (3, 4, 3, 4, 4)
    assert videos[1].mean() > videos[0].mean() + 0.05
    with pytest.raises(ValueError, match="seeds must be one for each of the 2 prompts, got 1"):
        sample_videos(generator, ["plain", "bright"], [1])


def test_without_noise_it_is_the_plain_rollout() -> None:
    generator = ToyGenerator()
    embeddings = generator.encode_prompts(["plain", "bright"])
    plain = rollout(generator, embeddings, INDEX, SEEDS, SETTINGS).videos
    assert torch.equal(draw_videos(generator, embeddings, INDEX, SEEDS, SETTINGS), plain)


def test_with_noise_every_step_but_the_last_adds_some() -> None:
    """By a loop over the steps, with the noise that each video explores by."""
    generator = ToyGenerator()
    embeddings = generator.encode_prompts(["plain", "bright"])
    found = draw_videos(generator, embeddings, INDEX, SEEDS, SETTINGS, 0.6)
    steps = rollout(
        *(generator, embeddings, INDEX, SEEDS),
        RolloutSettings(num_inference_steps=4, micro_batch=2, noise_level=0.6),
        transition=cps,
        stochastic=(0, 1, 2),
    )
    assert torch.equal(found, steps.videos)
    kept = rollout(
        *(generator, embeddings, INDEX, SEEDS, SETTINGS),
        **{"transition": cps, "stochastic": (0, 1), "keep": False},
    )
    assert kept.latents.numel() == kept.log_probs.numel() == len(kept.steps) == 0
    sigmas, latent = generator.sigmas(4), generator.initial_latents(SEEDS)
    for place in range(4):
        velocity = generator.predict(latent, sigmas[place], embeddings[INDEX], 1.0)
        data = latent - sigmas[place] * velocity
        noise = latent + (1 - sigmas[place]) * velocity
        std = sigmas[place + 1] * torch.sin(torch.tensor(0.3 * torch.pi))
        mean = (1 - sigmas[place + 1]) * data + (sigmas[place + 1] ** 2 - std**2).sqrt() * noise
        if place == 3:
            latent = mean
            break
        drawn = (steps.next_latents[place] - mean) / std
        assert abs(drawn.mean().item()) < 0.3
        assert abs(drawn.std().item() - 1) < 0.3
        latent = steps.next_latents[place]
    torch.testing.assert_close(generator.decode(latent.detach()), found)


def test_a_seed_draws_the_same_noise_in_any_batch() -> None:
    generator = ToyGenerator()
    options = {"num_inference_steps": 4, "noise_level": 0.7}
    together = sample_videos(generator, ["plain", "bright"], [3, 4], **options)
    alone = sample_videos(generator, ["bright"], [4], **options)
    torch.testing.assert_close(together[1:], alone)
    assert not torch.allclose(alone, sample_videos(generator, ["bright"], [4]))
    sampler = build_samplers(
        generator, ["bright"], RolloutSettings(num_inference_steps=4), noise_level=0.7
    )["base"]
    torch.testing.assert_close(sampler(["bright"], [4]), alone)


@pytest.mark.parametrize(
    ("steps", "noise_level", "message"),
    [
        (4, 1.5, r"noise_level must be in \[0, 1\], got 1.5; 0 means plain steps"),
        (4, -0.1, r"noise_level must be in \[0, 1\], got -0.1"),
        (4, float("nan"), r"noise_level must be in \[0, 1\], got nan"),
        (1, 0.5, "noise_level must be 0 with one denoising step, got 0.5; the last one adds no"),
    ],
)
def test_noise_that_cannot_be_drawn_is_refused(
    steps: int, noise_level: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sample_videos(
            ToyGenerator(), ["plain"], [1], num_inference_steps=steps, noise_level=noise_level
        )
