"""What the rows that replay recorded steps minimise.

Axes: B videos, K denoising steps, or latent positions of one step where each has its own ratio.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_rl.losses import Surrogate, clipped_terms, has_left_range
from diffusion_rl.shapes import check_shape

STEP_WEIGHTINGS = ("none", "longcat", "flash")


class ReplayedSteps(NamedTuple):
    """Recorded denoising steps, evaluated with the policy being trained."""

    log_probs: Tensor
    """[B K] under the policy being trained; carries the gradient."""
    old_log_probs: Tensor
    """[B K] recorded while sampling."""
    mean_shifts: Tensor
    """[B K] mean over elements of (mean - recorded mean)^2; carries the gradient."""
    stds: Tensor
    """[B K] spread of the Gaussians, above 0; the same for both policies."""
    durations: Tensor
    """[B K] sigma - next_sigma, above 0."""
    sigmas: Tensor
    """[B K] noise level that each step starts from, in (0, 1]."""
    sigma_max: Tensor
    """[B K] second level of the schedule, in (0, 1)."""
    widths: Tensor | None = None
    """[B K] how much wider than a whole latent's the logarithms of these ratios spread, at least 1;
    clip ranges are widened by it. None is 1."""


def clipped_surrogate(
    steps: ReplayedSteps,
    advantages: Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
    step_weighting: str = "none",
) -> Surrogate:
    """`clipped_surrogate_loss` of replayed steps, each times its weight.

    Args:
        steps: of any transition; weights other than "none" are meant for reverse SDEs.
        advantages: [B] one per video, or [B K].
        clip_range: As in `clipped_surrogate_loss`.
        clip_range_high: As in `clipped_surrogate_loss`.
        step_weighting: As in `step_weights`.

    Raises:
        ValueError: A shape is wrong or an option is outside its range.
    """
    check_steps(steps, advantages)
    log_ratios = steps.log_probs - steps.old_log_probs.detach()
    bounds = (clip_range, clip_range_high, steps.widths)
    terms = clipped_terms(log_ratios, advantages, *bounds)
    if step_weighting != "none":
        levels = (steps.stds, steps.durations, steps.sigmas, steps.sigma_max)
        terms = terms * step_weights(step_weighting, *levels)
    log_ratios = log_ratios.detach()
    return Surrogate(terms.mean(), log_ratios, has_left_range(log_ratios, *bounds))


def step_weights(
    name: str, stds: Tensor, durations: Tensor, sigmas: Tensor, sigma_max: Tensor
) -> Tensor:
    """Even out how hard the steps of a reverse SDE pull at the velocity.

    longcat = sqrt(sigma / (1 - min(sigma, sigma_max)) / duration)
    flash   = 1 / (duration / std + std * (1 - sigma) / (2 sigma))

    The mean of a step moves by about its duration when the velocity moves by 1, and the gradient of
    a log-probability is that over the spread. `flash` is the exact inverse of it but for a factor
    of noise, `longcat` that of its first part for `flow_sde` at a noise level of 1.

    Args:
        name: "none" | "longcat" | "flash".
        stds: spreads, above 0.
        durations: sigma - next_sigma, above 0.
        sigmas: in (0, 1].
        sigma_max: second level of the schedule.

    Returns:
        In the shape of the arguments; of "none" 1.

    Raises:
        ValueError: There is no such weighting.

    Source:
        LongCat-Video, arXiv:2510.22200, loss_reweighting of GenRL's published code, as it is there;
        Flash-GRPO, its published train_wanx2_1_flash.py, which divides the weights by their mean
        over the schedule.
    """
    if name == "none":
        return torch.ones_like(stds)
    if name == "longcat":
        return torch.sqrt(sigmas / (1 - torch.minimum(sigmas, sigma_max)) / durations)
    if name == "flash":
        return 1 / (durations / stds + stds * (1 - sigmas) / (2 * sigmas))
    known = ", ".join(STEP_WEIGHTINGS)
    raise ValueError(f"step_weighting must be one of {known}, got {name}")


def guarded_surrogate(
    steps: ReplayedSteps,
    advantages: Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
) -> Surrogate:
    """Clip ratios that are centred on 1 and spread alike at every step, so that clipping bites.

    A mean that moves lowers its own log-probability on average, so that plain ratios sit below 1
    and escape the upper bound; and their spread depends on the step's.

    log_ratio = (log_probs - old_log_probs + mean_shifts / (2 stds^2)) * stds
    loss      = mean over B, K of the clipped surrogate of exp(log_ratio), divided by durations

    Args:
        steps: of a Gaussian transition whose log_prob is its log-density.
        advantages: [B] one per video, or [B K].
        clip_range: As in `clipped_surrogate_loss`, of the normalised ratio.
        clip_range_high: As in `clipped_surrogate_loss`.

    Raises:
        ValueError: A shape is wrong or an option is outside its range.

    Source:
        GRPO-Guard, arXiv:2510.22319, train_sd3_GRPO_Guard of Flow-GRPO's published code.
    """
    check_steps(steps, advantages)
    drift = steps.mean_shifts / (2 * steps.stds**2)
    log_ratios = (steps.log_probs - steps.old_log_probs.detach() + drift) * steps.stds
    bounds = (clip_range, clip_range_high, steps.widths)
    terms = clipped_terms(log_ratios, advantages, *bounds)
    outside = has_left_range(log_ratios.detach(), *bounds)
    return Surrogate((terms / steps.durations).mean(), log_ratios.detach(), outside)


def divergence_masked_surrogate(
    steps: ReplayedSteps, advantages: Tensor, *, divergence_limit: float
) -> Surrogate:
    """Stop a step by how far its Gaussian has moved, not by one noisy sample of the ratio.

    divergence = mean_shifts / (2 stds^2)
    loss       = mean over B, K of  -ratio * A,  or 0 where divergence >= divergence_limit and the
                 ratio has gone where A pushes it (above 1 for A > 0, below 1 for A < 0)

    Args:
        steps: of a Gaussian transition whose log_prob is its log-density.
        advantages: [B] one per video, or [B K].
        divergence_limit: Above 0, per element of the latent.

    Raises:
        ValueError: A shape is wrong or the limit is not above 0.

    Source:
        Flow-DPPO, arXiv:2606.11025; FlowDPPOLoss of verl-omni.
    """
    if not divergence_limit > 0:
        raise ValueError(f"divergence_limit must be above 0, got {divergence_limit}")
    check_steps(steps, advantages)
    log_ratios = steps.log_probs - steps.old_log_probs.detach()
    advantage = advantages.detach()
    advantage = advantage[:, None] if advantage.ndim == 1 else advantage
    far = steps.mean_shifts.detach() / (2 * steps.stds**2) >= divergence_limit
    stopped = far & (log_ratios.detach() * advantage > 0)
    terms = torch.where(stopped, 0.0, -torch.exp(log_ratios) * advantage)
    return Surrogate(terms.mean(), log_ratios.detach(), stopped)


def check_steps(steps: ReplayedSteps, advantages: Tensor) -> None:
    """Hold recorded steps and advantages against their axes; every row's loss asks it first.

    Raises:
        ValueError: A shape is wrong, or a step is deterministic.
    """
    axes = check_shape("log_probs", steps.log_probs, "B K")
    for name, value in zip(ReplayedSteps._fields, steps, strict=True):
        if value is not None:
            check_shape(name, value, "B K", **axes)
    check_shape("advantages", advantages, "B" if advantages.ndim == 1 else "B K", **axes)
    for name in ("stds", "durations"):
        if not bool((getattr(steps, name) > 0).all()):
            raise ValueError(
                f"{name} must be above 0, got {getattr(steps, name).min().item()}; "
                "a deterministic step has no likelihood"
            )
