"""Losses by closed forms and against independent implementations."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffusion_rl.divergences import gaussian_kl, velocity_kl
from diffusion_rl.losses import (
    AWM_WEIGHTINGS,
    awm_surrogate,
    clipped_surrogate_loss,
    matching_loss,
    nft_loss,
)

ADVANTAGES = torch.tensor([1.5, -2.0, 0.0])


def old_log_probs() -> torch.Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def test_on_policy_gradient_is_minus_advantage_over_count():
    log_probs = old_log_probs().requires_grad_()
    loss = clipped_surrogate_loss(log_probs, old_log_probs(), ADVANTAGES, clip_range=0.2)
    torch.testing.assert_close(loss, -ADVANTAGES.mean())
    loss.backward()
    torch.testing.assert_close(log_probs.grad, (-ADVANTAGES / 12)[:, None].expand(3, 4))


@pytest.mark.parametrize(
    ("shift", "advantage", "expected"),
    [
        (0.5, 1.0, -1.2),  # raised enough already: clipped, no gradient
        (0.5, -1.0, 1.6487212707),  # raised though bad: the full ratio e^0.5 is charged
        (-0.5, 1.0, -0.6065306597),  # lowered though good: e^-0.5
        (-0.5, -1.0, 0.8),  # lowered enough already: clipped, no gradient
    ],
)
def test_clipping_holds_back_only_what_has_gone_far_enough(shift, advantage, expected):
    log_probs = torch.full((1, 1), shift, requires_grad=True)
    loss = clipped_surrogate_loss(log_probs, torch.zeros(1, 1), torch.tensor([advantage]), 0.2)
    torch.testing.assert_close(loss, torch.tensor(expected))
    loss.backward()
    clipped = abs(expected) in (1.2, 0.8)
    assert bool(log_probs.grad == 0) is clipped


def test_an_unjudged_video_gets_no_gradient():
    log_probs = (old_log_probs() + 0.05).requires_grad_()
    clipped_surrogate_loss(log_probs, old_log_probs(), ADVANTAGES, 0.2).backward()
    assert log_probs.grad[2].eq(0).all()
    assert log_probs.grad[:2].ne(0).all()


def test_gaussian_kl_is_that_of_torch_distributions():
    source = torch.Generator().manual_seed(1)
    mean, reference = torch.randn(2, 3, 4, 5, 5, generator=source), torch.randn(3, 4, 5, 5)
    std = torch.tensor([0.3, 0.9]).reshape(2, 1, 1, 1, 1)
    reference = reference.expand_as(mean)
    expected = kl_divergence(
        Normal(mean, std.expand_as(mean)), Normal(reference, std.expand_as(mean))
    ).mean()
    torch.testing.assert_close(gaussian_kl(mean, reference, std), expected)
    assert gaussian_kl(mean, mean, std) == 0


@pytest.mark.parametrize("divergence", [velocity_kl, lambda a, b: gaussian_kl(a, b, torch.ones(1))])
def test_divergences_carry_gradient_for_the_policy_only(divergence):
    tuned = torch.ones(2, 3, requires_grad=True)
    reference = torch.zeros(2, 3, requires_grad=True)
    divergence(tuned, reference).backward()
    assert tuned.grad.abs().sum() > 0
    assert reference.grad is None


def test_velocity_kl_is_the_mean_square():
    value = velocity_kl(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]]))
    torch.testing.assert_close(value, torch.tensor(2.5))


def nft_inputs(seed: int = 0, shape=(3, 2, 3, 4, 4)):
    source = torch.Generator().manual_seed(seed)
    draw = [torch.randn(shape, generator=source) for _ in range(4)]
    prediction, old, data, noise = draw
    sigma = torch.tensor([0.2, 0.6, 0.95])
    time = sigma.reshape(3, 1, 1, 1, 1)
    return prediction, old, (1 - time) * data + time * noise, data, sigma


def direct_nft_loss(prediction, old, latent, data, sigma, advantages, beta):
    """The published loss written as loops over videos and elements, in float64."""
    total = 0.0
    for index in range(len(advantages)):
        time = float(sigma[index])
        optimality = min(max(max(min(float(advantages[index]), 5), -5) / 5 / 2 + 0.5, 0), 1)
        terms = []
        for sign in (1, -1):
            clean_errors = []
            for new, before, noisy, clean in zip(
                prediction[index].flatten().tolist(),
                old[index].flatten().tolist(),
                latent[index].flatten().tolist(),
                data[index].flatten().tolist(),
                strict=True,
            ):
                velocity = before + sign * beta * (new - before)
                clean_errors.append(noisy - time * velocity - clean)
            count = len(clean_errors)
            weight = max(sum(abs(error) for error in clean_errors) / count, 1e-5)
            terms.append(sum(error**2 for error in clean_errors) / weight / count)
        good, bad = terms
        total += 5 * (optimality * good / beta + (1 - optimality) * bad / beta)
    return total / len(advantages)


@pytest.mark.parametrize("beta", [1.0, 0.1])
@pytest.mark.parametrize("advantages", [ADVANTAGES, torch.tensor([7.0, -9.0, 5.0])])
def test_nft_loss_equals_a_direct_implementation(beta, advantages):
    inputs = nft_inputs()
    loss = nft_loss(*inputs, advantages, beta=beta)
    expected = direct_nft_loss(*inputs, advantages, beta)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float32))


def test_nft_gradient_treats_the_normaliser_as_a_constant():
    """With e = latent - sigma v - data, d/dv mean(e^2 / w) = -2 sigma e / (w n)."""
    prediction, old, latent, data, sigma = nft_inputs()
    prediction.requires_grad_()
    nft_loss(prediction, old, latent, data, sigma, ADVANTAGES, beta=0.5).backward()
    time = sigma.reshape(3, 1, 1, 1, 1)
    expected = torch.zeros_like(old)
    for sign in (1, -1):
        velocity = old + sign * 0.5 * (prediction.detach() - old)
        error = latent - time * velocity - data
        weight = error.abs().mean(dim=(1, 2, 3, 4), keepdim=True)
        share = (0.5 + sign * ADVANTAGES / 10).reshape(3, 1, 1, 1, 1)
        # The 0.5 that scales the velocity cancels the division of the loss by beta.
        expected += 5 / 3 * share * sign * -2 * time * error / weight / old[0].numel()
    torch.testing.assert_close(prediction.grad, expected)


def test_nft_limit_scales_the_advantages():
    """A limit of 2.5 treats advantage A as 5 treats 2 A, at half the size."""
    half = nft_loss(*nft_inputs(), ADVANTAGES, beta=1.0, advantage_limit=2.5)
    torch.testing.assert_close(2 * half, nft_loss(*nft_inputs(), 2 * ADVANTAGES, beta=1.0))


def test_nft_normaliser_has_a_floor():
    prediction, _, latent, data, sigma = nft_inputs()
    exact = (latent - data) / sigma.reshape(3, 1, 1, 1, 1)
    loss = nft_loss(exact, exact, latent, data, sigma, ADVANTAGES, beta=1.0)
    assert torch.isfinite(loss)
    assert loss < 1e-5


def test_nft_moves_towards_good_videos_and_away_from_bad_ones():
    prediction, _, latent, data, sigma = nft_inputs()
    target = (latent - data) / sigma.reshape(3, 1, 1, 1, 1)
    moves = {}
    for advantage in (5.0, 0.0, -5.0):
        policy = prediction.clone().requires_grad_()
        advantages = torch.full((3,), advantage)
        nft_loss(policy, prediction, latent, data, sigma, advantages, beta=1.0).backward()
        moves[advantage] = -(policy.grad * (target - prediction)).sum().item()
    assert moves[5.0] > 0 > moves[-5.0]
    assert abs(moves[0.0]) < 1e-6 * moves[5.0]


def test_nft_old_policy_and_data_carry_no_gradient():
    inputs = [tensor.requires_grad_() for tensor in nft_inputs()]
    nft_loss(*inputs, ADVANTAGES, beta=0.5).backward()
    assert inputs[0].grad is not None
    assert inputs[1].grad is None


def test_nft_accepts_one_sigma_for_all():
    prediction, old, latent, data, _ = nft_inputs()
    one = nft_loss(prediction, old, latent, data, torch.tensor(0.4), ADVANTAGES, beta=1.0)
    each = nft_loss(prediction, old, latent, data, torch.full((3,), 0.4), ADVANTAGES, beta=1.0)
    torch.testing.assert_close(one, each)


@pytest.mark.parametrize("clip_range", [0.0, 1.1, -0.1, float("nan")])
def test_clip_range_is_checked(clip_range):
    with pytest.raises(ValueError, match=r"clip_range must be in \(0, 1\], got"):
        clipped_surrogate_loss(old_log_probs(), old_log_probs(), ADVANTAGES, clip_range)
    with pytest.raises(ValueError, match="clip_range_high must be above 0, got 0.0"):
        clipped_surrogate_loss(old_log_probs(), old_log_probs(), ADVANTAGES, 0.1, 0.0)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda: clipped_surrogate_loss(torch.zeros(2, 3), torch.zeros(2, 4), ADVANTAGES, 0.1),
            r"old_log_probs has shape \(2, 4\), but axes 'B K' need K=3, not 4",
        ),
        (
            lambda: clipped_surrogate_loss(torch.zeros(2, 3), torch.zeros(2, 3), ADVANTAGES, 0.1),
            "advantages has shape .* need B=2, not 3",
        ),
        (
            lambda: gaussian_kl(torch.zeros(2, 3), torch.zeros(2, 1), torch.ones(1)),
            "reference_mean must have the shape of mean",
        ),
        (
            lambda: gaussian_kl(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(1)),
            "std must be above 0, got 0.0; .* use velocity_kl",
        ),
        (
            lambda: velocity_kl(torch.zeros(2, 3), torch.zeros(2, 1)),
            "reference_prediction must have the shape of prediction",
        ),
        (
            lambda: nft_loss(*nft_inputs(), ADVANTAGES, beta=0.0),
            "beta must be above 0, got 0.0",
        ),
        (
            lambda: nft_loss(*nft_inputs(), ADVANTAGES, beta=1.0, advantage_limit=0.0),
            "advantage_limit must be above 0, got 0.0",
        ),
        (
            lambda: nft_loss(*nft_inputs()[:4], torch.ones(2), ADVANTAGES, beta=1.0),
            "sigma has shape .* need B=3, not 2",
        ),
        (
            lambda: nft_loss(*nft_inputs(), ADVANTAGES[:2], beta=1.0),
            "prediction has shape .* need B=2, not 3",
        ),
        (
            lambda: nft_loss(
                nft_inputs()[0], torch.zeros(1), *nft_inputs()[2:], ADVANTAGES, beta=1.0
            ),
            "old_prediction must have the shape of prediction",
        ),
    ],
)
def test_bad_input_is_refused(function, message):
    with pytest.raises(ValueError, match=message):
        function()


def direct_awm(prediction, old, latent, data, sigma, advantages, weighting, clip_range):
    """The published loss video by video, in float64."""
    total, ratios = 0.0, []
    for index in range(len(advantages)):
        time = float(sigma[index])
        noise = (latent[index].double() - (1 - time) * data[index].double()) / time
        log_probs = []
        for velocity in (prediction, old):
            error = (velocity[index].double() - (noise - data[index].double())).pow(2)
            mean = error.mean().item()
            log_probs.append(
                {
                    "uniform": -mean,
                    "t": -mean * time,
                    "t**2": -mean * time**2,
                    "huber": -((mean + 1e-10) ** 0.5 - 1e-5) * time,
                    "ghuber": -((mean + 1e-10) ** 0.25 - 1e-10**0.25) * time / 0.25,
                }[weighting]
            )
        ratio = math.exp(log_probs[0] - log_probs[1])
        clipped = min(max(ratio, 1 - clip_range), 1 + clip_range)
        advantage = float(advantages[index]) / 5
        total += max(-advantage * ratio, -advantage * clipped)
        ratios.append(ratio)
    return total / len(advantages), ratios


@pytest.mark.parametrize("clip_range", [1.0, 0.05])
@pytest.mark.parametrize("weighting", AWM_WEIGHTINGS)
def test_awm_equals_a_direct_implementation(weighting, clip_range):
    prediction, old, *rest = nft_inputs()
    prediction = old + 0.3 * prediction
    value = awm_surrogate(
        prediction, old, *rest, ADVANTAGES, weighting=weighting, clip_range=clip_range
    )
    expected, ratios = direct_awm(prediction, old, *rest, ADVANTAGES, weighting, clip_range)
    torch.testing.assert_close(value.loss, torch.tensor(expected), rtol=1e-5, atol=1e-6)  # / sigma
    found = torch.exp(value.log_ratios.flatten())
    torch.testing.assert_close(found, torch.tensor(ratios).double(), rtol=1e-5, atol=1e-6)
    outside = (found - 1).abs() > clip_range
    assert torch.equal(value.outside.flatten(), outside)


def test_awm_pulls_towards_good_videos_and_pushes_away_from_bad_ones():
    _, old, latent, data, sigma = nft_inputs()
    policy = old.clone().requires_grad_()
    value = awm_surrogate(policy, old, latent, data, sigma, torch.tensor([5.0, -5.0, 0.0]))
    assert torch.equal(value.log_ratios, torch.zeros(3, 1).double())
    value.loss.backward()
    target = (latent - data) / sigma.reshape(3, 1, 1, 1, 1)
    along = -(policy.grad * (target - old)).flatten(1).sum(1)
    assert along[0] > 0 > along[1]
    assert along[2] == 0


def test_awm_is_finite_where_the_prediction_is_perfect():
    _, _, latent, data, sigma = nft_inputs()
    exact = ((latent - data) / sigma.reshape(3, 1, 1, 1, 1)).requires_grad_()
    for weighting in AWM_WEIGHTINGS:
        value = awm_surrogate(exact, exact, latent, data, sigma, ADVANTAGES, weighting=weighting)
        (gradient,) = torch.autograd.grad(value.loss, exact)
        assert torch.isfinite(gradient).all()


def test_awm_options_are_checked():
    with pytest.raises(ValueError, match="weighting must be one of uniform, .*, got ELBO"):
        awm_surrogate(*nft_inputs(), ADVANTAGES, weighting="ELBO")
    with pytest.raises(ValueError, match="advantage_limit must be above 0, got 0.0"):
        awm_surrogate(*nft_inputs(), ADVANTAGES, advantage_limit=0.0)
    with pytest.raises(ValueError, match=r"clip_range must be in \(0, 1\], got 1.5"):
        awm_surrogate(*nft_inputs(), ADVANTAGES, clip_range=1.5)


def test_two_bounds_clip_each_side_by_its_own():
    log_probs = torch.log(torch.tensor([[0.5, 0.95, 1.2, 1.5]]))
    for advantage, expected in ((1.0, [0.5, 0.95, 1.2, 1.3]), (-1.0, [0.9, 0.95, 1.2, 1.5])):
        loss = clipped_surrogate_loss(
            log_probs, torch.zeros(1, 4), torch.tensor([advantage]), 0.1, 0.3
        )
        torch.testing.assert_close(loss, -advantage * torch.tensor(expected).mean())


def test_matching_is_least_squares_weighted_by_advantage():
    prediction, old, latent, data, sigma, _ = matching_inputs()
    advantages = torch.tensor([0.0, 3.0, 1.5])
    noise = (latent - (1 - sigma.view(-1, 1, 1, 1, 1)) * data) / sigma.view(-1, 1, 1, 1, 1)
    expected = sum(
        a * torch.nn.functional.mse_loss(p, n - d)
        for a, p, n, d in zip(advantages, prediction, noise, data, strict=True)
    )
    prediction.requires_grad_(True)
    loss = matching_loss(prediction, old, latent, data, sigma, advantages)
    torch.testing.assert_close(loss, expected / 3, rtol=1e-4, atol=1e-6)
    loss.backward()
    assert not prediction.grad[0].any()
    assert prediction.grad[1].any()


def test_matching_weighs_places_and_refuses_to_push_away():
    prediction, old, latent, data, sigma, _ = matching_inputs()
    weights = torch.zeros(3, 1, *latent.shape[2:])
    weights[..., :2] = 2.0
    weighed = matching_loss(prediction, old, latent, data, sigma, torch.ones(3), weights=weights)
    half = [one[..., :2] for one in (prediction, old, latent, data)]
    torch.testing.assert_close(weighed, matching_loss(*half, sigma, torch.ones(3)))
    assert weighed != matching_loss(prediction, old, latent, data, sigma, torch.ones(3))
    with pytest.raises(ValueError, match="advantages must be at least 0, got -1.0; this loss"):
        matching_loss(prediction, old, latent, data, sigma, -torch.ones(3))


def matching_inputs():
    source = torch.Generator().manual_seed(0)
    data, noise, prediction, old = torch.randn(4, 3, 2, 3, 4, 4, generator=source)
    sigma = torch.tensor([0.3, 0.6, 0.9])
    level = sigma.view(-1, 1, 1, 1, 1)
    return prediction, old, (1 - level) * data + level * noise, data, sigma, noise
