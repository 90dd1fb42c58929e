"""One update of the adapter from judged videos: replayed steps, or the forward process.

Axes: B videos, K denoising steps, S recorded ones; latents [B C T H W].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_rl.algorithms import algorithm
from diffusion_rl.generators.base import AbstractVideoGenerator
from diffusion_rl.lora import old_policy, reference_policy
from diffusion_rl.losses import clip_fraction, gaussian_kl, velocity_kl
from diffusion_rl.optimizers import take_step
from diffusion_rl.rollout import RolloutSettings, Trajectory, chunks
from diffusion_rl.transitions import Transition


@dataclass(frozen=True, kw_only=True)
class GrpoSettings:
    """Options of the row `grpo`."""

    name: str = "grpo"
    """The row."""
    clip_range: float = 1e-3
    """Ratios further from 1 stop learning, in (0, 1); far smaller than for text, since the
    log-probabilities are means over the latent's elements."""
    kl_weight: float = 0.0
    """Weight of the divergence from the reference policy, at least 0; 0 does not compute it."""
    inner_steps: int = 1
    """Optimiser steps of an update, at least 1; its videos are split over them."""
    advantage_std: str = "group"
    """Advantages are divided by the spread of the `group` or of the whole `batch`."""
    advantage_clip: float = 5.0
    """Largest size of an advantage, above 0."""

    def __post_init__(self) -> None:
        if not 0 < self.clip_range < 1:
            raise ValueError(f"clip_range must be in (0, 1), got {self.clip_range}")
        _check_common(self)


@dataclass(frozen=True, kw_only=True)
class NftSettings:
    """Options of the row `nft`."""

    name: str = "nft"
    """The row."""
    beta: float = 1.0
    """How far the implicit good and bad policies reach past the old one; above 0."""
    kl_weight: float = 0.01
    """Weight of the squared velocity distance from the reference policy, at least 0; 0 does not
    compute it."""
    inner_steps: int = 4
    """Optimiser steps of an update, at least 1; each sees all videos at fresh noise levels."""
    old_decay_rate: float = 1e-3
    """After update n the old policy keeps min(old_decay_rate * n, old_decay_limit) of itself;
    at least 0."""
    old_decay_limit: float = 0.5
    """In [0, 1)."""
    advantage_std: str = "batch"
    """Advantages are divided by the spread of the `group` or of the whole `batch`."""
    advantage_clip: float = 5.0
    """Size of advantage at which a video counts as wholly good or bad, above 0."""

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta must be above 0, got {self.beta}")
        if not 0 <= self.old_decay_rate < math.inf:
            raise ValueError(f"old_decay_rate must be at least 0, got {self.old_decay_rate}")
        if not 0 <= self.old_decay_limit < 1:
            raise ValueError(f"old_decay_limit must be in [0, 1), got {self.old_decay_limit}")
        _check_common(self)

    def old_decay(self, update: int) -> float:
        """What the old policy keeps of itself after update `update`, counted from 1.

        Source:
            DiffusionNFT, arXiv:2509.16117, return_decay of its published code.
        """
        return min(self.old_decay_rate * update, self.old_decay_limit)


AlgorithmSettings = GrpoSettings | NftSettings
SETTINGS: dict[str, type[GrpoSettings] | type[NftSettings]] = {
    "grpo": GrpoSettings,
    "nft": NftSettings,
}
"""The options that each row of ALGORITHMS takes."""


def _check_common(settings: AlgorithmSettings) -> None:
    if SETTINGS.get(settings.name) is not type(settings):
        raise ValueError(
            f"name must be the row that {type(settings).__name__} belongs to, got {settings.name}"
        )
    if not 0 <= settings.kl_weight < math.inf:
        raise ValueError(f"kl_weight must be at least 0, got {settings.kl_weight}")
    if settings.inner_steps < 1:
        raise ValueError(f"inner_steps must be at least 1, got {settings.inner_steps}")
    if settings.advantage_std not in ("group", "batch"):
        raise ValueError(f"advantage_std must be group or batch, got {settings.advantage_std}")
    if not 0 < settings.advantage_clip < math.inf:
        raise ValueError(f"advantage_clip must be above 0, got {settings.advantage_clip}")


@dataclass(frozen=True)
class UpdateStatistics:
    """What one update did to the policy."""

    loss: float
    """Mean over the update's optimiser steps of the minimised loss, KL term included."""
    ratio_deviation: float
    """Largest |ratio - 1| over videos and recorded steps; NaN without recorded steps."""
    clip_fraction: float
    """Share of ratios outside the clip range; NaN without recorded steps."""
    kl: float
    """Mean divergence from the reference policy; 0 where kl_weight is 0 (not computed)."""
    grad_norm: float
    """Mean norm of the gradient before it is limited, over the update's optimiser steps."""


def update_policy(
    generator: AbstractVideoGenerator,
    trajectory: Trajectory,
    advantages: Tensor,
    settings: AlgorithmSettings,
    rollout: RolloutSettings,
    optimizer: torch.optim.Optimizer,
    source: torch.Generator,
) -> UpdateStatistics:
    """Move the trained adapter by the row's loss; the only place where the optimiser steps.

    Within an optimiser step gradients are summed over micro batches, so memory holds one pass of
    `micro_batch` videos. Recorded steps are split over the `inner_steps` optimiser steps by
    video; noised videos are all seen in each, at fresh noise levels.

    Args:
        generator: carries the adapter.
        trajectory: drawn by `rollout` with the same settings; judged videos only.
        advantages: [B].
        settings: the row and its options.
        rollout: micro batch, guidance, noise level.
        optimizer: from `optimizers.build_optimizer`.
        source: of noise and noise levels.
    """
    statistics: list[LossTerms] = []
    norms: list[float] = []
    parts = (generator, trajectory, advantages)
    if isinstance(settings, GrpoSettings):
        steps = recorded_losses(*parts, settings, rollout)
    else:
        steps = forward_process_losses(*parts, settings, rollout, source)
    for losses in steps:
        for terms in losses:
            (terms.loss * terms.share).backward()
            statistics.append(terms._replace(loss=terms.loss.detach()))
        norms.append(take_step(optimizer))
    return _summarise(statistics, norms)


class LossTerms(NamedTuple):
    """The loss of one micro batch, at one recorded step or noise level."""

    loss: Tensor
    """Scalar, KL term included; carries the gradient."""
    share: float
    """Its part of the optimiser step's loss."""
    kl: Tensor
    """Divergence from the reference policy; 0 where not computed."""
    log_ratio: Tensor | None
    """[B] of a recorded step, without gradient."""
    clip_fraction: float
    """NaN without recorded steps."""


def recorded_losses(
    generator: AbstractVideoGenerator,
    trajectory: Trajectory,
    advantages: Tensor,
    settings: GrpoSettings,
    rollout: RolloutSettings,
) -> Iterator[Iterator[LossTerms]]:
    """For each optimiser step its micro batches, every recorded step of them in turn."""
    parts = chunks(len(advantages), rollout.micro_batch)
    count = min(settings.inner_steps, len(parts))
    for inner in range(count):
        own = parts[inner * len(parts) // count : (inner + 1) * len(parts) // count]
        yield _replayed_losses(generator, trajectory, advantages, settings, rollout, own)


def _replayed_losses(
    generator: AbstractVideoGenerator,
    trajectory: Trajectory,
    advantages: Tensor,
    settings: GrpoSettings,
    rollout: RolloutSettings,
    parts: list[slice],
) -> Iterator[LossTerms]:
    total = sum(part.stop - part.start for part in parts) * len(trajectory.steps)
    for part in parts:
        for index in range(len(trajectory.steps)):
            reference = None
            if settings.kl_weight:
                with torch.no_grad(), reference_policy(generator.transformer):
                    reference = replay(generator, trajectory, index, part, rollout)
            step = replay(generator, trajectory, index, part, rollout)
            old_log_prob = trajectory.log_probs[part, index]
            ratios = (step.log_prob[:, None], old_log_prob[:, None])
            loss = algorithm(settings.name).loss(
                *ratios, advantages[part].to(old_log_prob), settings.clip_range
            )
            kl = torch.zeros(())
            if reference is not None:
                kl = gaussian_kl(step.mean, reference.mean, step.std)
                loss = loss + settings.kl_weight * kl
            yield LossTerms(
                loss=loss,
                share=(part.stop - part.start) / total,
                kl=kl.detach(),
                log_ratio=step.log_prob.detach() - old_log_prob,
                clip_fraction=clip_fraction(*ratios, settings.clip_range),
            )


def replay(
    generator: AbstractVideoGenerator,
    trajectory: Trajectory,
    index: int,
    part: slice,
    rollout: RolloutSettings,
) -> Transition:
    """Recorded step `index` of the videos `part`, evaluated with the active policy."""
    place = trajectory.steps[index]
    sigma, next_sigma = trajectory.sigmas[place], trajectory.sigmas[place + 1]
    latent = trajectory.latents[index, part]
    text = trajectory.embeddings[torch.arange(part.start, part.stop)]
    return trajectory.transition(
        latent,
        generator.predict(latent, sigma, text, rollout.learning_guidance),
        sigma,
        next_sigma,
        noise_level=rollout.noise_level,
        sigma_max=trajectory.sigma_max,
        next_latent=trajectory.next_latents[index, part],
    )


def forward_process_losses(
    generator: AbstractVideoGenerator,
    trajectory: Trajectory,
    advantages: Tensor,
    settings: NftSettings,
    rollout: RolloutSettings,
    source: torch.Generator,
) -> Iterator[Iterator[LossTerms]]:
    """For each optimiser step all videos in micro batches, each video at its own noise level."""
    for _ in range(settings.inner_steps):
        yield _noised_losses(generator, trajectory, advantages, settings, rollout, source)


def _noised_losses(
    generator: AbstractVideoGenerator,
    trajectory: Trajectory,
    advantages: Tensor,
    settings: NftSettings,
    rollout: RolloutSettings,
    source: torch.Generator,
) -> Iterator[LossTerms]:
    data = trajectory.final_latent
    noise = torch.randn(data.shape, generator=source).to(data)
    sigma = draw_sigmas(trajectory.sigmas, len(data), source)
    level = sigma.view(-1, *[1] * (data.ndim - 1))
    latent = (1 - level) * data + level * noise
    for part in chunks(len(data), rollout.micro_batch):
        text = trajectory.embeddings[torch.arange(part.start, part.stop)]
        inputs = (latent[part], sigma[part], text, rollout.learning_guidance)
        reference = None
        with torch.no_grad():
            with old_policy(generator.transformer):
                old_prediction = generator.predict(*inputs)
            if settings.kl_weight:
                with reference_policy(generator.transformer):
                    reference = generator.predict(*inputs)
        prediction = generator.predict(*inputs)
        loss = algorithm(settings.name).loss(
            prediction,
            old_prediction,
            latent[part],
            data[part],
            sigma[part],
            advantages[part].to(data),
            beta=settings.beta,
            advantage_limit=settings.advantage_clip,
        )
        kl = torch.zeros(())
        if reference is not None:
            kl = velocity_kl(prediction, reference)
            loss = loss + settings.kl_weight * kl
        yield LossTerms(loss, len(text) / len(data), kl.detach(), None, math.nan)


def draw_sigmas(schedule: Tensor, count: int, source: torch.Generator) -> Tensor:
    """Noise levels [B] between those of the schedule [K+1], as dense as it is.

    One falls in each B-th of the schedule, so that an update's loss depends less on luck than
    with independent draws.
    """
    steps = len(schedule) - 1
    place = (torch.rand(count, generator=source) + torch.randperm(count, generator=source)) / count
    place = (place * steps).clamp(max=steps - 1e-3)
    weight = (place - place.long()).to(schedule)
    lower = place.long().to(schedule.device)
    return (1 - weight) * schedule[lower] + weight * schedule[lower + 1]


def _summarise(terms: list[LossTerms], norms: list[float]) -> UpdateStatistics:
    """Means over the optimiser steps, whose shares each sum to 1."""
    count = len(norms)
    deviations = [
        (one.log_ratio.exp() - 1).abs().max().item() for one in terms if one.log_ratio is not None
    ]
    return UpdateStatistics(
        loss=sum(one.loss.item() * one.share for one in terms) / count,
        ratio_deviation=max(deviations, default=math.nan),
        clip_fraction=sum(one.clip_fraction * one.share for one in terms) / count,
        kl=sum(one.kl.item() * one.share for one in terms) / count,
        grad_norm=sum(norms) / count,
    )
