"""The loop solves a problem with a known answer, and runs away from it when the sign is flipped.

Clips are grey on average; the reward is highest where the red channel's mean is TARGET. All numbers
below were the worst of several seeds, rounded to the safe side.
"""

import pytest
import torch
from torch import Tensor

from diffusion_rl.finetune import FinetuneSettings, StepReport, finetune
from diffusion_rl.lora import attach_lora
from diffusion_rl.optimizers import OptimizerSettings
from diffusion_rl.rewards import Reward
from diffusion_rl.rollout import RolloutSettings, sample_videos
from diffusion_rl.row_settings import GrpoSettings, NftSettings
from tests.toy_gaussian import LORA, ToyGenerator

TARGET = 0.6
ALGORITHMS = {
    "grpo": (GrpoSettings(clip_range=0.02, inner_steps=2), 2e-2),
    "nft": (NftSettings(kl_weight=0.0), 5e-3),
}


def redness(videos: Tensor) -> Tensor:
    return videos[:, :, 0].mean((1, 2, 3))


def learn(name: str, sign: float, updates: int = 60) -> tuple[ToyGenerator, list[StepReport]]:
    """Train on sign * -(redness - TARGET)^2."""
    settings, learning_rate = ALGORITHMS[name]
    generator = ToyGenerator()
    attach_lora(generator.transformer, LORA, old_policy=name == "nft")

    def reward(videos: Tensor, prompts: list[str], *, fps: float) -> Tensor:
        return -sign * (redness(videos) - TARGET) ** 2

    reports = finetune(
        generator,
        [Reward("red", reward)],
        ["plain"],
        FinetuneSettings(
            algorithm=settings,
            rollout=RolloutSettings(
                num_inference_steps=6, stochastic_steps=3, prompts_per_update=4, micro_batch=16
            ),
            optimizer=OptimizerSettings(learning_rate=learning_rate),
            updates=updates,
        ),
    )
    return generator, list(reports)


def mean_redness(generator: ToyGenerator) -> float:
    videos = sample_videos(generator, ["plain"] * 64, range(64), num_inference_steps=6)
    return redness(videos).mean().item()


def test_the_base_generator_is_grey() -> None:
    generator = ToyGenerator()
    attach_lora(generator.transformer, LORA)
    assert mean_redness(generator) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_loop_reaches_the_best_answer(name: str) -> None:
    generator, reports = learn(name, sign=1.0)
    assert abs(mean_redness(generator) - TARGET) < 0.02
    first = sum(report.reward for report in reports[:5]) / 5
    last = sum(report.reward for report in reports[-5:]) / 5
    assert last > first / 3  # Rewards are negative: a third of the squared distance or less.


@pytest.mark.parametrize("name", ALGORITHMS)
def test_with_the_sign_flipped_the_loop_runs_away(name: str) -> None:
    generator, _ = learn(name, sign=-1.0, updates=30)
    assert abs(mean_redness(generator) - TARGET) > 0.13


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_reward_that_ties_teaches_nothing(name: str) -> None:
    settings, learning_rate = ALGORITHMS[name]
    generator = ToyGenerator()
    attach_lora(generator.transformer, LORA, old_policy=name == "nft")
    before = mean_redness(generator)
    reports = finetune(
        generator,
        [Reward("same", lambda videos, prompts, *, fps: torch.ones(len(videos)))],
        ["plain"],
        FinetuneSettings(
            algorithm=settings,
            rollout=RolloutSettings(num_inference_steps=4, prompts_per_update=2),
            optimizer=OptimizerSettings(learning_rate=learning_rate),
            updates=3,
        ),
    )
    assert [report.tied_share for report in reports] == [1.0] * 3
    assert mean_redness(generator) == pytest.approx(before, abs=1e-6)
