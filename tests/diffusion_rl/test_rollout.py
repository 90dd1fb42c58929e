"""Rollouts: what is recorded can be replayed exactly, and batching changes nothing."""

from math import inf as INF
from math import nan as NAN

import pytest
import torch
from torch import Tensor

from diffusion_rl.generators.base import AbstractVideoGenerator
from diffusion_rl.generators.wan import WanGenerator
from diffusion_rl.lora import LoraSettings, attach_lora, trained_parameters
from diffusion_rl.recording import highest_sigma
from diffusion_rl.rollout import RolloutSettings, Trajectory, chunks, rollout
from diffusion_rl.step_losses import replay
from diffusion_rl.transitions import flow_sde
from tests.tiny_wan import SIZE, build_tiny_wan
from tests.toy_gaussian import LORA, ToyGenerator

OWN_STEPS = torch.tensor([[0, 1, 0, 2, 1], [2, 2, 1, 3, 0]])
"""Of five videos, not all in their order."""
PROMPTS = ["a red circle moves left", "the blue square"]


def draw(
    generator: AbstractVideoGenerator,
    settings: RolloutSettings,
    seeds: range = range(5),
    stochastic: tuple[int, ...] | Tensor = (0, 2),
) -> Trajectory:
    index = torch.arange(len(seeds)) % 2
    return rollout(
        generator,
        generator.encode_prompts(PROMPTS),
        index,
        seeds,
        settings,
        stochastic=stochastic,
    )


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("micro_batch", [2, 5])
@pytest.mark.parametrize("stochastic", [(0, 2), OWN_STEPS])
def test_replaying_at_unchanged_weights_gives_ratio_exactly_one(
    guidance: float, micro_batch: int, stochastic: tuple[int, ...] | Tensor
) -> None:
    generator = WanGenerator(build_tiny_wan(), **SIZE)
    attach_lora(generator.transformer, LoraSettings(rank=2, alpha=4))
    for parameter in trained_parameters(generator.transformer):
        torch.nn.init.normal_(parameter, std=0.2)
    settings = RolloutSettings(
        num_inference_steps=4, guidance_scale=guidance, micro_batch=micro_batch
    )
    trajectory = draw(generator, settings, stochastic=stochastic)
    assert trajectory.latents.dtype == trajectory.next_latents.dtype == torch.float32
    for part in chunks(5, micro_batch):
        for index in range(2):
            step = replay(generator, trajectory, index, part, settings)
            assert step.log_prob.requires_grad
            ratio = torch.exp(step.log_prob - trajectory.log_probs[part, index])
            assert torch.equal(ratio, torch.ones_like(ratio))


def test_replaying_after_the_weights_have_moved_gives_another_ratio() -> None:
    generator = ToyGenerator()
    parameters = attach_lora(generator.transformer, LORA)
    settings = RolloutSettings(num_inference_steps=4)
    trajectory = draw(generator, settings)
    torch.nn.init.normal_(parameters[1], std=0.1)
    step = replay(generator, trajectory, 0, slice(0, 5), settings)
    assert not torch.allclose(step.log_prob, trajectory.log_probs[:, 0])


def test_recorded_steps_are_those_of_the_transition() -> None:
    generator = ToyGenerator()
    settings = RolloutSettings(num_inference_steps=4, noise_level=0.5)
    trajectory = draw(generator, settings)
    assert trajectory.steps.tolist() == [[0] * 5, [2] * 5]
    assert trajectory.latents.shape == trajectory.next_latents.shape == (2, 5, 3, 4, 4, 4)
    embeddings = trajectory.embeddings
    for index, place in enumerate((0, 2)):
        sigma, next_sigma = trajectory.sigmas[place], trajectory.sigmas[place + 1]
        latent = trajectory.latents[index]
        expected = flow_sde(
            latent,
            generator.predict(latent, sigma, embeddings, 1.0),
            sigma,
            next_sigma,
            noise_level=0.5,
            sigma_max=trajectory.sigmas[1],
            next_latent=trajectory.next_latents[index],
        )
        torch.testing.assert_close(trajectory.log_probs[:, index], expected.log_prob)
        torch.testing.assert_close(trajectory.means[index], expected.mean)
    # Between the two recorded steps lies one deterministic step.
    between = trajectory.next_latents[0]
    velocity = generator.predict(between, trajectory.sigmas[1], embeddings, 1.0)
    torch.testing.assert_close(trajectory.latents[1], between - 0.25 * velocity)


@pytest.mark.parametrize("micro_batch", [2, 5])
def test_steps_of_ones_own_are_those_of_a_rollout_alone(micro_batch: int) -> None:
    """Five videos at once against each of them drawn by itself; the base must not matter."""
    generator = ToyGenerator()
    settings = RolloutSettings(num_inference_steps=4, micro_batch=micro_batch)
    together = draw(generator, settings, stochastic=OWN_STEPS)
    assert torch.equal(together.steps, OWN_STEPS.sort(dim=0).values)
    embeddings = generator.encode_prompts(PROMPTS)
    for video in range(5):
        own = sorted(OWN_STEPS[:, video].tolist())
        index = torch.tensor([video % 2])
        alone = rollout(generator, embeddings, index, [video], settings, stochastic=own)
        pairs = [(together.videos[video], alone.videos[0])]
        for name in ("latents", "next_latents", "means"):
            pairs.append((getattr(together, name)[:, video], getattr(alone, name)[:, 0]))
        for name in ("log_probs", "log_prob_maps", "final_latent"):
            pairs.append((getattr(together, name)[video], getattr(alone, name)[0]))
        for one, other in pairs:
            torch.testing.assert_close(one, other)
        for index, place in enumerate(own):
            sigma, next_sigma = together.levels(index, slice(video, video + 1))
            assert (sigma, next_sigma) == tuple(together.sigmas[place : place + 2])
    kept = together.only(torch.tensor([False, True, False, True, False]))
    assert torch.equal(kept.steps, together.steps[:, [1, 3]])


@pytest.mark.parametrize(
    ("stochastic", "message"),
    [
        (torch.zeros(2, 4, dtype=torch.long), r"or \[S 5\], got shape \(2, 4\)"),
        (torch.tensor([[1] * 5, [0, 0, 1, 0, 0]]), "a step of a video once, got one twice"),
        ((2, 0, 2), "a step of a video once, got one twice"),
        ((2, 4), r"stochastic must be places in \[0, 4\), got 2 to 4"),
        ((-1, 2), r"stochastic must be places in \[0, 4\), got -1 to 2"),
    ],
)
def test_steps_that_fit_no_video_are_refused(stochastic: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(ToyGenerator(), RolloutSettings(num_inference_steps=4), stochastic=stochastic)


def test_without_stochastic_steps_nothing_is_recorded_or_random() -> None:
    generator = ToyGenerator()
    settings = RolloutSettings(num_inference_steps=4)
    first, second = (draw(generator, settings, stochastic=()) for _ in range(2))
    assert torch.equal(first.final_latent, second.final_latent)
    assert first.latents.shape == (0, 5, 3, 4, 4, 4)
    assert first.log_probs.shape == (5, 0)
    explored = draw(generator, settings)
    assert not torch.allclose(explored.final_latent, first.final_latent)


def test_the_micro_batch_bounds_memory_not_results() -> None:
    generator = ToyGenerator()
    whole = draw(generator, RolloutSettings(num_inference_steps=4, micro_batch=5))
    parts = draw(generator, RolloutSettings(num_inference_steps=4, micro_batch=2))
    torch.testing.assert_close(whole.videos, parts.videos)
    torch.testing.assert_close(whole.log_probs, parts.log_probs)


def test_a_videos_exploration_ignores_who_shares_the_batch() -> None:
    generator = ToyGenerator()
    settings = RolloutSettings(num_inference_steps=4)
    many, few = draw(generator, settings), draw(generator, settings, seeds=range(2, 4))
    # Seeds 2 and 3 show prompts 0 and 1 in both.
    torch.testing.assert_close(many.videos[2:4], few.videos)
    assert not torch.allclose(many.videos[0], many.videos[2])
    with pytest.raises(ValueError, match="seeds must be at least 0, got -2"):
        draw(generator, settings, seeds=range(-2, 3))


@pytest.mark.parametrize("seed", [0, 7, (1 << 31) + 12345])
def test_exploration_is_independent_of_the_noise_that_a_video_begins_with(seed: int) -> None:
    """torch's CPU generator takes seeds modulo 2^32, which once made them the same noise."""
    generator = ToyGenerator()
    settings = RolloutSettings(num_inference_steps=4)
    seeds = range(seed, seed + 16)
    trajectory = draw(generator, settings, seeds=seeds, stochastic=(0, 2))
    start = generator.initial_latents(seeds).flatten()
    for index in range(2):
        explored = (trajectory.next_latents - trajectory.means)[index].flatten()
        correlation = torch.corrcoef(torch.stack([explored, start]))[0, 1]
        assert correlation.abs() < 4 / len(start) ** 0.5


class CountingGenerator(ToyGenerator):
    """Counts the videos that the transformer sees."""

    seen = 0

    def predict(self, latent: Tensor, *rest: object) -> Tensor:
        self.seen += len(latent)
        return super().predict(latent, *rest)


@pytest.mark.parametrize("stochastic", [(2, 3), (0, 3), ()])
def test_what_comes_before_the_first_stochastic_step_is_denoised_once_for_equal_seeds(
    stochastic: tuple[int, ...],
) -> None:
    generator = CountingGenerator()
    settings = RolloutSettings(num_inference_steps=5, micro_batch=4)
    index, seeds = torch.tensor([0, 0, 0, 1, 1, 1]), [7, 7, 7, 7, 7, 9]
    shared = rollout(
        generator,
        generator.encode_prompts(["plain", "bright"]),
        index,
        seeds,
        settings,
        stochastic=stochastic,
    )
    trunk = min(stochastic, default=5)
    assert generator.seen == 3 * trunk + 6 * (5 - trunk)
    assert shared.seeds == tuple(seeds)
    # A video that shares with none is what it is alone; the others share no exploration.
    rows = (5,) if stochastic else (0, 3, 5)
    alone = [
        rollout(
            generator,
            generator.encode_prompts(["plain", "bright"]),
            index[row : row + 1],
            seeds[row : row + 1],
            settings,
            stochastic=stochastic,
        )
        for row in rows
    ]
    for row, one in zip(rows, alone, strict=True):
        torch.testing.assert_close(shared.videos[row : row + 1], one.videos)
        torch.testing.assert_close(shared.log_probs[row : row + 1], one.log_probs)
    if not stochastic:
        assert torch.equal(shared.videos[0], shared.videos[1])
        return
    assert torch.equal(shared.latents[0, 0], shared.latents[0, 1])
    assert not torch.equal(shared.latents[0, 2], shared.latents[0, 3]) or trunk == 0
    drawn = (shared.next_latents - shared.means).flatten(2)
    start = generator.initial_latents([7]).flatten()
    for row in range(5):
        for other in (start, drawn[0, (row + 1) % 5], drawn[1, row]):
            correlation = torch.corrcoef(torch.stack([drawn[0, row], other]))[0, 1]
            assert correlation.abs() < 0.3  # Of 192 independent numbers: 4 standard errors.
    for step in range(len(shared.steps)):
        for part in chunks(6, settings.micro_batch):
            ratio = replay(generator, shared, step, part, settings).log_prob
            assert torch.equal(ratio, shared.log_probs[part, step])


def test_keeping_some_videos_keeps_them_whole() -> None:
    trajectory = draw(ToyGenerator(), RolloutSettings(num_inference_steps=4))
    kept = trajectory.keep(torch.tensor([False, True, False, False, True]))
    rows = [1, 4]
    assert kept.seeds == (1, 4)
    assert kept.prompt_index.tolist() == [1, 0]
    assert torch.equal(kept.latents, trajectory.latents[:, rows])
    assert torch.equal(kept.next_latents, trajectory.next_latents[:, rows])
    assert torch.equal(kept.means, trajectory.means[:, rows])
    assert torch.equal(kept.log_probs, trajectory.log_probs[rows])
    assert torch.equal(kept.final_latent, trajectory.final_latent[rows])
    assert torch.equal(kept.videos, trajectory.videos[rows])
    assert torch.equal(kept.embeddings.conditional, trajectory.embeddings.conditional[rows])


def test_chunks_cover_everything_once() -> None:
    for count in range(1, 9):
        for size in range(1, 10):
            places = [i for part in chunks(count, size) for i in range(count)[part]]
            assert places == list(range(count))
            assert all(part.stop - part.start <= size for part in chunks(count, size))


def test_the_highest_sigma_is_below_one() -> None:
    assert highest_sigma(torch.tensor([1.0, 0.8, 0.0])) == torch.tensor(0.8)
    assert highest_sigma(torch.tensor([1.0, 0.0])) == torch.tensor(0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"stochastic_steps": 0}, "stochastic_steps must be at least 1, got 0"),
        ({"prompts_per_update": 0}, "prompts_per_update must be at least 1, got 0"),
        ({"micro_batch": 0}, "micro_batch must be at least 1, got 0"),
        ({"videos_per_prompt": 1}, "videos_per_prompt must be at least 2, got 1; one video has"),
        ({"guidance_scale": 0.5}, "guidance_scale must be at least 1 and finite, got 0.5"),
        ({"guidance_scale": NAN}, "guidance_scale must be at least 1 and finite, got nan"),
        ({"guidance_scale": INF}, "guidance_scale must be at least 1 and finite, got inf"),
        ({"train_guidance": 0.5}, "train_guidance must be at least 1 and finite, got 0.5; 1 means"),
        ({"train_guidance": NAN}, "train_guidance must be at least 1 and finite, got nan"),
        ({"train_guidance": INF}, "train_guidance must be at least 1 and finite, got inf"),
        ({"noise_level": 0.0}, "noise_level must be above 0 and finite, got 0.0"),
        ({"noise_level": NAN}, "noise_level must be above 0 and finite, got nan"),
        ({"noise_level": INF}, "noise_level must be above 0 and finite, got inf"),
        ({"eligible_steps": 11}, r"eligible_steps must be in \[1, 10\], got 11"),
    ],
)
def test_settings_outside_their_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutSettings(**options)


def test_settings_derived_from_others() -> None:
    assert RolloutSettings(eligible_steps=10, stochastic_steps=10).num_eligible == 10
    assert RolloutSettings().num_eligible == 9
    assert RolloutSettings(num_inference_steps=1, stochastic_steps=1).num_eligible == 1
    assert RolloutSettings(guidance_scale=3.0).learning_guidance == 3.0
    assert RolloutSettings(guidance_scale=3.0, train_guidance=1.0).learning_guidance == 1.0
