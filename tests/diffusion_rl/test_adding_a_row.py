"""The row that docs/algorithms.md adds, as one pure function, a class of options and a line."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor

from diffusion_rl.advantages import group_advantages
from diffusion_rl.algorithms import ALGORITHMS, Algorithm
from diffusion_rl.configuration import load_config
from diffusion_rl.credit import Credit
from diffusion_rl.lora import trained_parameters
from diffusion_rl.losses import Surrogate, clipped_terms, has_left_range
from diffusion_rl.row_settings import SETTINGS, GrpoSettings
from diffusion_rl.step_losses import replay, surrogate_of
from diffusion_rl.surrogates import ReplayedSteps, check_steps
from diffusion_rl.transitions import flow_sde
from tests.diffusion_rl.test_updates import ADVANTAGES, OPTIONS, prepare, run

DOCS = Path(__file__).resolve().parents[2] / "docs" / "algorithms.md"


def evened_surrogate(
    steps: ReplayedSteps, advantages: Tensor, *, clip_range: float, clip_range_high: float | None
) -> Surrogate:
    """`clipped_surrogate`, each step divided by how hard it pulls at the velocity."""
    check_steps(steps, advantages)
    log_ratios = steps.log_probs - steps.old_log_probs.detach()
    bounds = (clip_range, clip_range_high, steps.widths)
    pull = steps.durations / steps.stds + steps.stds * (1 - steps.sigmas) / (2 * steps.sigmas)
    terms = clipped_terms(log_ratios, advantages, *bounds) / pull
    log_ratios = log_ratios.detach()
    return Surrogate(terms.mean(), log_ratios, has_left_range(log_ratios, *bounds))


@dataclass(frozen=True, kw_only=True)
class EvenedSettings(GrpoSettings):
    """Options of the row `evened`."""

    name: str = "evened"
    """The row."""


ROW = Algorithm(flow_sde, group_advantages, evened_surrogate, "recorded", needs_density=True)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALGORITHMS, "evened", ROW)
    monkeypatch.setitem(SETTINGS, "evened", EvenedSettings)


@pytest.mark.parametrize("one", [evened_surrogate, EvenedSettings])
def test_the_docs_show_this_very_code(one: object) -> None:
    assert inspect.getsource(one) in DOCS.read_text()  # type: ignore[arg-type]


def flash_weight(sigma: float, next_sigma: float, second: float) -> float:
    """1 / (sqrt(-dt) / d + d * sqrt(-dt) * (1 - sigma) / (2 sigma)), d that of flow_sde."""
    root = math.sqrt(sigma - next_sigma)
    diffusion = OPTIONS.noise_level * math.sqrt(sigma / (1 - min(sigma, second)))
    return 1 / (root / diffusion + diffusion * root * (1 - sigma) / (2 * sigma))


@pytest.mark.parametrize("index", [0, 1])
def test_its_loss_is_the_closed_form(index: int) -> None:
    """From a replay at moved weights, by the sigmas of the schedule."""
    algorithm = EvenedSettings(clip_range=0.02, clip_range_high=0.01)
    generator, trajectory = prepare(algorithm, OPTIONS, std=0.1)
    for parameter in trained_parameters(generator.transformer):
        parameter.data.mul_(1.5)
    part, place = slice(0, 6), trajectory.steps[index]
    step = replay(generator, trajectory, index, part, OPTIONS)
    value = surrogate_of(step, trajectory, index, part, Credit(ADVANTAGES), algorithm)
    sigmas = trajectory.sigmas.tolist()
    weight = flash_weight(sigmas[place], sigmas[place + 1], sigmas[1])
    terms = []
    for change, gain in zip(
        (step.log_prob.detach() - trajectory.log_probs[:, index]).tolist(), ADVANTAGES.tolist()
    ):
        ratio = math.exp(change)
        terms.append(-weight * min(ratio * gain, min(max(ratio, 0.98), 1.01) * gain))
    assert value.loss.item() == pytest.approx(sum(terms) / 6, rel=1e-5)
    each = surrogate_of(
        step, trajectory, index, part, Credit(ADVANTAGES, None, "position"), algorithm
    )
    assert each.log_ratios.shape == (6, 64)
    early, late = (flash_weight(sigmas[k], sigmas[k + 1], sigmas[1]) for k in trajectory.steps)
    assert abs(early / late - 1) > 0.1  # The steps do not weigh alike.


def test_it_learns_and_is_chosen_by_name(tmp_path: Path) -> None:
    algorithm = EvenedSettings(kl_weight=0.1)
    generator, trajectory = prepare(algorithm, OPTIONS)
    statistics = run(generator, trajectory, algorithm, OPTIONS)
    assert statistics.grad_norm > 0
    assert statistics.ratio_deviation == 0
    recipe = DOCS.parents[1] / "configs" / "rl" / "wan2.1_1.3b_grpo.yaml"
    overrides = ["algorithm.name=evened", "algorithm.clip_range=0.02"]
    assert load_config(recipe, overrides).algorithm == EvenedSettings(
        kl_weight=4e-3, inner_steps=2, clip_range=0.02
    )
