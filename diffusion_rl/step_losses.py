"""What one optimiser step learns from, and its losses: replayed steps, or the forward process.

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
from diffusion_rl.divergences import gaussian_kl, velocity_kl
from diffusion_rl.gaussian_steps import Transition
from diffusion_rl.generators.base import AbstractVideoGenerator, PromptEmbeddings
from diffusion_rl.group_losses import error_gains, group_directions, with_slopes
from diffusion_rl.losses import Surrogate
from diffusion_rl.noising import NoisedVideos, groups_of, noise_videos
from diffusion_rl.policies import old_policy, reference_policy
from diffusion_rl.processes import add_up, gather_rows
from diffusion_rl.rollout import RolloutSettings, Trajectory, predict_in_chunks, retake
from diffusion_rl.row_kinds import (
    AlgorithmSettings,
    ForwardProcessSettings,
    GainSettings,
    NoisedSettings,
    RatioSettings,
)
from diffusion_rl.sharding import in_step
from diffusion_rl.shares import chunks, chunks_of_steps, step_ranges
from diffusion_rl.surrogates import ReplayedSteps, step_weights


class OptimizerStep(NamedTuple):
    """The part of an update's videos that one optimiser step learns from."""

    videos: int
    """How many it learns from, those of other processes included."""
    parts: tuple[slice, ...]
    """Micro batches of this process: each in all recorded steps, or at all noise levels."""
    noised: tuple[NoisedVideos, ...] = ()
    """Of the forward process, all videos once for each noise level; else none."""
    before: tuple[Tensor, ...] = ()
    """[B C T H W] for each of `noised` the prediction by the policy before the update; none where
    that is the policy as it is, or not asked for."""


@dataclass(frozen=True)
class StepInputs:
    """All that an optimiser step learns from, besides the generator's weights."""

    trajectory: Trajectory
    """Judged videos only."""
    credit: Credit
    """Of those videos."""
    settings: AlgorithmSettings
    """The row and its options."""
    rollout: RolloutSettings
    """Micro batch, guidance, noise level."""
    step: OptimizerStep
    """Which part of it."""


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


def optimizer_steps(
    generator: AbstractVideoGenerator,
    trajectory: Trajectory,
    settings: AlgorithmSettings,
    rollout: RolloutSettings,
    source: torch.Generator,
) -> Iterator[OptimizerStep]:
    """The parts of an update, each drawn when its turn comes."""
    row, size = algorithm(settings.name), rollout.learning_micro_batch
    if not isinstance(settings, NoisedSettings):
        # Which videos a step learns from goes by the rollout's passes, on which shares depend.
        places = (trajectory.total, rollout.micro_batch, settings.inner_steps)
        own = chunks_of_steps(trajectory.rows, *places)
        for of_step, passes in zip(step_ranges(*places), own, strict=True):
            first, last = (passes[0].start, passes[-1].stop) if passes else (0, 0)
            cut = chunks(last - first, size)
            parts = tuple(slice(first + one.start, first + one.stop) for one in cut)
            yield OptimizerStep(len(of_step), parts)
        return
    parts = tuple(chunks(len(trajectory.final_latent), size))
    levels, count = settings.noise_levels, settings.noise_levels * settings.inner_steps
    before: list[Tensor] = []
    if row.old_policy == "anchors" and count > levels:
        # Later optimiser steps compare with the policy before the first, so it is asked now.
        state = source.get_state()
        draws = [noise_videos(generator, trajectory, source, row.of_groups) for _ in range(count)]
        source.set_state(state)
        with torch.no_grad():
            before = [
                predict_in_chunks(
                    *(generator, *draw, trajectory.embeddings),
                    *(rollout.learning_guidance, parts),
                )
                for draw in draws[levels:]
            ]
    for first in range(0, count, levels):
        noised = tuple(
            noise_videos(generator, trajectory, source, row.of_groups) for _ in range(levels)
        )
        asked = tuple(before[first - levels : first]) if first else ()
        yield OptimizerStep(trajectory.total, parts, noised, asked)


def step_losses(generator: AbstractVideoGenerator, inputs: StepInputs) -> Iterator[LossTerms]:
    """The losses of an optimiser step, a micro batch at a time."""
    own = (generator, inputs.trajectory, inputs.credit)
    if not isinstance(inputs.settings, NoisedSettings):
        yield from _replayed_losses(*own, inputs.settings, inputs.rollout, inputs.step)
        return
    for level in range(len(inputs.step.noised)):
        rest = (inputs.rollout, inputs.step, level)
        if isinstance(inputs.settings, GainSettings):
            yield from _group_losses(*own, inputs.settings, *rest)
        else:
            yield from _noised_losses(*own, inputs.settings, *rest)


def _replayed_losses(
    generator: AbstractVideoGenerator,
    trajectory: Trajectory,
    credit: Credit,
    settings: AlgorithmSettings,
    rollout: RolloutSettings,
    own: OptimizerStep,
) -> Iterator[LossTerms]:
    spare = slice(0, 1) if len(trajectory.final_latent) else None
    for place, part in enumerate(in_step(generator.transformer, own.parts, spare)):
        new = float(place < len(own.parts))  # Else only for the others' sake.
        for index in range(len(trajectory.steps)):
            reference = None
            if settings.kl_weight:
                with torch.no_grad(), reference_policy(generator.transformer):
                    reference = replay(generator, trajectory, index, part, rollout)
            step = replay(generator, trajectory, index, part, rollout)
            value = surrogate_of(step, trajectory, index, part, credit, settings)
            loss, kl = value.loss, torch.zeros(())
            if reference is not None:
                moved = (step.mean, reference.mean, step.std)
                weights = kl_weights(step, trajectory, index, part, settings)
                loss = loss + settings.kl_weight * gaussian_kl(*moved, weights)
                kl = gaussian_kl(*moved)
            yield LossTerms(
                loss=loss,
                share=new * (part.stop - part.start) / (own.videos * len(trajectory.steps)),
                kl=kl.detach(),
                log_ratio=value.log_ratios if new else None,
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
    latent, (sigma, _) = trajectory.latents[index, part], trajectory.levels(index, part)
    text = trajectory.embeddings[torch.arange(part.start, part.stop)]
    prediction = generator.predict(latent, sigma, text, rollout.learning_guidance)
    return retake(trajectory, index, part, prediction, rollout)


def surrogate_of(
    step: Transition,
    trajectory: Trajectory,
    index: int,
    part: slice,
    credit: Credit,
    settings: AlgorithmSettings,
) -> Surrogate:
    """The row's loss of one replayed step, without the KL term."""
    own = credit[part].to(step.log_prob)
    shift = (step.mean - trajectory.means[index, part]) ** 2
    log_probs = own.columns(step.log_prob, step.log_prob_map)
    sigmas, next_sigmas = (one[:, None] for one in trajectory.levels(index, part))
    positions = step.log_prob_map[0].numel()
    steps = ReplayedSteps(
        log_probs=log_probs,
        old_log_probs=own.columns(
            trajectory.log_probs[part, index], trajectory.log_prob_maps[part, index]
        ),
        mean_shifts=own.columns(shift.flatten(1).mean(dim=1), shift.mean(dim=1)),
        stds=step.std.flatten()[:, None].expand_as(log_probs),
        durations=(sigmas - next_sigmas).expand_as(log_probs),
        sigmas=sigmas.expand_as(log_probs),
        sigma_max=trajectory.sigma_max.expand_as(log_probs),
        widths=own.widths(positions),
    )
    advantages = own.column_advantages(positions)
    loss = algorithm(settings.name).loss
    return cast(Surrogate, loss(steps, advantages, **settings.loss_options))


def kl_weights(
    step: Transition, trajectory: Trajectory, index: int, part: slice, settings: AlgorithmSettings
) -> Tensor | None:
    """[b 1 ...] weights of recorded step `index` in the KL term; None where all count alike."""
    if not isinstance(settings, RatioSettings) or settings.step_weighting == "none":
        return None
    sigma, next_sigma = (one.view_as(step.std) for one in trajectory.levels(index, part))
    given = (sigma - next_sigma, sigma, trajectory.sigma_max.expand_as(step.std))
    return step_weights(settings.step_weighting, step.std, *given) ** 2


def _noised_losses(
    generator: AbstractVideoGenerator,
    trajectory: Trajectory,
    credit: Credit,
    settings: NoisedSettings,
    rollout: RolloutSettings,
    step: OptimizerStep,
    level: int,
) -> Iterator[LossTerms]:
    row, data = algorithm(settings.name), trajectory.final_latent
    anchor = settings.anchor_weight if isinstance(settings, ForwardProcessSettings) else 0.0
    noised, before = step.noised[level], step.before[level] if step.before else None
    towards = directions_of(trajectory, credit) if row.needs_directions else None
    for place, part in enumerate(in_step(generator.transformer, step.parts)):
        text = trajectory.embeddings[torch.arange(part.start, part.stop)]
        latent, sigma = noised.latent[part], noised.sigma[part]
        inputs = (latent, sigma, text, rollout.learning_guidance)
        slow = None
        if row.old_policy == "draws" or anchor:
            with torch.no_grad(), old_policy(generator.transformer):
                slow = generator.predict(*inputs)
        reference = _reference_of(generator, inputs, settings)
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
            **({} if towards is None else {"directions": towards[part]}),
            **settings.loss_options,
        )
        held = anchor * velocity_kl(prediction, slow) if slow is not None and anchor else None
        new = float(place < len(step.parts))  # Else only for the others' sake.
        share = new * len(text) / step.videos / settings.noise_levels
        yield _noised_terms(value, share, prediction, reference, settings, held)


def _group_losses(
    generator: AbstractVideoGenerator,
    trajectory: Trajectory,
    credit: Credit,
    settings: GainSettings,
    rollout: RolloutSettings,
    step: OptimizerStep,
    level: int,
) -> Iterator[LossTerms]:
    """As `group_losses` says: gains of all videos first, then passes with gradient."""
    noised, data, places = step.noised[level], trajectory.final_latent, trajectory.rows.cpu()
    guidance, options = rollout.learning_guidance, settings.gain_options
    weights = credit.to(data).weights
    weights = None if weights is None else weights[:, None]
    old, gains = first_gains(generator, trajectory, credit, settings, rollout, noised)
    everyone = (gather_rows(one, places, trajectory.total) for one in (gains, credit.advantages))
    value, slopes = with_slopes(
        algorithm(settings.name).loss,
        *(one.cpu() for one in everyone),
        groups_of(trajectory).cpu(),
        **settings.loss_options,
    )
    slopes, (passed,) = slopes[places].to(data.device), add_up([len(places)])
    for place, part in enumerate(in_step(generator.transformer, step.parts)):
        text = trajectory.embeddings[torch.arange(part.start, part.stop)]
        inputs = (noised.latent[part], noised.sigma[part], text, guidance)
        reference = _reference_of(generator, inputs, settings)
        prediction = generator.predict(*inputs)
        gains = error_gains(
            *(prediction, old[part], noised.latent[part], data[part], noised.sigma[part]),
            **options,
            weights=None if weights is None else weights[part],
        )
        # The slope is that of the whole loss, of which each video holds an even share.
        sloped = (slopes[part] * gains).sum()
        shared = value.to(sloped) * len(text) / passed
        loss = (sloped - sloped.detach() + shared) * step.videos / len(text)
        new = float(place < len(step.parts))  # Else only for the others' sake.
        share = new * len(text) / step.videos / settings.noise_levels
        yield _noised_terms(loss, share, prediction, reference, settings)


def _reference_of(
    generator: AbstractVideoGenerator,
    inputs: tuple[Tensor, Tensor, PromptEmbeddings, float],
    settings: NoisedSettings,
) -> Tensor | None:
    """The reference policy's velocities for `inputs` of `predict`; None where no KL term asks."""
    if not settings.kl_weight:
        return None
    with torch.no_grad(), reference_policy(generator.transformer):
        return generator.predict(*inputs)


def _noised_terms(
    value: Tensor | Surrogate,
    share: float,
    prediction: Tensor,
    reference: Tensor | None,
    settings: NoisedSettings,
    held: Tensor | None = None,
) -> LossTerms:
    """A row's loss of noised videos with what else holds the policy: an anchor, the KL term."""
    kl = torch.zeros(()) if reference is None else velocity_kl(prediction, reference)
    loss = value.loss if isinstance(value, Surrogate) else value
    if held is not None:
        loss = loss + held
    if reference is not None:
        loss = loss + settings.kl_weight * kl
    if isinstance(value, Surrogate):
        clipped = value.outside.double().mean().item()
        return LossTerms(loss, share, kl.detach(), value.log_ratios, clipped)
    return LossTerms(loss, share, kl.detach(), None, math.nan)


def first_gains(
    generator: AbstractVideoGenerator,
    trajectory: Trajectory,
    credit: Credit,
    settings: GainSettings,
    rollout: RolloutSettings,
    noised: NoisedVideos,
) -> tuple[Tensor, Tensor]:
    """Without gradient: the old policy's velocities [B C T H W], and gains [B] on the CPU.

    Of videos without an advantage both are 0: no loss compares them.
    """
    data = trajectory.final_latent
    taking = credit.advantages != 0
    taking[:1] |= not taking.any()  # Sharded weights come together where all processes pass.
    rows = taking.nonzero().flatten().cpu()
    old, gains = torch.zeros_like(data), torch.zeros(len(data), dtype=torch.float64)
    weights = credit.to(data).weights
    parts = chunks(len(rows), rollout.learning_micro_batch)
    for place, part in enumerate(in_step(generator.transformer, parts)):
        own = rows[part]
        at = own.to(data.device)
        inputs = (noised.latent[at], noised.sigma[at])
        asked = (*inputs, trajectory.embeddings[own], rollout.learning_guidance)
        with torch.no_grad():
            now = generator.predict(*asked)
            with old_policy(generator.transformer):
                before = generator.predict(*asked)
            gained = error_gains(
                *(now, before, inputs[0], data[at], inputs[1]),
                **settings.gain_options,
                weights=None if weights is None else weights[at][:, None],
            )
        if place < len(parts):  # Else only for the others' sake.
            old[at], gains[own] = before, gained.cpu()
    return old, gains


def directions_of(trajectory: Trajectory, credit: Credit) -> Tensor:
    """[B C T H W] as `group_directions` has them."""
    own = (trajectory.final_latent, credit.advantages, trajectory.rows)
    return group_directions(*own, groups_of(trajectory))
