"""Implied outcomes, against the chain of noising that ancestral sampling reverses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from diffusion_rl.collect import collect
from diffusion_rl.credit import Credit
from diffusion_rl.finetune import FinetuneSettings
from diffusion_rl.lora import attach_lora
from diffusion_rl.outcomes import implied_outcomes, with_outcomes
from diffusion_rl.policies import trained_parameters
from diffusion_rl.rollout import RolloutSettings, Trajectory, rollout
from diffusion_rl.row_settings import GrpoSettings
from diffusion_rl.step_losses import StepInputs, optimizer_steps
from diffusion_rl.transitions import TRANSITIONS, TransitionFunction, cps, ddim, flow_sde
from diffusion_rl.updates import accumulate
from tests.toy_gaussian import LORA, ToyGenerator


def draw(take: TransitionFunction, settings: RolloutSettings, videos: int) -> Trajectory:
    """Videos of the exact Gaussian, exploring in all steps but the last."""
    generator = ToyGenerator()
    prompt = generator.encode_prompts(["bright"])
    places = (torch.zeros(videos, dtype=torch.long), range(videos))
    steps = range(settings.num_inference_steps - 1)
    return rollout(generator, prompt, *places, settings, transition=take, stochastic=steps)


def slope(drawn: Trajectory, settings: RolloutSettings, steps: slice) -> float:
    """Least squares of the noise drawn in some steps on what the videos imply of it."""
    implied = (implied_outcomes(drawn, settings) - drawn.means)[steps].double()
    noise = (drawn.next_latents - drawn.means)[steps].double()
    return ((implied * noise).sum() / implied.square().sum()).item()


def correlation(drawn: Trajectory, settings: RolloutSettings, step: int) -> float:
    """Of the noise drawn in a step with what the videos imply of it."""
    pair = (implied_outcomes(drawn, settings) - drawn.means, drawn.next_latents - drawn.means)
    return torch.cosine_similarity(*(one[step].flatten().double() for one in pair), dim=0).item()


def test_the_implied_outcome_is_the_mean_of_all_on_the_way_to_the_video() -> None:
    # In the chain that ancestral sampling reverses a latent is shrunk and gets noise: what lies
    # between a latent and the data is Gaussian, with the mean of two densities' product.
    settings = RolloutSettings(num_inference_steps=6, stochastic_steps=5, noise_level=1.0)
    drawn = draw(ddim, settings, videos=8)
    implied = implied_outcomes(drawn, settings)
    for index, place in enumerate(drawn.steps[:, 0].tolist()):
        high, low = drawn.sigmas[place : place + 2].double()
        shrunk = (1 - high) / (1 - low)
        added = high**2 - shrunk**2 * low**2
        prior, data = low**2, drawn.final_latent.double()
        # N(outcome; (1 - low) data, low^2) times N(latent; shrunk outcome, added).
        precision = 1 / prior + shrunk**2 / added
        mean = (1 - low) * data / prior + shrunk * drawn.latents[index].double() / added
        assert torch.allclose(implied[index].double(), mean / precision, rtol=0, atol=1e-5)


def test_the_noise_of_exact_steps_is_on_average_what_videos_imply() -> None:
    # With this level Flow-SDE reverses the noising of flow matching; small steps, not infinitely.
    settings = RolloutSettings(num_inference_steps=100, stochastic_steps=99, noise_level=2**0.5)
    late = slice(20, None)
    assert 0.9 < slope(draw(flow_sde, settings, videos=500), settings, late) < 1.1
    other = dataclasses.replace(settings, noise_level=0.7)
    assert slope(draw(flow_sde, other, videos=500), other, late) > 1.2


def test_a_video_tells_nothing_of_noise_that_was_replaced() -> None:
    # Where every step replaces all noise, nothing of the first one's is left.
    settings = RolloutSettings(num_inference_steps=20, stochastic_steps=19, noise_level=1.0)
    drawn = draw(cps, settings, videos=1000)
    assert correlation(drawn, settings, 0) == pytest.approx(0, abs=0.01)
    assert correlation(drawn, settings, 18) > 0.5


@pytest.mark.parametrize("name", [one for one in TRANSITIONS if one != "ode"])
def test_the_outcomes_that_were_drawn_are_as_likely_as_before(name: str) -> None:
    settings = RolloutSettings(num_inference_steps=5, micro_batch=3)
    drawn = draw(TRANSITIONS[name], settings, videos=8)
    generator = ToyGenerator()
    again = with_outcomes(generator, drawn, drawn.next_latents, settings)
    assert torch.equal(again.log_probs, drawn.log_probs)
    assert torch.equal(again.log_prob_maps, drawn.log_prob_maps)
    implied = with_outcomes(generator, drawn, implied_outcomes(drawn, settings), settings)
    assert torch.equal(implied.means, drawn.means)
    assert torch.equal(implied.videos, drawn.videos)
    # They are nearer to the mean than what was drawn, noise that left no trace aside.
    assert (implied.log_probs.mean(0) > drawn.log_probs.mean(0)).all()


def gradient(generator: ToyGenerator, trajectory: Trajectory, settings: RolloutSettings) -> Tensor:
    advantages = torch.linspace(-1, 1, trajectory.total)
    own, source = GrpoSettings(), torch.Generator().manual_seed(0)
    for step in optimizer_steps(generator, trajectory, own, settings, source):
        accumulate(generator, StepInputs(trajectory, Credit(advantages), own, settings, step))
    found = [one.grad for one in trained_parameters(generator.transformer)]
    for one in trained_parameters(generator.transformer):
        one.grad = None
    return torch.cat([torch.zeros(0) if one is None else one.flatten() for one in found])


def test_the_gradient_is_linear_in_the_outcome() -> None:
    # This is why a mean of outcomes gives the mean of gradients.
    settings = RolloutSettings(num_inference_steps=4)
    drawn = draw(flow_sde, settings, videos=6)
    generator = ToyGenerator()
    attach_lora(generator.transformer, LORA)
    implied = implied_outcomes(drawn, settings)
    between = (drawn.next_latents + implied) / 2
    first, second, middle = (
        gradient(generator, with_outcomes(generator, drawn, one, settings), settings)
        for one in (drawn.next_latents, implied, between)
    )
    assert torch.allclose((first + second) / 2, middle, rtol=0, atol=1e-6)
    assert (first - middle).abs().max() > 1e-4


def test_an_update_learns_from_the_outcomes_that_are_asked_for() -> None:
    generator = ToyGenerator()
    attach_lora(generator.transformer, LORA)
    prompts = generator.encode_prompts(["plain"])
    own = RolloutSettings(num_inference_steps=5)
    drawn, implied = (
        collect(
            *(generator, prompts),
            FinetuneSettings(
                algorithm=GrpoSettings(), rollout=dataclasses.replace(own, outcome=outcome)
            ),
            step=1,
        ).trajectory
        for outcome in ("drawn", "implied")
    )
    assert torch.equal(implied.videos, drawn.videos)
    assert torch.equal(implied.next_latents, implied_outcomes(drawn, own))
    assert not torch.equal(implied.log_probs, drawn.log_probs)
    with pytest.raises(ValueError, match=r"^outcome must be one of drawn, implied, got 'video'$"):
        RolloutSettings(outcome="video")
