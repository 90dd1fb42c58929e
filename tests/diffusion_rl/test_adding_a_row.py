"""The row that docs/algorithms.md adds, as one pure function, a class of options and a line."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_rl.advantages import group_advantages
from diffusion_rl.algorithms import ALGORITHMS, Algorithm
from diffusion_rl.configuration import load_config
from diffusion_rl.credit import Credit
from diffusion_rl.group_losses import group_directions
from diffusion_rl.lora import trained_parameters
from diffusion_rl.noising import noise_videos
from diffusion_rl.optimizers import build_optimizer
from diffusion_rl.row_kinds import SETTINGS, ForwardProcessSettings
from diffusion_rl.shares import own_share
from diffusion_rl.transitions import ode
from diffusion_rl.updates import update_policy
from tests import test_learning
from tests.diffusion_rl.test_updates import ADVANTAGES, CALM, OPTIONS, prepare, run
from tests.several import run_on

DOCS = Path(__file__).resolve().parents[2] / "docs" / "algorithms.md"


def tilted_loss(
    prediction: Tensor,
    old_prediction: Tensor,
    latent: Tensor,
    data: Tensor,
    sigma: Tensor,
    advantages: Tensor,
    *,
    directions: Tensor,
    magnitude: float,
    weights: Tensor | None = None,
) -> Tensor:
    """Regress to the old velocity, tilted to where the better videos of the group lie."""
    size = directions.pow(2).mean(dim=(1, 2, 3, 4), keepdim=True).sqrt().clamp_min(1e-5)
    target = old_prediction.detach() - magnitude * directions / size
    error = (prediction - target) ** 2
    return (error if weights is None else weights * error).mean()


@dataclass(frozen=True, kw_only=True)
class TiltedSettings(ForwardProcessSettings):
    """Options of the row `tilted`."""

    name: str = "tilted"
    """The row."""
    magnitude: float = 0.02
    """How far the target lies from the old velocity, above 0."""

    @property
    def loss_options(self) -> Mapping[str, Any]:
        return {"magnitude": self.magnitude}


ROW = Algorithm(
    *(ode, group_advantages, tilted_loss, "forward_process", "anchors"), needs_directions=True
)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALGORITHMS, "tilted", ROW)
    monkeypatch.setitem(SETTINGS, "tilted", TiltedSettings)


@pytest.mark.parametrize("one", [tilted_loss, TiltedSettings])
def test_the_docs_show_this_very_code(one: object) -> None:
    assert inspect.getsource(one) in DOCS.read_text()  # type: ignore[arg-type]


def test_directions_are_covariances_by_loops() -> None:
    source = torch.Generator().manual_seed(0)
    data, advantages = torch.randn(6, 2, 3, 4, 4, generator=source), ADVANTAGES
    group = torch.tensor([5, 5, 2, 2, 2, 5])
    found = group_directions(data, advantages, torch.arange(6), group)
    for video in range(6):
        members = [one for one in range(6) if group[one] == group[video]]
        mean = sum(advantages[one] * data[one] for one in members) / len(members)
        torch.testing.assert_close(found[video], mean)


@pytest.mark.parametrize("count", [2, 3])
def test_directions_are_those_of_all_processes(count: int) -> None:
    data = torch.randn(6, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    whole = group_directions(data, ADVANTAGES, torch.arange(6), group)

    def own() -> tuple[Tensor, Tensor]:
        rows = own_share(6, 2).rows
        return rows, group_directions(data[rows], ADVANTAGES[rows], rows, group)

    found = run_on(count, own)
    assert sorted(row for rows, _ in found for row in rows.tolist()) == list(range(6))
    for rows, directions in found:
        torch.testing.assert_close(directions, whole[rows])


@pytest.mark.parametrize("size", [1, 4, 6])
def test_its_gradient_is_that_of_all_videos_in_one_pass(size: int) -> None:
    algorithm = TiltedSettings(magnitude=0.3, inner_steps=1)
    options = type(OPTIONS)(num_inference_steps=4, micro_batch=size)
    generator, trajectory = prepare(algorithm, options, std=0.1)
    statistics = run(generator, trajectory, algorithm, options)
    generator, trajectory = prepare(algorithm, options, std=0.1)
    noised = noise_videos(generator, trajectory, torch.Generator().manual_seed(0))
    assert trajectory.group is not None
    own = (trajectory.final_latent, ADVANTAGES, torch.arange(6), trajectory.group)
    velocity = generator.predict(*noised, trajectory.embeddings, 1.0)
    loss = tilted_loss(
        *(velocity, velocity.detach(), noised.latent, own[0], noised.sigma, ADVANTAGES),
        directions=group_directions(*own),
        magnitude=0.3,
    )
    loss.backward()
    parameters = [one for one in generator.transformer.parameters() if one.grad is not None]
    norm = torch.stack([one.grad.norm() for one in parameters if one.grad is not None]).norm()
    assert statistics.loss == pytest.approx(loss.item(), rel=1e-5)
    assert statistics.grad_norm == pytest.approx(norm.item(), rel=1e-4)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_it_learns_in_both_directions(sign: float, monkeypatch: pytest.MonkeyPatch) -> None:
    row = (TiltedSettings(inner_steps=4), 5e-3, {})
    monkeypatch.setitem(test_learning.ALGORITHMS, "tilted", row)
    generator, _ = test_learning.learn("tilted", sign, updates=30)
    distance = abs(test_learning.mean_redness(generator) - test_learning.TARGET)
    assert distance < 0.05 if sign > 0 else distance > 0.13


def test_it_is_chosen_by_name() -> None:
    recipe = DOCS.parents[1] / "configs" / "rl" / "wan2.1_1.3b_nft.yaml"
    overrides = ["algorithm={name: tilted, magnitude: 0.1}"]
    assert load_config(recipe, overrides).algorithm == TiltedSettings(magnitude=0.1)


def test_it_takes_the_credit_of_positions() -> None:
    algorithm = TiltedSettings()
    generator, trajectory = prepare(algorithm, OPTIONS, std=0.1)
    weights = torch.rand(6, *trajectory.final_latent.shape[2:])
    plain = run(generator, trajectory, algorithm, OPTIONS)
    generator, trajectory = prepare(algorithm, OPTIONS, std=0.1)
    parameters = trained_parameters(generator.transformer)
    source, credit = torch.Generator().manual_seed(0), Credit(ADVANTAGES, weights)
    rest = (algorithm, OPTIONS, build_optimizer(parameters, CALM), source)
    focused = update_policy(generator, trajectory, credit, *rest)
    assert plain.grad_norm != focused.grad_norm
