"""One denoising step as a Gaussian: mean, spread, sample and log-probability.

Axes: B videos; every other axis of a latent is "..." here (C T H W for video models).
sigma runs from 1 (noise) to 0 (data); latent = sigma * noise + (1 - sigma) * data, and the model
predicts the velocity noise - data.
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
    """[B] mean over all elements of the log-density of next_latent; zero if deterministic."""


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
    if not noise_level >= 0 or math.isinf(noise_level):
        raise ValueError(f"noise_level must be a finite number >= 0, got {noise_level}")
    if noise_level == 0:
        return ode(
            latent,
            prediction,
            sigma,
            next_sigma,
            noise_level=noise_level,
            sigma_max=sigma_max,
            next_latent=next_latent,
            generator=generator,
        )
    latent, prediction, sigma, dt = _step_inputs(latent, prediction, sigma, next_sigma)
    highest = torch.as_tensor(sigma_max, dtype=torch.float32, device=latent.device)
    if not bool(((highest > 0) & (highest < 1)).all()):
        raise ValueError(f"sigma_max must be in (0, 1), got {highest.tolist()}")

    variance_rate = noise_level**2 * sigma / (1 - torch.minimum(sigma, highest))
    mean = (
        latent * (1 + variance_rate / (2 * sigma) * dt)
        + prediction * (1 + variance_rate * (1 - sigma) / (2 * sigma)) * dt
    )
    std = torch.sqrt(variance_rate * -dt)
    next_latent = _sample(mean, std, generator) if next_latent is None else next_latent.float()
    _check_like_latent("next_latent", next_latent, mean)
    log_density = (
        -((next_latent.detach() - mean) ** 2) / (2 * std**2)
        - torch.log(std)
        - 0.5 * math.log(2 * math.pi)
    )
    return Transition(next_latent.detach(), mean, std, log_density.flatten(1).mean(dim=1))


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
    std, log_prob = torch.zeros_like(sigma), torch.zeros_like(sigma.flatten())
    return Transition(next_latent.detach(), mean, std, log_prob)


TRANSITIONS: dict[str, TransitionFunction] = {"flow_sde": flow_sde, "ode": ode}
"""The transitions a configuration may name."""


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


def _per_video(name: str, value: Tensor, latent: Tensor) -> Tensor:
    """A [] or [B] noise level as float32 [B 1 ...]."""
    value = torch.as_tensor(value, dtype=torch.float32, device=latent.device)
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
