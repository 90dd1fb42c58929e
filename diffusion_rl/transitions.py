"""One denoising step as a Gaussian: mean, spread, sample and log-probability.

Axes: B videos; every other axis of a latent is "..." here (C T H W for video models).
sigma runs from 1 (noise) to 0 (data); latent = sigma * noise + (1 - sigma) * data, and the model
predicts the velocity noise - data. All transitions take the arguments that `flow_sde` describes.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from diffusion_rl.gaussian_steps import (
    Generators,
    Transition,
    check_noise_level,
    gaussian_step,
    per_video,
    remix,
    reverse_sde,
    second_level,
    step_inputs,
)
from diffusion_rl.shapes import check_same_shape

STD_CUT = 0.45
"""Largest spread of a step of `flow_sde_cut`."""


class TransitionFunction(Protocol):
    """The signature that every transition shares."""

    def __call__(
        self,
        latent: Tensor,
        prediction: Tensor,
        sigma: Tensor,
        next_sigma: Tensor,
        *,
        noise_level: float,
        sigma_max: float | Tensor,
        next_latent: Tensor | None = None,
        generator: Generators | None = None,
    ) -> Transition:
        """Take the step, or re-evaluate the one that led to next_latent."""
        ...


def flow_sde(
    latent: Tensor,
    prediction: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
    *,
    noise_level: float,
    sigma_max: float | Tensor,
    next_latent: Tensor | None = None,
    generator: Generators | None = None,
) -> Transition:
    """Take a flow-matching step that explores, and say how likely its outcome was.

    dt        = next_sigma - sigma
    diffusion = noise_level * sqrt(sigma / (1 - min(sigma, sigma_max)))
    mean      = latent * (1 + diffusion^2 / (2 sigma) * dt)
                + prediction * (1 + diffusion^2 (1 - sigma) / (2 sigma)) * dt
    std       = diffusion * sqrt(-dt)
    log_prob  = mean over elements of
                -(next_latent - mean)^2 / (2 std^2) - log(std) - log(2 pi) / 2

    With noise_level 0 it is the Euler step of `ode`.

    Args:
        latent: [B ...] before the step.
        prediction: [B ...] velocity; carries the gradient.
        sigma: [] or [B] in (0, 1], noise level of latent.
        next_sigma: [] or [B] in [0, sigma).
        noise_level: How much the step explores, at least 0 (0.7 is usual).
        sigma_max: In (0, 1), the second sigma of the schedule: stands in for sigma near 1 in the
            denominator, where the diffusion would be infinite.
        next_latent: [B ...] float32 as recorded, to re-evaluate; None draws a new one.
        generator: Source of the noise; unused when next_latent is given.

    Raises:
        ValueError: A shape, a sigma or the noise level is outside its range.

    Source:
        Flow-GRPO, arXiv:2505.05470, sd3_sde_with_logprob of its published code.
    """
    check_noise_level(noise_level, math.inf)
    latent, prediction, sigma, dt = step_inputs(latent, prediction, sigma, next_sigma)
    variance_rate = _flow_rate(sigma, second_level(sigma_max, latent), noise_level)
    return reverse_sde(latent, prediction, sigma, dt, variance_rate, next_latent, generator)


def flow_sde_cut(
    latent: Tensor,
    prediction: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
    *,
    noise_level: float,
    sigma_max: float | Tensor,
    next_latent: Tensor | None = None,
    generator: Generators | None = None,
) -> Transition:
    """Take the step of `flow_sde` with a spread of at most STD_CUT, so that early steps stay small.

    diffusion = min(that of flow_sde, STD_CUT / sqrt(sigma - next_sigma))

    Source:
        LongCat-Video, arXiv:2510.22200, diffusion_clip of GenRL's published code.
    """
    check_noise_level(noise_level, math.inf)
    latent, prediction, sigma, dt = step_inputs(latent, prediction, sigma, next_sigma)
    variance_rate = _flow_rate(sigma, second_level(sigma_max, latent), noise_level)
    variance_rate = torch.minimum(variance_rate, STD_CUT**2 / -dt)
    return reverse_sde(latent, prediction, sigma, dt, variance_rate, next_latent, generator)


def flow_sde_wan(
    latent: Tensor,
    prediction: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
    *,
    noise_level: float,
    sigma_max: float | Tensor,
    next_latent: Tensor | None = None,
    generator: Generators | None = None,
) -> Transition:
    """Take the step of `flow_sde` with a diffusion that falls in a straight line to 0.

    diffusion = noise_level * sigma_max * sigma;  mean, std and log_prob as in `flow_sde`

    The published code has no noise level: it is 1. Its lowest sigma is 0 and left out here.

    Source:
        Flow-GRPO, arXiv:2505.05470, wan_pipeline_with_logprob of its published code.
    """
    check_noise_level(noise_level, math.inf)
    latent, prediction, sigma, dt = step_inputs(latent, prediction, sigma, next_sigma)
    diffusion = noise_level * second_level(sigma_max, latent) * sigma
    return reverse_sde(latent, prediction, sigma, dt, diffusion**2, next_latent, generator)


def dance_sde(
    latent: Tensor,
    prediction: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
    *,
    noise_level: float,
    sigma_max: float | Tensor,
    next_latent: Tensor | None = None,
    generator: Generators | None = None,
) -> Transition:
    """Take a step that explores by the same amount at every noise level.

    data  = latent - sigma * prediction
    score = -(latent - (1 - sigma) * data) / sigma^2
    mean  = latent + prediction * dt - noise_level^2 / 2 * score * dt
    std   = noise_level * sqrt(-dt);  dt and log_prob as in `flow_sde`

    sigma_max has nothing to act on: this diffusion is finite everywhere.

    Source:
        DanceGRPO, arXiv:2505.07818, flux_step of its published code.
    """
    del sigma_max
    check_noise_level(noise_level, math.inf)
    latent, prediction, sigma, dt = step_inputs(latent, prediction, sigma, next_sigma)
    data = latent - sigma * prediction
    score = -(latent - (1 - sigma) * data) / sigma**2
    mean = latent + prediction * dt - 0.5 * noise_level**2 * score * dt
    return gaussian_step(mean, noise_level * torch.sqrt(-dt), next_latent, generator)


def cps(
    latent: Tensor,
    prediction: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
    *,
    noise_level: float,
    sigma_max: float | Tensor,
    next_latent: Tensor | None = None,
    generator: Generators | None = None,
) -> Transition:
    """Take a step that replaces noise by noise, so that next_latent holds next_sigma of it.

    std      = next_sigma * sin(noise_level * pi / 2)
    mean     = (1 - next_sigma) * data + sqrt(next_sigma^2 - std^2) * noise
               for data = latent - sigma * prediction, noise = latent + (1 - sigma) * prediction
    log_prob = mean over elements of -(next_latent - mean)^2

    As published, log_prob lacks the spread and the constant of a density, so that all steps weigh
    alike. noise_level is in [0, 1]; the step to next_sigma 0 is deterministic; sigma_max has
    nothing to act on.

    Source:
        Coefficients-preserving sampling, arXiv:2509.05952, sd3_sde_with_logprob of Flow-GRPO's
        published code.
    """
    del sigma_max
    check_noise_level(noise_level, 1.0)
    latent, prediction, sigma, _ = step_inputs(latent, prediction, sigma, next_sigma)
    next_level = per_video("next_sigma", next_sigma, latent)
    std = next_level * math.sin(noise_level * math.pi / 2)
    noise_share = torch.sqrt(next_level**2 - std**2)
    mean = remix(latent, prediction, sigma, next_level, noise_share)
    step = gaussian_step(mean, std, next_latent, generator)
    squares = (step.next_latent - mean) ** 2
    log_prob, log_prob_map = -squares.flatten(1).mean(dim=1), -squares.mean(dim=1)
    return step._replace(log_prob=log_prob, log_prob_map=log_prob_map)


def ddim(
    latent: Tensor,
    prediction: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
    *,
    noise_level: float,
    sigma_max: float | Tensor,
    next_latent: Tensor | None = None,
    generator: Generators | None = None,
) -> Transition:
    """Take DDIM's step with eta = noise_level; with eta 1 it is ancestral sampling, DDPO's policy.

    kept = (1 - sigma) * next_sigma / ((1 - next_sigma) * sigma)
    std  = noise_level * next_sigma * sqrt(1 - kept^2)
    mean = (1 - next_sigma) * data + sqrt(next_sigma^2 - std^2) * noise
           for data = latent - sigma * prediction, noise = latent + (1 - sigma) * prediction

    A model of a variance-preserving process with alpha = sqrt(alphas_cumprod) and
    beta = sqrt(1 - alphas_cumprod) is put into these terms by sigma = beta / (alpha + beta),
    latent = its latent / (alpha + beta) and prediction = its noise - its data; the step is then the
    same one, and log_prob is greater by log(alpha + beta) of the next level, which no ratio sees.
    Levels given in float64 are not rounded. noise_level is in [0, 1]; the step to next_sigma 0 is
    deterministic; sigma_max has nothing to act on.

    Source:
        DDIM, arXiv:2010.02502, eq. 12 and 16; DDPO, arXiv:2305.13301, ddim_step_with_logprob of
        its published code.
    """
    del sigma_max
    check_noise_level(noise_level, 1.0)
    latent, prediction, level, _ = step_inputs(latent, prediction, sigma, next_sigma)
    # As precise as the levels are given: they may be near to one another, and to 1.
    sigma, next_sigma = (
        per_video(name, value, latent, torch.promote_types(value.dtype, torch.float32))
        for name, value in (("sigma", sigma), ("next_sigma", next_sigma))
    )
    kept = (1 - sigma) * next_sigma / ((1 - next_sigma) * sigma)
    lost = (sigma - next_sigma) / ((1 - next_sigma) * sigma)  # 1 - kept
    std = (noise_level * next_sigma * torch.sqrt(lost * (1 + kept))).float()
    noise_share = next_sigma * torch.sqrt(1 - noise_level**2 + noise_level**2 * kept**2)
    mean = remix(latent, prediction, level, next_sigma.float(), noise_share.float())
    return gaussian_step(mean, std, next_latent, generator)


def ode(
    latent: Tensor,
    prediction: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
    *,
    noise_level: float,
    sigma_max: float | Tensor,
    next_latent: Tensor | None = None,
    generator: Generators | None = None,
) -> Transition:
    """Take the deterministic Euler step of flow matching; nothing is drawn or explored.

    mean = latent + prediction * (next_sigma - sigma),  std = 0,  log_prob = 0

    The arguments are those of `flow_sde`, so that a row of `ALGORITHMS` may name either;
    noise_level, sigma_max and generator have nothing to act on.
    """
    del noise_level, sigma_max, generator
    latent, prediction, sigma, dt = step_inputs(latent, prediction, sigma, next_sigma)
    mean = latent + prediction * dt
    next_latent = mean if next_latent is None else next_latent.float()
    check_same_shape("next_latent", next_latent, "latent", mean)
    zeros = (torch.zeros_like(one) for one in (sigma, sigma.flatten(), mean[:, 0]))
    return Transition(next_latent.detach(), mean, *zeros)


TRANSITIONS: dict[str, TransitionFunction] = {
    "flow_sde": flow_sde,
    "flow_sde_cut": flow_sde_cut,
    "flow_sde_wan": flow_sde_wan,
    "dance_sde": dance_sde,
    "cps": cps,
    "ddim": ddim,
    "ode": ode,
}
"""The transitions a configuration may name."""

DETERMINISTIC_AT_THE_END = ("cps", "ddim")
"""Transitions whose step to sigma 0 adds no noise, so that nothing can be learnt from it."""


def name_of(transition: TransitionFunction) -> str:
    """What a configuration calls a transition."""
    return next(name for name, one in TRANSITIONS.items() if one is transition)


def _flow_rate(sigma: Tensor, sigma_max: Tensor, noise_level: float) -> Tensor:
    """The squared diffusion of `flow_sde`."""
    return noise_level**2 * sigma / (1 - torch.minimum(sigma, sigma_max))
