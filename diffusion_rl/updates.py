"""One update of the adapter from judged videos: replayed steps, or the forward process.

Axes: B videos of this process, N of the update, K denoising steps, S recorded ones; latents
[B C T H W].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from diffusion_rl.algorithms import algorithm
from diffusion_rl.credit import Credit
from diffusion_rl.generators.base import AbstractVideoGenerator
from diffusion_rl.losses import Surrogate, gaussian_kl, velocity_kl
from diffusion_rl.optimizers import take_step
from diffusion_rl.policies import old_policy, policies_of, reference_policy
from diffusion_rl.processes import add_up, add_up_gradients, largest
from diffusion_rl.rollout import RolloutSettings, Trajectory, predict_in_chunks
from diffusion_rl.row_settings import AlgorithmSettings, ForwardProcessSettings
from diffusion_rl.shares import chunks, chunks_of_steps, step_ranges
from diffusion_rl.surrogates import ReplayedSteps
from diffusion_rl.transitions import Transition


@dataclass(frozen=True)
class UpdateStatistics:
    """What one update did to the policy."""

    loss: float
    """Mean over the update's optimiser steps of the minimised loss, KL term included."""
    ratio_deviation: float
    """Largest |ratio - 1| over videos and steps, the ratio as the row's loss uses it; NaN for rows
    without ratios."""
    clip_fraction: float
    """Share of ratios that have left the range in which they may learn; NaN for rows without
    ratios."""
    kl: float
    """Mean divergence from the reference policy; 0 where kl_weight is 0 (not computed)."""
    grad_norm: float
    """Mean norm of the gradient before it is limited, over the update's optimiser steps."""


def update_policy(
    generator: AbstractVideoGenerator,
    trajectory: Trajectory,
    credit: Credit,
    settings: AlgorithmSettings,
    rollout: RolloutSettings,
    optimizer: torch.optim.Optimizer,
    source: torch.Generator,
) -> UpdateStatistics:
    """Move the trained adapter by the row's loss; the only place where the optimiser steps.

    Within an optimiser step gradients are summed over micro batches, so memory holds one pass of
    `micro_batch` videos. Recorded steps are split over the `inner_steps` optimiser steps by
    video; noised videos are all seen in each, at fresh noise levels. Each process sees its own
    share, and its gradients are added to those of the others before a step is taken.

    Args:
        generator: carries the adapter.
        trajectory: drawn by `rollout` with the same settings; judged videos only.
        credit: advantages, and where in the videos they go.
        settings: the row and its options.
        rollout: micro batch, guidance, noise level.
        optimizer: from `optimizers.build_optimizer`.
        source: of noise and noise levels.
    """
    statistics: list[LossTerms] = []
    norms: list[float] = []
    parts = (generator, trajectory, credit)
    if isinstance(settings, ForwardProcessSettings):
        steps = forward_process_losses(*parts, settings, rollout, source)
    else:
        steps = recorded_losses(*parts, settings, rollout)
    for losses in steps:
        for terms in losses:
            (terms.loss * terms.share).backward()
            statistics.append(terms._replace(loss=terms.loss.detach()))
        for group in optimizer.param_groups:
            add_up_gradients(group["params"])
        norms.append(take_step(optimizer))
        policies_of(generator.transformer).sync()
    return _summarise(statistics, norms)


class LossTerms(NamedTuple):
    """The loss of one micro batch, at one recorded step or noise level."""

    loss: Tensor
    """Scalar, KL term included; carries the gradient."""
    share: float
    """Its part of the optimiser step's loss; those of all processes sum to 1."""
    kl: Tensor
    """Divergence from the reference policy; 0 where not computed."""
    log_ratio: Tensor | None
    """[B 1] or, of each latent position, [B P] as the loss uses it, without gradient; None where it
    uses none."""
    clip_fraction: float
    """NaN without ratios."""


def recorded_losses(
    generator: AbstractVideoGenerator,
    trajectory: Trajectory,
    credit: Credit,
    settings: AlgorithmSettings,
    rollout: RolloutSettings,
) -> Iterator[Iterator[LossTerms]]:
    """For each optimiser step its micro batches, every recorded step of them in turn."""
    places = (trajectory.total, rollout.micro_batch, settings.inner_steps)
    ranges = step_ranges(*places)
    steps = chunks_of_steps(trajectory.rows, *places)
    for of_step, parts in zip(ranges, steps, strict=True):
        size = len(of_step) * len(trajectory.steps)
        yield _replayed_losses(generator, trajectory, credit, settings, rollout, parts, size)


def _replayed_losses(
    generator: AbstractVideoGenerator,
    trajectory: Trajectory,
    credit: Credit,
    settings: AlgorithmSettings,
    rollout: RolloutSettings,
    parts: list[slice],
    total: int,
) -> Iterator[LossTerms]:
    for part in parts:
        for index in range(len(trajectory.steps)):
            reference = None
            if settings.kl_weight:
                with torch.no_grad(), reference_policy(generator.transformer):
                    reference = replay(generator, trajectory, index, part, rollout)
            step = replay(generator, trajectory, index, part, rollout)
            value = surrogate_of(step, trajectory, index, part, credit, settings)
            loss, kl = value.loss, torch.zeros(())
            if reference is not None:
                kl = gaussian_kl(step.mean, reference.mean, step.std)
                loss = loss + settings.kl_weight * kl
            yield LossTerms(
                loss=loss,
                share=(part.stop - part.start) / total,
                kl=kl.detach(),
                log_ratio=value.log_ratios,
                clip_fraction=value.outside.double().mean().item(),
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


def surrogate_of(
    step: Transition,
    trajectory: Trajectory,
    index: int,
    part: slice,
    credit: Credit,
    settings: AlgorithmSettings,
) -> Surrogate:
    """The row's loss of one replayed step, without the KL term."""
    place, own = trajectory.steps[index], credit[part].to(step.log_prob)
    shift = (step.mean - trajectory.means[index, part]) ** 2
    log_probs = own.columns(step.log_prob, step.log_prob_map)
    duration = trajectory.sigmas[place] - trajectory.sigmas[place + 1]
    positions = step.log_prob_map[0].numel()
    steps = ReplayedSteps(
        log_probs=log_probs,
        old_log_probs=own.columns(
            trajectory.log_probs[part, index], trajectory.log_prob_maps[part, index]
        ),
        mean_shifts=own.columns(shift.flatten(1).mean(dim=1), shift.mean(dim=1)),
        stds=step.std.flatten()[:, None].expand_as(log_probs),
        durations=duration.expand_as(log_probs),
        widths=own.widths(positions),
    )
    advantages = own.column_advantages(positions)
    loss = algorithm(settings.name).loss
    return cast(Surrogate, loss(steps, advantages, **settings.loss_options))


class NoisedVideos(NamedTuple):
    """Final latents with noise, as flow matching adds it."""

    latent: Tensor
    """[B C T H W] (1 - sigma) * data + sigma * noise."""
    sigma: Tensor
    """[B]."""


def forward_process_losses(
    generator: AbstractVideoGenerator,
    trajectory: Trajectory,
    credit: Credit,
    settings: ForwardProcessSettings,
    rollout: RolloutSettings,
    source: torch.Generator,
) -> Iterator[Iterator[LossTerms]]:
    """For each optimiser step all videos in micro batches, each video at its own noise levels."""
    levels, count = settings.noise_levels, settings.noise_levels * settings.inner_steps
    before: list[Tensor | None] = [None] * count
    own_chunks = chunks(len(trajectory.final_latent), rollout.micro_batch)
    if algorithm(settings.name).old_policy == "anchors" and count > levels:
        # Later optimiser steps compare with the policy before the first, so it is asked now.
        state = source.get_state()
        draws = [noise_videos(generator, trajectory, source) for _ in range(count)]
        source.set_state(state)
        with torch.no_grad():
            before[levels:] = [
                predict_in_chunks(
                    *(generator, *draw, trajectory.embeddings),
                    *(rollout.learning_guidance, own_chunks),
                )
                for draw in draws[levels:]
            ]
    for first in range(0, count, levels):
        yield (
            terms
            for old_prediction in before[first : first + levels]
            for terms in _noised_losses(
                *(generator, trajectory, credit, settings, rollout),
                *(noise_videos(generator, trajectory, source), old_prediction),
            )
        )


def _noised_losses(
    generator: AbstractVideoGenerator,
    trajectory: Trajectory,
    credit: Credit,
    settings: ForwardProcessSettings,
    rollout: RolloutSettings,
    noised: NoisedVideos,
    before: Tensor | None,
) -> Iterator[LossTerms]:
    row, data = algorithm(settings.name), trajectory.final_latent
    for part in chunks(len(data), rollout.micro_batch):
        text = trajectory.embeddings[torch.arange(part.start, part.stop)]
        latent, sigma = noised.latent[part], noised.sigma[part]
        inputs = (latent, sigma, text, rollout.learning_guidance)
        slow, reference = None, None
        with torch.no_grad():
            if row.old_policy == "draws" or settings.anchor_weight:
                with old_policy(generator.transformer):
                    slow = generator.predict(*inputs)
            if settings.kl_weight:
                with reference_policy(generator.transformer):
                    reference = generator.predict(*inputs)
        prediction = generator.predict(*inputs)
        old = prediction.detach() if before is None else before[part]
        own = credit[part].to(data)
        value = row.loss(
            prediction,
            slow if row.old_policy == "draws" else old,
            latent,
            data[part],
            sigma,
            own.advantages,
            weights=None if own.weights is None else own.weights[:, None],
            **settings.loss_options,
        )
        loss, kl = value.loss if isinstance(value, Surrogate) else value, torch.zeros(())
        if slow is not None and settings.anchor_weight:
            loss = loss + settings.anchor_weight * velocity_kl(prediction, slow)
        if reference is not None:
            kl = velocity_kl(prediction, reference)
            loss = loss + settings.kl_weight * kl
        share = len(text) / trajectory.total / settings.noise_levels
        if isinstance(value, Surrogate):
            clipped = value.outside.double().mean().item()
            yield LossTerms(loss, share, kl.detach(), value.log_ratios, clipped)
        else:
            yield LossTerms(loss, share, kl.detach(), None, math.nan)


def noise_videos(
    generator: AbstractVideoGenerator, trajectory: Trajectory, source: torch.Generator
) -> NoisedVideos:
    """Every video at a noise level of its own, where what learns takes part.

    Both follow from the video's place among all of the update's, so that `source` moves on alike on
    every process.
    """
    data = trajectory.final_latent
    noise = torch.zeros(data.shape)
    places = {row: place for place, row in enumerate(trajectory.rows.tolist())}
    for row in range(trajectory.total):
        drawn = torch.randn(data.shape[1:], generator=source)
        if row in places:
            noise[places[row]] = drawn
    noise = noise.to(data)
    schedule = generator.learning_schedule(trajectory.sigmas)
    sigma = draw_sigmas(schedule, trajectory.total, source)
    sigma = sigma[trajectory.rows.to(sigma.device)]
    level = sigma.view(-1, *[1] * (data.ndim - 1))
    return NoisedVideos((1 - level) * data + level * noise, sigma)


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
    """Means over the optimiser steps, whose shares each sum to 1 over the processes."""
    count = len(norms)
    deviations = [
        (one.log_ratio.exp() - 1).abs().max().item() for one in terms if one.log_ratio is not None
    ]
    loss, clip_fraction, kl = add_up(
        [
            sum(one.loss.item() * one.share for one in terms),
            sum(one.clip_fraction * one.share for one in terms),
            sum(one.kl.item() * one.share for one in terms),
        ]
    )
    (deviation,) = largest([max(deviations, default=-math.inf)])
    return UpdateStatistics(
        loss=loss / count,
        ratio_deviation=deviation if deviation >= 0 else math.nan,
        clip_fraction=clip_fraction / count,
        kl=kl / count,
        grad_norm=sum(norms) / count,
    )
