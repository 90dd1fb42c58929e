"""One denoising step as a Gaussian: mean, spread, sample and log-probability.

Axes: B videos; every other axis of a latent is "..." here (C T H W for video models).
sigma runs from 1 (noise) to 0 (data); latent = sigma * noise + (1 - sigma) * data, and the model
predicts the velocity noise - data. All transitions take the arguments that `flow_sde` describes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from diffusion_rl.shapes import check_shape

Generators = torch.Generator | Sequence[torch.Generator]
"""One generator for the batch, or one per video (the noise then ignores who shares the batch)."""


class Transition(NamedTuple):
    """One denoising step, in float32 whatever the model's precision."""

    next_latent: Tensor
    """[B ...] the latent after the step; carries no gradient."""
    mean: Tensor
    """[B ...] centre of the Gaussian; carries the gradient of the prediction."""
    std: Tensor
    """[B 1 ...] spread of the Gaussian; zero for a deterministic step."""
    log_prob: Tensor
    """[B] mean over all elements of the log-density of next_latent; zero if deterministic. Of
    `cps` it is minus the squared distance alone."""
    log_prob_map: Tensor
    """[B ...] without channels: the same at each position, a mean over the second axis alone."""


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
    _check_noise_level(noise_level, math.inf)
    latent, prediction, sigma, dt = _step_inputs(latent, prediction, sigma, next_sigma)
    highest = _highest(sigma_max, latent)
    variance_rate = noise_level**2 * sigma / (1 - torch.minimum(sigma, highest))
    return _reverse_sde(latent, prediction, sigma, dt, variance_rate, next_latent, generator)


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
    _check_noise_level(noise_level, math.inf)
    latent, prediction, sigma, dt = _step_inputs(latent, prediction, sigma, next_sigma)
    diffusion = noise_level * _highest(sigma_max, latent) * sigma
    return _reverse_sde(latent, prediction, sigma, dt, diffusion**2, next_latent, generator)


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
    _check_noise_level(noise_level, math.inf)
    latent, prediction, sigma, dt = _step_inputs(latent, prediction, sigma, next_sigma)
    data = latent - sigma * prediction
    score = -(latent - (1 - sigma) * data) / sigma**2
    mean = latent + prediction * dt - 0.5 * noise_level**2 * score * dt
    return _gaussian(mean, noise_level * torch.sqrt(-dt), next_latent, generator)


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
    _check_noise_level(noise_level, 1.0)
    latent, prediction, sigma, _ = _step_inputs(latent, prediction, sigma, next_sigma)
    next_level = _per_video("next_sigma", next_sigma, latent)
    std = next_level * math.sin(noise_level * math.pi / 2)
    noise_share = torch.sqrt(next_level**2 - std**2)
    mean = _remix(latent, prediction, sigma, next_level, noise_share)
    step = _gaussian(mean, std, next_latent, generator)
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
    _check_noise_level(noise_level, 1.0)
    latent, prediction, level, _ = _step_inputs(latent, prediction, sigma, next_sigma)
    # As precise as the levels are given: they may be near to one another, and to 1.
    sigma, next_sigma = (
        _per_video(name, value, latent, torch.promote_types(value.dtype, torch.float32))
        for name, value in (("sigma", sigma), ("next_sigma", next_sigma))
    )
    kept = (1 - sigma) * next_sigma / ((1 - next_sigma) * sigma)
    lost = (sigma - next_sigma) / ((1 - next_sigma) * sigma)  # 1 - kept
    std = (noise_level * next_sigma * torch.sqrt(lost * (1 + kept))).float()
    noise_share = next_sigma * torch.sqrt(1 - noise_level**2 + noise_level**2 * kept**2)
    mean = _remix(latent, prediction, level, next_sigma.float(), noise_share.float())
    return _gaussian(mean, std, next_latent, generator)


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
    latent, prediction, sigma, dt = _step_inputs(latent, prediction, sigma, next_sigma)
    mean = latent + prediction * dt
    next_latent = mean if next_latent is None else next_latent.float()
    _check_like_latent("next_latent", next_latent, mean)
    zeros = (torch.zeros_like(one) for one in (sigma, sigma.flatten(), mean[:, 0]))
    return Transition(next_latent.detach(), mean, *zeros)


TRANSITIONS: dict[str, TransitionFunction] = {
    "flow_sde": flow_sde,
    "flow_sde_wan": flow_sde_wan,
    "dance_sde": dance_sde,
    "cps": cps,
    "ddim": ddim,
    "ode": ode,
}
"""The transitions a configuration may name."""

DETERMINISTIC_AT_THE_END = ("cps", "ddim")
"""Transitions whose step to sigma 0 adds no noise, so that nothing can be learnt from it."""


def _reverse_sde(
    latent: Tensor,
    prediction: Tensor,
    sigma: Tensor,
    dt: Tensor,
    variance_rate: Tensor,
    next_latent: Tensor | None,
    generator: Generators | None,
) -> Transition:
    """The step of flow matching's reverse SDE for a squared diffusion [B 1 ...]."""
    mean = (
        latent * (1 + variance_rate / (2 * sigma) * dt)
        + prediction * (1 + variance_rate * (1 - sigma) / (2 * sigma)) * dt
    )
    return _gaussian(mean, torch.sqrt(variance_rate * -dt), next_latent, generator)


def _remix(
    latent: Tensor, prediction: Tensor, sigma: Tensor, next_level: Tensor, noise_share: Tensor
) -> Tensor:
    """The data and the noise that the prediction implies, mixed anew."""
    data = latent - sigma * prediction
    noise = latent + (1 - sigma) * prediction
    return (1 - next_level) * data + noise_share * noise


def _gaussian(
    mean: Tensor, std: Tensor, next_latent: Tensor | None, generator: Generators | None
) -> Transition:
    """Draw next_latent or re-evaluate it; its log-probabilities are 0 where std is."""
    next_latent = _sample(mean, std, generator) if next_latent is None else next_latent.float()
    _check_like_latent("next_latent", next_latent, mean)
    explores = std > 0
    spread = torch.where(explores, std, 1.0)
    log_density = (
        -((next_latent.detach() - mean) ** 2) / (2 * spread**2)
        - torch.log(spread)
        - 0.5 * math.log(2 * math.pi)
    )
    log_prob = torch.where(explores.flatten(), log_density.flatten(1).mean(dim=1), 0.0)
    log_prob_map = torch.where(explores[:, 0], log_density.mean(dim=1), 0.0)
    return Transition(next_latent.detach(), mean, std, log_prob, log_prob_map)


def _check_noise_level(noise_level: float, most: float) -> None:
    if not 0 <= noise_level <= most or math.isinf(noise_level):
        rule = "a finite number >= 0" if math.isinf(most) else f"in [0, {most:g}]"
        raise ValueError(f"noise_level must be {rule}, got {noise_level}")


def _highest(sigma_max: float | Tensor, latent: Tensor) -> Tensor:
    highest = torch.as_tensor(sigma_max, dtype=torch.float32, device=latent.device)
    if not bool(((highest > 0) & (highest < 1)).all()):
        raise ValueError(f"sigma_max must be in (0, 1), got {highest.tolist()}")
    return highest


def _step_inputs(
    latent: Tensor, prediction: Tensor, sigma: Tensor, next_sigma: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Checked float32 inputs; sigma and dt as [B 1 ...] on the latent's device."""
    if latent.ndim < 2:
        raise ValueError(f"latent must have axes [B ...], got shape {tuple(latent.shape)}")
    _check_like_latent("prediction", prediction, latent)
    sigma = _per_video("sigma", sigma, latent)
    next_sigma = _per_video("next_sigma", next_sigma, latent)
    if not bool(((sigma > 0) & (sigma <= 1)).all()):
        raise ValueError(f"sigma must be in (0, 1], got {sigma.flatten().tolist()}")
    if not bool(((next_sigma >= 0) & (next_sigma < sigma)).all()):
        raise ValueError(
            f"next_sigma must be in [0, sigma), got {next_sigma.flatten().tolist()} "
            f"for sigma {sigma.flatten().tolist()}"
        )
    return latent.float(), prediction.float(), sigma, next_sigma - sigma


def _check_like_latent(name: str, tensor: Tensor, latent: Tensor) -> None:
    if tensor.shape != latent.shape:
        raise ValueError(
            f"{name} must have the shape of latent {tuple(latent.shape)}, got {tuple(tensor.shape)}"
        )


def _per_video(
    name: str, value: Tensor, latent: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A [] or [B] noise level as [B 1 ...]."""
    value = torch.as_tensor(value, dtype=dtype, device=latent.device)
    if value.ndim == 0:
        value = value.expand(latent.shape[0])
    check_shape(name, value, "B", B=latent.shape[0])
    return value.reshape(-1, *[1] * (latent.ndim - 1))


def _sample(mean: Tensor, std: Tensor, generator: Generators | None) -> Tensor:
    """mean + std * noise, where a sequence of generators gives each video its own noise."""
    if generator is None or isinstance(generator, torch.Generator):
        return mean + std * _noise(mean.shape, generator).to(mean.device)
    if len(generator) != mean.shape[0]:
        raise ValueError(
            f"generator must be one generator or one per video ({mean.shape[0]}), "
            f"got {len(generator)}"
        )
    noise = torch.stack([_noise(mean.shape[1:], source) for source in generator])
    return mean + std * noise.to(mean.device)


def _noise(shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    device = "cpu" if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, device=device, dtype=torch.float32)
