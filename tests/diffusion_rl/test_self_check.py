"""The check that every training starts with, and that it can fail."""

import pytest
import torch
from torch import Tensor

from diffusion_rl.algorithms import ALGORITHMS
from diffusion_rl.lora import attach_lora
from diffusion_rl.rollout import RolloutSettings
from diffusion_rl.row_kinds import AlgorithmSettings
from diffusion_rl.row_settings import SETTINGS, DppoSettings, GrpoSettings
from diffusion_rl.self_check import SelfCheck, self_check
from diffusion_rl.transitions import TRANSITIONS
from tests.toy_gaussian import LORA, ToyGenerator

OPTIONS = RolloutSettings(num_inference_steps=4)
REPLAYING = [name for name, row in ALGORITHMS.items() if row.learning_steps == "recorded"]


class NoisyGenerator(ToyGenerator):
    """Predicts a little differently when gradient is on, as some kernels do."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.noise = noise

    def predict(self, *arguments: object) -> Tensor:
        prediction = super().predict(*arguments)
        return prediction + self.noise if torch.is_grad_enabled() else prediction


def check(generator: ToyGenerator, settings: AlgorithmSettings) -> SelfCheck:
    attach_lora(generator.transformer, LORA)
    return self_check(generator, generator.encode_prompts(["plain"]), settings, OPTIONS)


@pytest.mark.parametrize("name", REPLAYING)
def test_an_exact_replay_passes(name: str) -> None:
    assert check(ToyGenerator(), SETTINGS[name]()) == SelfCheck(0.0, 0.0, 16)


@pytest.mark.parametrize("name", [one for one in TRANSITIONS if one != "ode"])
def test_every_transition_replays_exactly(name: str) -> None:
    assert check(ToyGenerator(), GrpoSettings(transition=name)) == SelfCheck(0.0, 0.0, 16)


@pytest.mark.parametrize("name", REPLAYING)
def test_every_row_that_replays_is_checked(name: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match="ratio 1|numerical noise"):
        check(NoisyGenerator(0.3), SETTINGS[name]())


def test_the_narrower_bound_must_be_above_the_noise() -> None:
    with pytest.raises(ValueError, match="clip_range must be above the numerical noise"):
        check(NoisyGenerator(1e-3), GrpoSettings(clip_range=0.04, clip_range_high=1e-6))


def test_a_divergence_limit_below_the_noise_is_refused() -> None:
    assert check(NoisyGenerator(1e-3), DppoSettings(divergence_limit=0.1)).clip_fraction == 0.0
    with pytest.raises(ValueError, match="divergence_limit must be above the numerical noise"):
        check(NoisyGenerator(1e-3), DppoSettings(divergence_limit=1e-9))


def test_numerical_noise_is_measured_and_a_smaller_clip_range_refused() -> None:
    found = check(NoisyGenerator(1e-3), GrpoSettings(clip_range=0.04))
    assert 0 < found.ratio_deviation < 0.04
    assert found.clip_fraction == 0.0
    with pytest.raises(ValueError, match="clip_range must be above the numerical noise .*1e-06"):
        check(NoisyGenerator(1e-3), GrpoSettings(clip_range=1e-6))


def test_a_replay_of_another_step_is_refused() -> None:
    with pytest.raises(RuntimeError, match="replaying a step must give ratio 1"):
        check(NoisyGenerator(2.0), GrpoSettings(clip_range=0.9))
    with pytest.raises(RuntimeError, match="got nan"):
        check(NoisyGenerator(float("nan")), GrpoSettings(clip_range=0.9))


@pytest.mark.parametrize("name", sorted(ALGORITHMS.keys() - REPLAYING))
def test_rows_without_recorded_steps_have_nothing_to_check(name: str) -> None:
    assert check(ToyGenerator(), SETTINGS[name]()) == SelfCheck(0.0, 0.0, 0)
