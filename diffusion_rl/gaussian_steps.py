"""Gaussian steps: what the transitions of `transitions` share.

Axes: B videos; every other axis of a latent is "..." here (C T H W for video models).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_rl.shapes import check_same_shape, check_shape

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


def reverse_sde(
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
    return gaussian_step(mean, torch.sqrt(variance_rate * -dt), next_latent, generator)


def remix(
    latent: Tensor, prediction: Tensor, sigma: Tensor, next_level: Tensor, noise_share: Tensor
) -> Tensor:
    """The data and the noise that the prediction implies, mixed anew."""
    data = latent - sigma * prediction
    noise = latent + (1 - sigma) * prediction
    return (1 - next_level) * data + noise_share * noise


def gaussian_step(
    mean: Tensor, std: Tensor, next_latent: Tensor | None, generator: Generators | None
) -> Transition:
    """Draw next_latent or re-evaluate it; its log-probabilities are 0 where std is."""
    next_latent = _sample(mean, std, generator) if next_latent is None else next_latent.float()
    check_same_shape("next_latent", next_latent, "latent", mean)
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


def check_noise_level(noise_level: float, most: float) -> None:
    if not 0 <= noise_level <= most or math.isinf(noise_level):
        rule = "a finite number >= 0" if math.isinf(most) else f"in [0, {most:g}]"
        raise ValueError(f"noise_level must be {rule}, got {noise_level}")


def second_level(sigma_max: float | Tensor, latent: Tensor) -> Tensor:
    highest = torch.as_tensor(sigma_max, dtype=torch.float32, device=latent.device)
    if not bool(((highest > 0) & (highest < 1)).all()):
        raise ValueError(f"sigma_max must be in (0, 1), got {highest.tolist()}")
    return highest


def step_inputs(
    latent: Tensor, prediction: Tensor, sigma: Tensor, next_sigma: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Checked float32 inputs; sigma and dt as [B 1 ...] on the latent's device."""
    if latent.ndim < 2:
        raise ValueError(f"latent must have axes [B ...], got shape {tuple(latent.shape)}")
    check_same_shape("prediction", prediction, "latent", latent)
    sigma = per_video("sigma", sigma, latent)
    next_sigma = per_video("next_sigma", next_sigma, latent)
    if not bool(((sigma > 0) & (sigma <= 1)).all()):
        raise ValueError(f"sigma must be in (0, 1], got {sigma.flatten().tolist()}")
    if not bool(((next_sigma >= 0) & (next_sigma < sigma)).all()):
        raise ValueError(
            f"next_sigma must be in [0, sigma), got {next_sigma.flatten().tolist()} "
            f"for sigma {sigma.flatten().tolist()}"
        )
    return latent.float(), prediction.float(), sigma, next_sigma - sigma


def per_video(
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
