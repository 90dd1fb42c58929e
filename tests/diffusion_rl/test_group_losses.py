"""Losses of whole groups: the closed form, and that its gradient survives passes and processes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffusion_rl.advantages import paired_advantages
from diffusion_rl.algorithms import ALGORITHMS
from diffusion_rl.credit import Credit
from diffusion_rl.group_losses import error_gains, preference_loss, with_slopes
from diffusion_rl.lora import old_policy, reference_policy, trained_parameters
from diffusion_rl.losses import AWM_WEIGHTINGS, AwmWeighting, awm_surrogate
from diffusion_rl.noising import noise_videos
from diffusion_rl.optimizers import build_optimizer
from diffusion_rl.policies import update_old_policy
from diffusion_rl.rollout import RolloutSettings, Trajectory
from diffusion_rl.row_settings import OnlineDpoSettings
from diffusion_rl.updates import UpdateStatistics, update_policy
from tests.diffusion_rl.test_updates import CALM, prepare
from tests.toy_gaussian import ToyGenerator

PAIRED = torch.tensor([1.0, -1.0, 0.0, 0.0, 1.0, -1.0])


def published(
    errors: Tensor, old_errors: Tensor, winners: list[int], losers: list[int], beta: float
) -> float:
    """Flow-DPO's loss as it is written: of errors of winners and losers, one pair a group."""
    total = 0.0
    for winner, loser in zip(winners, losers, strict=True):
        of_winner = (errors[winner] - old_errors[winner]).item()
        of_loser = (errors[loser] - old_errors[loser]).item()
        total -= math.log(1 / (1 + math.exp(0.5 * beta * (of_winner - of_loser))))
    return total / len(winners)


@pytest.mark.parametrize("seed", range(5))
def test_preference_is_the_closed_form(seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    errors, old_errors = torch.rand(2, 6, generator=source, dtype=torch.float64)
    group = torch.tensor([7, 7, 7, 2, 2, 2])
    value = preference_loss(old_errors - errors, PAIRED, group, beta=20.0)
    assert value.item() == pytest.approx(published(errors, old_errors, [0, 4], [1, 5], 20.0))


def test_all_pairs_of_a_group_count_and_groups_count_alike() -> None:
    gains = torch.tensor([0.1, 0.0, -0.2, 0.3, 0.5, 0.4, 9.0])
    advantages = torch.tensor([1.0, 2.0, -1.0, -3.0, 1.0, -1.0, 1.0])
    group = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    first = [-logsigmoid(2.0 * (gains[w] - gains[o])) for w in (0, 1) for o in (2, 3)]
    second = -logsigmoid(torch.tensor(2.0 * 0.1))
    expected = (torch.stack(first).mean() + second) / 2
    torch.testing.assert_close(preference_loss(gains, advantages, group, beta=4.0), expected)


def test_without_a_pair_there_is_nothing_to_learn() -> None:
    gains = torch.tensor([0.1, 0.4], requires_grad=True)
    value = preference_loss(gains, torch.tensor([1.0, 1.0]), torch.tensor([0, 1]), beta=4.0)
    value.backward()
    assert value == 0
    assert gains.grad is not None
    assert not gains.grad.any()


def test_a_margin_of_any_size_stays_finite() -> None:
    gains = torch.tensor([-1e4, 1e4], requires_grad=True)
    value = preference_loss(gains, torch.tensor([1.0, -1.0]), torch.tensor([0, 0]), beta=1e4)
    value.backward()
    assert value.item() == pytest.approx(1e8)
    assert gains.grad is not None
    torch.testing.assert_close(gains.grad, torch.tensor([-5e3, 5e3]))


def test_a_gain_is_what_the_error_has_fallen_by() -> None:
    source = torch.Generator().manual_seed(0)
    data, noise, now, old = torch.randn(4, 3, 2, 2, 4, 4, generator=source)
    sigma = torch.tensor([0.3, 0.9, 0.6])
    level = sigma.view(3, 1, 1, 1, 1)
    latent = (1 - level) * data + level * noise
    weights = torch.rand(3, 1, 2, 4, 4, generator=source)
    gains = error_gains(now, old, latent, data, sigma, weights=weights)
    for video in range(3):
        target, weight = noise[video] - data[video], weights[video]
        fallen = weight * ((old[video] - target) ** 2 - (now[video] - target) ** 2)
        assert gains[video].item() == pytest.approx(fallen.mean().item(), rel=1e-4)


@pytest.mark.parametrize("weighting", AWM_WEIGHTINGS)
def test_gains_are_differences_of_awms_log_probabilities(weighting: AwmWeighting) -> None:
    source = torch.Generator().manual_seed(1)
    data, noise, now, old = torch.randn(4, 3, 2, 2, 4, 4, generator=source)
    sigma = torch.tensor([0.3, 0.9, 0.6])
    latent = (1 - sigma.view(3, 1, 1, 1, 1)) * data + sigma.view(3, 1, 1, 1, 1) * noise
    gains = error_gains(now, old, latent, data, sigma, weighting=weighting)
    value = awm_surrogate(now, old, latent, data, sigma, torch.ones(3), weighting=weighting)
    torch.testing.assert_close(gains[:, None], value.log_ratios)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: preference_loss(*_three(3), beta=0.0), "beta must be above 0, got 0.0"),
        (
            lambda: preference_loss(*_three(3)[:2], torch.zeros(2), beta=1.0),
            "axes 'N' need N=3, not 2",
        ),
        (
            lambda: error_gains(*torch.zeros(3, 2, 4), torch.zeros(3, 4), torch.ones(2)),
            "data must",
        ),
    ],
)
def test_what_does_not_fit_is_refused(function: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function()


def _three(count: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(count), torch.zeros(count), torch.zeros(count, dtype=torch.long)


def test_slopes_are_the_derivatives() -> None:
    gains = torch.tensor([0.1, -0.3, 0.2], dtype=torch.float64)
    others = (torch.tensor([1.0, -1.0, -1.0]), torch.tensor([0, 0, 0]))
    with torch.no_grad():
        value, slopes = with_slopes(preference_loss, gains, *others, beta=6.0)
    for place in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[place] = 1e-6
        ends = [preference_loss(gains + sign * step, *others, beta=6.0) for sign in (1, -1)]
        assert slopes[place].item() == pytest.approx((ends[0] - ends[1]).item() / 2e-6, rel=1e-6)
    assert value == preference_loss(gains, *others, beta=6.0)


@pytest.mark.parametrize("pairs", [1, 2, 3, 9])
def test_the_best_are_set_against_the_worst(pairs: int) -> None:
    """Against every choice by hand, on scores that tie often."""
    source = torch.Generator().manual_seed(pairs)
    for _ in range(50):
        scores = torch.randint(4, (12,), generator=source).float()
        scores[torch.rand(12, generator=source) < 0.2] = torch.nan
        group = torch.randint(3, (12,), generator=source)
        found = paired_advantages(scores, group, pairs=pairs)
        assert not found[scores.isnan()].any()
        for index in range(3):
            own = [
                (score, value)
                for score, value, one in zip(scores.tolist(), found.tolist(), group.tolist())
                if one == index and not math.isnan(score)
            ]
            best = sorted(score for score, value in own if value == 1)
            worst = sorted(score for score, value in own if value == -1)
            every = sorted(score for score, _ in own)
            count = max(
                k
                for k in range(min(pairs, len(every) // 2) + 1)
                if not k or every[-k] > every[k - 1]
            )
            assert (best, worst) == (every[len(every) - count :], every[:count])


def test_groups_without_a_choice_and_bad_options() -> None:
    scores = torch.tensor([2.0, 2.0, 1.0, torch.nan, torch.nan])
    assert not paired_advantages(scores, torch.tensor([0, 0, 1, 1, 2])).any()
    with pytest.raises(ValueError, match="pairs must be at least 1, got 0"):
        paired_advantages(scores, torch.zeros(5, dtype=torch.long), pairs=0)


def moved(
    algorithm: OnlineDpoSettings, size: int, **changes: Any
) -> tuple[ToyGenerator, Trajectory, RolloutSettings]:
    """Six videos of two groups, a policy that has left the old one."""
    options = RolloutSettings(num_inference_steps=4, micro_batch=size, **changes)
    generator, trajectory = prepare(algorithm, options, std=0.1)
    update_old_policy(generator.transformer, 0.0)
    for parameter in trained_parameters(generator.transformer):
        parameter.data.mul_(1.5)
    return generator, trajectory, options


def run(
    generator: ToyGenerator,
    trajectory: Trajectory,
    algorithm: OnlineDpoSettings,
    options: RolloutSettings,
    credit: Credit | None = None,
) -> tuple[UpdateStatistics, list[Tensor]]:
    """One update, and the gradients of its last optimiser step."""
    parameters = trained_parameters(generator.transformer)
    optimizer, found = build_optimizer(parameters, CALM), list[Tensor]()
    optimizer.register_step_pre_hook(
        lambda *_: found.__setitem__(
            slice(None), [one.grad.clone() for one in parameters if one.grad is not None]
        )
    )
    source = torch.Generator().manual_seed(0)
    own = Credit(PAIRED) if credit is None else credit
    statistics = update_policy(generator, trajectory, own, algorithm, options, optimizer, source)
    return statistics, found


@pytest.mark.parametrize("size", [1, 2, 4, 6])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_is_that_of_all_videos_in_one_pass(size: int, weighted: bool) -> None:
    """Against autograd through the loss as it is written; groups learn at the same noise."""
    algorithm = OnlineDpoSettings(beta=300.0, noise_levels=2)
    generator, trajectory, options = moved(algorithm, size)
    weights = torch.rand(6, *trajectory.final_latent.shape[2:]) if weighted else None
    statistics, found = run(generator, trajectory, algorithm, options, Credit(PAIRED, weights))
    generator, trajectory, _ = moved(algorithm, 6)
    source, total = torch.Generator().manual_seed(0), torch.zeros(())
    pairs = torch.tensor([0, 1, 4, 5])
    learnt = trajectory.only(PAIRED != 0)
    for _ in range(2):
        noised = noise_videos(generator, learnt, source, of_groups=True)
        sigma = noised.sigma.view(-1, 1, 1, 1, 1)
        noise = (noised.latent - (1 - sigma) * learnt.final_latent) / sigma
        for one, other in ((0, 1), (2, 3)):
            assert noised.sigma[one] == noised.sigma[other]
            torch.testing.assert_close(noise[one], noise[other], atol=1e-3, rtol=1e-3)
        assert noised.sigma[0] != noised.sigma[2]
        inputs = (*noised, trajectory.embeddings[pairs], 1.0)
        with torch.no_grad(), old_policy(generator.transformer):
            old = generator.predict(*inputs)
        target = (noised.latent - learnt.final_latent) / sigma
        scale = 1.0 if weights is None else weights[pairs][:, None]
        errors = [
            (scale * (velocity - target) ** 2).flatten(1).mean(1)
            for velocity in (generator.predict(*inputs), old)
        ]
        gained = errors[1] - errors[0]
        margins = torch.stack([gained[0] - gained[1], gained[2] - gained[3]])
        total = total - logsigmoid(150.0 * margins).mean() / 2
    total.backward()
    assert statistics.loss == pytest.approx(total.item(), rel=1e-5)
    expected = [one.grad for one in trained_parameters(generator.transformer)]
    expected = [one for one in expected if one is not None]
    assert len(found) == len(expected)
    assert max(one.abs().max().item() for one in found) > 1e-3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_at_the_old_policy_it_pulls_at_best_and_worst_alike() -> None:
    """The loss is log 2 there, and its gradient that of beta / 4 of the difference of errors."""
    algorithm = OnlineDpoSettings(beta=8.0)
    generator, trajectory, options = moved(algorithm, 3)
    update_old_policy(generator.transformer, 0.0)
    statistics, found = run(generator, trajectory, algorithm, options)
    assert statistics.loss == pytest.approx(math.log(2))
    row = dataclasses.replace(ALGORITHMS["online_dpo"], loss=_difference)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ALGORITHMS, "online_dpo", row)
        generator, trajectory, options = moved(algorithm, 3)
        update_old_policy(generator.transformer, 0.0)
        _, expected = run(generator, trajectory, algorithm, options)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def _difference(gains: Tensor, advantages: Tensor, group: Tensor, *, beta: float) -> Tensor:
    return -beta / 4 * (gains * advantages).sum() / 2


def test_the_policy_is_held_near_the_reference_where_wanted() -> None:
    algorithm = OnlineDpoSettings(kl_weight=0.5)
    generator, trajectory, options = moved(algorithm, 4)
    before = _distance(generator, trajectory)
    statistics, _ = run(generator, trajectory, algorithm, options, Credit(torch.zeros(6)))
    assert statistics.kl > 0
    assert statistics.loss == pytest.approx(0.5 * statistics.kl)
    assert _distance(generator, trajectory) < before


def _distance(generator: ToyGenerator, trajectory: Trajectory) -> float:
    noised = noise_videos(generator, trajectory, torch.Generator().manual_seed(5))
    with torch.no_grad():
        velocity = generator.predict(*noised, trajectory.embeddings, 1.0)
        with reference_policy(generator.transformer):
            return (generator.predict(*noised, trajectory.embeddings, 1.0) - velocity).norm().item()


def test_videos_that_were_drawn_for_no_update_have_no_groups() -> None:
    algorithm = OnlineDpoSettings()
    generator, trajectory, options = moved(algorithm, 4)
    alone = dataclasses.replace(trajectory, group=None)
    with pytest.raises(ValueError, match="trajectory.group must say which videos are compared"):
        run(generator, alone, algorithm, options)


def test_what_gains_are_measured_from_is_refreshed() -> None:
    algorithm = OnlineDpoSettings(refresh_every=3)
    assert [algorithm.old_decay(update) for update in range(1, 8)] == [1, 1, 0, 1, 1, 0, 1]
