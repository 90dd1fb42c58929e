"""Losses of replayed steps by closed forms, loops and their gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal

from diffusion_rl.losses import clipped_surrogate_loss
from diffusion_rl.surrogates import (
    STEP_WEIGHTINGS,
    ReplayedSteps,
    clipped_surrogate,
    divergence_masked_surrogate,
    guarded_surrogate,
)

ADVANTAGES = torch.tensor([1.5, -2.0, 0.0])
LOSSES = [
    lambda steps, advantages: clipped_surrogate(steps, advantages, clip_range=0.2),
    lambda steps, advantages: guarded_surrogate(steps, advantages, clip_range=0.2),
    lambda steps, advantages: divergence_masked_surrogate(steps, advantages, divergence_limit=1e-3),
]


def random_steps(seed: int = 0, size: float = 0.3) -> ReplayedSteps:
    source = torch.Generator().manual_seed(seed)
    old, shift, spread, duration = (torch.rand(3, 4, generator=source) for _ in range(4))
    change = size * torch.randn(3, 4, generator=source)
    return ReplayedSteps(
        log_probs=(old + change).requires_grad_(),
        old_log_probs=old,
        mean_shifts=size * shift,
        stds=0.3 + spread,
        durations=0.05 + 0.1 * duration,
        sigmas=0.1 + 0.9 * torch.rand(3, 4, generator=source),
        sigma_max=torch.full((3, 4), 0.95),
    )


def exact_steps() -> ReplayedSteps:
    steps = random_steps()
    return steps._replace(
        log_probs=steps.old_log_probs.clone().requires_grad_(),
        mean_shifts=torch.zeros(3, 4),
    )


def test_weights_of_steps_by_loops():
    """The published tables, step by step, and the clipped terms times them."""
    steps = random_steps()
    at_the_top = steps._replace(sigmas=torch.ones(3, 4))
    for own in (steps, at_the_top):
        for name in STEP_WEIGHTINGS:
            value = clipped_surrogate(own, ADVANTAGES, clip_range=0.2, step_weighting=name)
            total = 0.0
            for video in range(3):
                for step in range(4):
                    sigma, dt = own.sigmas[video, step].item(), own.durations[video, step].item()
                    spread = own.stds[video, step].item()
                    root, advantage = math.sqrt(dt), ADVANTAGES[video].item()
                    diffusion = spread / root
                    weight = {
                        "none": 1.0,
                        "longcat": math.sqrt(sigma / (1 - min(sigma, 0.95))) / root,
                        "flash": 1
                        / (root / diffusion + diffusion * root * (1 - sigma) / (2 * sigma)),
                    }[name]
                    ratio = (own.log_probs - own.old_log_probs)[video, step].exp().item()
                    clipped = min(max(ratio, 0.8), 1.2)
                    total -= weight * min(ratio * advantage, clipped * advantage)
            assert value.loss.item() == pytest.approx(total / 12, rel=1e-4)
    with pytest.raises(ValueError, match="step_weighting must be one of none, longcat, flash, got"):
        clipped_surrogate(steps, ADVANTAGES, clip_range=0.2, step_weighting="even")


@pytest.mark.parametrize("loss", LOSSES)
def test_an_exact_replay_has_ratio_one_and_learns_everywhere(loss):
    steps = exact_steps()
    value = loss(steps, ADVANTAGES)
    assert torch.equal(value.log_ratios, torch.zeros(3, 4))
    assert not value.outside.any()
    value.loss.backward()
    assert steps.log_probs.grad[0].lt(0).all()
    assert steps.log_probs.grad[1].gt(0).all()
    assert steps.log_probs.grad[2].eq(0).all()


def test_the_clipped_surrogate_is_the_loss_of_its_tensors():
    steps = random_steps()
    value = clipped_surrogate(steps, ADVANTAGES, clip_range=0.1, clip_range_high=0.3)
    expected = clipped_surrogate_loss(steps.log_probs, steps.old_log_probs, ADVANTAGES, 0.1, 0.3)
    assert torch.equal(value.loss, expected)
    change = torch.exp(value.log_ratios) - 1
    assert torch.equal(value.outside, (change < -0.1) | (change > 0.3))
    assert 0 < value.outside.sum() < 12


def direct_guarded(steps, advantages, low, high):
    """The published loss in loops, in float64."""
    total = 0.0
    for video in range(3):
        for step in range(4):
            log_prob, old, shift, spread, duration = (v[video, step].item() for v in steps[:5])
            ratio = math.exp((log_prob - old + shift / (2 * spread**2)) * spread)
            clipped = min(max(ratio, 1 - low), 1 + high)
            advantage = float(advantages[video])
            total += max(-advantage * ratio, -advantage * clipped) / duration
    return total / 12


@pytest.mark.parametrize(("low", "high"), [(0.05, None), (0.05, 0.2), (0.5, 0.01)])
def test_the_guarded_loss_equals_a_direct_implementation(low, high):
    steps = random_steps()
    value = guarded_surrogate(steps, ADVANTAGES, clip_range=low, clip_range_high=high)
    expected = direct_guarded(steps, ADVANTAGES, low, low if high is None else high)
    torch.testing.assert_close(value.loss.detach(), torch.tensor(expected))
    assert 0 < value.outside.sum() < 12


def test_the_guard_centres_the_ratios_of_a_mean_that_has_moved():
    """Under N(m, s) the log-ratio of N(m + d, s) is on average -d^2 / (2 s^2)."""
    drawn = 0.4 * torch.randn(200000, 1, generator=torch.Generator().manual_seed(0))
    old, new = Normal(0.0, 0.4).log_prob(drawn), Normal(0.2, 0.4).log_prob(drawn)
    plain = (new - old).mean()
    assert plain == pytest.approx(-0.125, abs=0.01)
    ones = torch.ones(200000, 1)
    steps = ReplayedSteps(new, old, 0.04 * ones, 0.4 * ones, 0.1 * ones, ones, 0.9 * ones)
    guarded = guarded_surrogate(steps, torch.ones(200000), clip_range=0.1).log_ratios
    assert guarded.mean() == pytest.approx(0.0, abs=5e-3)
    # Their spread is the distance of the means, whatever that of the step.
    assert guarded.std() == pytest.approx(0.2, rel=1e-2)


def direct_masked(steps, advantages, limit):
    total, stopped = 0.0, []
    for video in range(3):
        for step in range(4):
            log_prob, old, shift, spread, _ = (v[video, step].item() for v in steps[:5])
            ratio, advantage = math.exp(log_prob - old), float(advantages[video])
            far = shift / (2 * spread**2) >= limit
            away = (ratio > 1 and advantage > 0) or (ratio < 1 and advantage < 0)
            stopped.append(far and away)
            total += 0.0 if far and away else -advantage * ratio
    return total / 12, stopped


@pytest.mark.parametrize("limit", [1e-6, 0.1, 0.3, 100.0])
def test_the_masked_loss_equals_a_direct_implementation(limit):
    steps = random_steps(size=0.5)
    value = divergence_masked_surrogate(steps, ADVANTAGES, divergence_limit=limit)
    expected, stopped = direct_masked(steps, ADVANTAGES, limit)
    torch.testing.assert_close(value.loss.detach(), torch.tensor(expected))
    assert value.outside.flatten().tolist() == stopped
    value.loss.backward()
    assert steps.log_probs.grad[value.outside].eq(0).all()
    learns = ~value.outside & (ADVANTAGES != 0)[:, None]
    assert steps.log_probs.grad[learns].ne(0).all()
    assert bool(value.outside.any()) == (limit < 100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stds": torch.zeros(3, 4)}, "stds must be above 0, got 0.0; a deterministic step"),
        ({"durations": torch.zeros(3, 4)}, "durations must be above 0, got 0.0"),
        ({"mean_shifts": torch.zeros(3, 2)}, "mean_shifts has shape .* need K=4, not 2"),
        ({"old_log_probs": torch.zeros(2, 4)}, "old_log_probs has shape .* need B=3, not 2"),
    ],
)
@pytest.mark.parametrize("loss", LOSSES[1:])
def test_bad_steps_are_refused(loss, change, message):
    with pytest.raises(ValueError, match=message):
        loss(random_steps()._replace(**change), ADVANTAGES)


def test_limits_and_advantages_are_checked():
    with pytest.raises(ValueError, match="divergence_limit must be above 0, got 0.0"):
        divergence_masked_surrogate(random_steps(), ADVANTAGES, divergence_limit=0.0)
    with pytest.raises(ValueError, match=r"clip_range must be in \(0, 1\], got 2.0"):
        guarded_surrogate(random_steps(), ADVANTAGES, clip_range=2.0)
    for loss in LOSSES:
        with pytest.raises(ValueError, match="advantages has shape .* need B=3, not 2"):
            loss(random_steps(), ADVANTAGES[:2])
