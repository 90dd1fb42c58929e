"""Transitions against diffusers' Euler and DDIM steps, closed forms and torch.distributions."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch.distributions import Normal

from diffusion_rl.transitions import (
    DETERMINISTIC_AT_THE_END,
    TRANSITIONS,
    cps,
    dance_sde,
    ddim,
    flow_sde,
    flow_sde_cut,
    flow_sde_wan,
    ode,
)

SHAPE = (3, 4, 2, 5, 6)
SIGMAS = torch.tensor([1.0, 0.9643, 0.75, 0.3, 0.05, 0.0])
OPTIONS = {"noise_level": 0.7, "sigma_max": 0.9643}
DENSITIES = [flow_sde, flow_sde_cut, flow_sde_wan, dance_sde, ddim]
EXPLORING = [*DENSITIES, cps]


def random_inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, generator=source), torch.randn(SHAPE, generator=source)


def steps() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(SIGMAS[:-1], SIGMAS[1:], strict=True))


@pytest.mark.parametrize("transition", TRANSITIONS.values())
def test_without_noise_every_step_is_diffusers_euler_step(transition):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    latent, _ = random_inputs()
    expected = latent.clone()
    sigmas = scheduler.sigmas
    for index, timestep in enumerate(scheduler.timesteps):
        _, velocity = random_inputs(index + 1)
        expected = scheduler.step(velocity, timestep, expected).prev_sample
        step = transition(
            latent,
            velocity,
            sigmas[index],
            sigmas[index + 1],
            noise_level=0.0,
            sigma_max=sigmas[1],
        )
        latent = step.next_latent
        torch.testing.assert_close(latent, expected)
        assert step.std.eq(0).all()
        assert step.log_prob.eq(0).all()


@pytest.mark.parametrize(
    ("transition", "sigma", "next_sigma"),
    [(one, *step) for one in DENSITIES for step in steps() if one is not ddim or step[1] > 0],
)
def test_log_prob_is_that_of_the_normal_distribution(transition, sigma, next_sigma):
    latent, velocity = random_inputs()
    step = transition(
        latent, velocity, sigma, next_sigma, generator=torch.Generator().manual_seed(1), **OPTIONS
    )
    expected = Normal(step.mean, step.std.expand(SHAPE)).log_prob(step.next_latent)
    torch.testing.assert_close(step.log_prob, expected.flatten(1).mean(1))


def diffusion_of(transition, time, duration):
    """The square root of each reverse SDE's diffusion, in float64."""
    if transition in (flow_sde, flow_sde_cut):
        diffusion = 0.7 * (time / (1 - min(time, SIGMAS[1].double()))).sqrt()
        return diffusion if transition is flow_sde else min(diffusion, 0.45 / duration.sqrt())
    return 0.7 * (SIGMAS[1].double() * time if transition is flow_sde_wan else 1)


@pytest.mark.parametrize("transition", [flow_sde, flow_sde_cut, flow_sde_wan, dance_sde])
@pytest.mark.parametrize(("sigma", "next_sigma"), steps())
def test_mean_and_spread_follow_the_score_form_of_the_same_equation(transition, sigma, next_sigma):
    """Reverse SDE written with the score: v dt - s^2/2 score dt, score = -(x - (1-t) x0) / t^2."""
    latent, velocity = (tensor.double() for tensor in random_inputs())
    step = transition(latent, velocity, sigma, next_sigma, **OPTIONS)
    assert step.mean.dtype == step.std.dtype == torch.float32
    time, change = sigma.double(), (next_sigma - sigma).double()
    diffusion = diffusion_of(transition, time, -change)
    score = -(latent - (1 - time) * (latent - time * velocity)) / time**2
    mean = latent + velocity * change - diffusion**2 / 2 * score * change
    torch.testing.assert_close(step.mean.double(), mean, rtol=1e-5, atol=1e-5)  # float32 inside
    spread = diffusion * (-change).sqrt()
    torch.testing.assert_close(step.std.double(), spread.expand_as(step.std), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("transition", [cps, ddim])
@pytest.mark.parametrize(("sigma", "next_sigma"), steps())
def test_what_noise_is_left_has_the_size_of_the_next_level(transition, sigma, next_sigma):
    """For data and noise drawn alone, share of noise^2 + std^2 = next_sigma^2; data are whole."""
    data, noise = random_inputs()
    latent = (1 - sigma) * data + sigma * noise
    mean, std = transition(latent, noise - data, sigma, next_sigma, **OPTIONS)[1:3]
    of_data = transition((1 - sigma) * data, -data, sigma, next_sigma, **OPTIONS).mean
    torch.testing.assert_close(of_data, (1 - next_sigma) * data, rtol=1e-5, atol=1e-6)
    share = (mean - of_data) / noise
    torch.testing.assert_close(share, share.median().expand(SHAPE), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(share.median() ** 2 + std[0].squeeze() ** 2, next_sigma**2)


def test_cps_spreads_by_the_sine_and_reports_the_squared_distance():
    latent, velocity = random_inputs()
    recorded = random_inputs(5)[0]
    step = cps(latent, velocity, SIGMAS[1], SIGMAS[2], next_latent=recorded, **OPTIONS)
    expected = SIGMAS[2] * math.sin(0.35 * math.pi)
    torch.testing.assert_close(step.std, expected.expand_as(step.std))
    torch.testing.assert_close(step.log_prob, -((recorded - step.mean) ** 2).mean((1, 2, 3, 4)))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_is_diffusers_ddim_step_in_other_coordinates(prediction_type, eta):
    """latent = (alpha x0 + beta noise) / (alpha + beta) turns one process into the other."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type=prediction_type,
    )
    scheduler.set_timesteps(20)
    products = scheduler.alphas_cumprod.double()
    for timestep in scheduler.timesteps[:-1:3]:
        before, after = products[timestep], products[timestep - 50]
        alpha, beta, scale = before.sqrt(), (1 - before).sqrt(), before.sqrt() + (1 - before).sqrt()
        next_scale = after.sqrt() + (1 - after).sqrt()
        data, noise = (tensor.double() for tensor in random_inputs(int(timestep)))
        latent = alpha * data + beta * noise
        output = noise if prediction_type == "epsilon" else alpha * noise - beta * data
        variance_noise = random_inputs(1000)[0]
        expected = scheduler.step(
            output, timestep, latent, eta=eta, variance_noise=variance_noise.double()
        ).prev_sample
        step = ddim(
            latent / scale,
            noise - data,
            beta / scale,
            (1 - after).sqrt() / next_scale,
            noise_level=eta,
            sigma_max=0.9,
            generator=None,
        )
        drawn = step.mean + step.std * variance_noise
        torch.testing.assert_close(drawn.double() * next_scale, expected, rtol=2e-6, atol=2e-6)
        if eta:
            density = Normal(step.mean * next_scale, step.std * next_scale)
            theirs = density.log_prob(step.next_latent * next_scale).mean((1, 2, 3, 4))
            ours = step.log_prob - torch.log(next_scale)
            torch.testing.assert_close(ours.float(), theirs.float())


@pytest.mark.parametrize("name", DETERMINISTIC_AT_THE_END)
def test_the_last_step_of_some_transitions_draws_nothing(name):
    latent, velocity = random_inputs()
    source = torch.Generator().manual_seed(0)
    step = TRANSITIONS[name](latent, velocity, SIGMAS[-2], SIGMAS[-1], generator=source, **OPTIONS)
    assert step.std.eq(0).all()
    assert step.log_prob.eq(0).all()
    torch.testing.assert_close(step.next_latent, latent - SIGMAS[-2] * velocity)
    others = [one for other, one in TRANSITIONS.items() if other not in DETERMINISTIC_AT_THE_END]
    for transition in others[:-1]:
        assert transition(latent, velocity, SIGMAS[-2], SIGMAS[-1], **OPTIONS).std.gt(0).all()


def test_samples_have_the_stated_mean_and_spread():
    latent, velocity = torch.full((20000, 1), 0.4), torch.full((20000, 1), -1.3)
    source = torch.Generator().manual_seed(3)
    step = flow_sde(
        latent, velocity, torch.tensor(0.6), torch.tensor(0.5), generator=source, **OPTIONS
    )
    error = (step.next_latent.mean() - step.mean[0, 0]).abs()
    assert error < 4 * step.std[0, 0] / 20000**0.5
    assert (step.next_latent.std() / step.std[0, 0] - 1).abs() < 0.02


@pytest.mark.parametrize("transition", TRANSITIONS.values())
def test_replay_at_unchanged_weights_has_ratio_exactly_one(transition):
    latent, velocity = random_inputs()
    for sigma, next_sigma in steps():
        taken = transition(
            latent, velocity, sigma, next_sigma, generator=torch.Generator(), **OPTIONS
        )
        replayed = transition(
            latent, velocity, sigma, next_sigma, next_latent=taken.next_latent, **OPTIONS
        )
        assert torch.equal(torch.exp(replayed.log_prob - taken.log_prob), torch.ones(SHAPE[0]))
        assert torch.equal(replayed.next_latent, taken.next_latent)


@pytest.mark.parametrize("transition", EXPLORING)
def test_replay_with_other_weights_has_another_ratio(transition):
    latent, velocity = random_inputs()
    sigma, next_sigma = SIGMAS[1], SIGMAS[2]
    taken = transition(latent, velocity, sigma, next_sigma, **OPTIONS)
    moved = transition(
        latent, velocity + 0.1, sigma, next_sigma, next_latent=taken.next_latent, **OPTIONS
    )
    assert not torch.equal(moved.log_prob, taken.log_prob)


@pytest.mark.parametrize("transition", TRANSITIONS.values())
def test_a_sigma_per_video_equals_one_call_per_video(transition):
    latent, velocity = random_inputs()
    sigma, next_sigma = torch.tensor([1.0, 0.75, 0.3]), torch.tensor([0.9, 0.3, 0.0])
    recorded = random_inputs(9)[0]
    together = transition(latent, velocity, sigma, next_sigma, next_latent=recorded, **OPTIONS)
    for index in range(3):
        one = slice(index, index + 1)
        alone = transition(
            latent[one],
            velocity[one],
            sigma[index],
            next_sigma[index],
            next_latent=recorded[one],
            **OPTIONS,
        )
        torch.testing.assert_close(alone.mean, together.mean[one])
        torch.testing.assert_close(alone.log_prob, together.log_prob[one])


def test_generators_per_video_make_the_noise_independent_of_the_batch():
    latent, velocity = random_inputs()
    seeds = [5, 6, 7]
    together = flow_sde(
        latent,
        velocity,
        SIGMAS[1],
        SIGMAS[2],
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        **OPTIONS,
    )
    last = flow_sde(
        latent[2:],
        velocity[2:],
        SIGMAS[1],
        SIGMAS[2],
        generator=[torch.Generator().manual_seed(7)],
        **OPTIONS,
    )
    assert torch.equal(together.next_latent[2:], last.next_latent)
    assert not torch.equal(together.next_latent[0] - together.mean[0], together.next_latent[1])


@pytest.mark.parametrize("transition", DENSITIES)
def test_gradient_flows_through_the_mean_only(transition):
    latent, velocity = random_inputs()
    velocity.requires_grad_()
    step = transition(latent, velocity, SIGMAS[1], SIGMAS[2], **OPTIONS)
    assert not step.next_latent.requires_grad
    step.log_prob.sum().backward()
    again = transition(
        latent, velocity, SIGMAS[1], SIGMAS[2], next_latent=step.next_latent, **OPTIONS
    )
    density = Normal(again.mean, again.std.expand(SHAPE)).log_prob(step.next_latent)
    (direct,) = torch.autograd.grad(density.flatten(1).mean(1).sum(), velocity)
    torch.testing.assert_close(velocity.grad, direct)
    assert velocity.grad.abs().sum() > 0


@pytest.mark.parametrize("transition", TRANSITIONS.values())
def test_half_precision_inputs_are_computed_in_float32(transition):
    latent, velocity = (tensor.bfloat16() for tensor in random_inputs())
    recorded = random_inputs(4)[0]
    low = transition(latent, velocity, SIGMAS[1], SIGMAS[2], next_latent=recorded, **OPTIONS)
    high = transition(
        latent.float(), velocity.float(), SIGMAS[1], SIGMAS[2], next_latent=recorded, **OPTIONS
    )
    assert low.mean.dtype == low.next_latent.dtype == low.log_prob.dtype == torch.float32
    assert torch.equal(low.mean, high.mean)
    assert torch.equal(low.log_prob, high.log_prob)


def test_transitions_are_named_after_their_functions():
    assert all(function.__name__ == name for name, function in TRANSITIONS.items())
    assert set(TRANSITIONS.values()) == {*EXPLORING, ode}


@pytest.mark.parametrize("transition", [cps, ddim])
def test_noise_levels_above_one_are_refused_where_they_mean_nothing(transition):
    latent, velocity = random_inputs()
    with pytest.raises(ValueError, match=r"noise_level must be in \[0, 1\], got 1.1"):
        transition(latent, velocity, SIGMAS[1], SIGMAS[2], noise_level=1.1, sigma_max=0.9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_level": -0.1}, "noise_level must be a finite number >= 0, got -0.1"),
        ({"noise_level": float("nan")}, "noise_level must be a finite number >= 0, got nan"),
        ({"noise_level": float("inf")}, "noise_level must be a finite number >= 0, got inf"),
        ({"sigma_max": 1.0}, r"sigma_max must be in \(0, 1\), got 1.0"),
        ({"sigma": torch.tensor(0.0)}, r"sigma must be in \(0, 1\], got"),
        ({"sigma": torch.tensor(1.5)}, r"sigma must be in \(0, 1\], got"),
        ({"next_sigma": torch.tensor(0.9)}, r"next_sigma must be in \[0, sigma\), got"),
        ({"next_sigma": torch.tensor(-0.1)}, r"next_sigma must be in \[0, sigma\), got"),
        ({"sigma": torch.tensor([0.5, 0.5])}, "sigma has shape .* need B=3, not 2"),
        ({"latent": torch.zeros(3)}, r"latent must have axes \[B ...\], got shape \(3,\)"),
        ({"prediction": torch.zeros(3, 4)}, "prediction must have the shape of latent"),
        ({"next_latent": torch.zeros(2, 4)}, "next_latent must have the shape of latent"),
        ({"generator": [torch.Generator()]}, r"one generator or one per video \(3\), got 1"),
    ],
)
def test_bad_input_is_refused(change, message):
    latent, velocity = random_inputs()
    arguments = {
        "latent": latent,
        "prediction": velocity,
        "sigma": torch.tensor(0.8),
        "next_sigma": torch.tensor(0.5),
        **OPTIONS,
    }
    with pytest.raises(ValueError, match=message):
        flow_sde(**(arguments | change))
