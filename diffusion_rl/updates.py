"""One update from judged videos: gradients, optimiser steps, and what they did.

Axes: B videos of this process, N of the update.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch

from diffusion_rl.algorithms import algorithm
from diffusion_rl.credit import Credit
from diffusion_rl.generators.base import AbstractVideoGenerator
from diffusion_rl.optimizers import (
    SKIPPED,
    parameters_of,
    skipped_too_many,
    spoil_gradient,
    take_step,
)
from diffusion_rl.policies import policies_of
from diffusion_rl.processes import add_up, add_up_gradients, largest
from diffusion_rl.rollout import RolloutSettings, Trajectory
from diffusion_rl.row_kinds import AlgorithmSettings
from diffusion_rl.step_losses import LossTerms, StepInputs, optimizer_steps, step_losses

logger = logging.getLogger(__name__)


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
    skipped_steps: int
    """Optimiser steps that were not taken, since their loss or gradient was not finite; all other
    numbers are of those that were, and NaN if none was."""


class NotFiniteError(RuntimeError):
    """Too many optimiser steps in a row had a loss or a gradient that is not finite."""

    def __init__(self, message: str, inputs: StepInputs) -> None:
        super().__init__(message)
        self.inputs = inputs
        """Of the last of them; the generator's weights are those that it met."""


def update_policy(
    generator: AbstractVideoGenerator,
    trajectory: Trajectory,
    credit: Credit,
    settings: AlgorithmSettings,
    rollout: RolloutSettings,
    optimizer: torch.optim.Optimizer,
    source: torch.Generator,
) -> UpdateStatistics:
    """Move what learns by the row's loss; the only place where the optimiser steps.

    Within an optimiser step gradients are summed over micro batches, so memory holds one pass of
    `update_micro_batch` videos, however many there are. Recorded steps are split over the
    `inner_steps` optimiser steps by video; noised videos are all seen in each, at fresh noise
    levels. Each process sees its own share, and its gradients are added to those of the others
    before a step is taken. Videos without a part in the row's loss (`Algorithm.idle_at_zero`) are
    not passed. An optimiser step whose loss or gradient is not finite is skipped.

    Args:
        generator: carries what learns.
        trajectory: drawn by `rollout` with the same settings; judged videos only.
        credit: advantages, and where in the videos they go.
        settings: the row and its options.
        rollout: micro batch, guidance, noise level.
        optimizer: from `optimizers.build_optimizer`.
        source: of noise and noise levels.

    Raises:
        NotFiniteError: more steps in a row were skipped than the optimiser's settings allow.
    """
    if algorithm(settings.name).idle_at_zero and not settings.kl_weight:
        learnt = credit.advantages != 0
        # One is passed all the same: a gradient of 0 is none that is missing.
        learnt[:1] |= not learnt.any()
        trajectory, credit = trajectory.only(learnt.cpu()), credit[learnt]
    policies = policies_of(generator.transformer)
    taken: list[LossTerms] = []
    norms: list[float] = []
    skipped = 0
    for step in optimizer_steps(generator, trajectory, settings, rollout, source):
        inputs = StepInputs(trajectory, credit, settings, rollout, step)
        terms = accumulate(generator, inputs)
        if not all(math.isfinite(one.loss.item()) for one in terms):
            spoil_gradient(optimizer)
        # The gradients of parts are those of all processes already.
        add_up_gradients([one for one in parameters_of(optimizer) if one not in policies.split])
        norm = take_step(optimizer, policies.split)
        if math.isfinite(norm):
            policies.sync()
            taken += terms
            norms.append(norm)
            continue
        skipped += 1
        row = optimizer.param_groups[0][SKIPPED]
        worst = [one.loss.item() for one in terms if not math.isfinite(one.loss.item())]
        message = f"{len(worst)} of {len(terms)} losses that are not, and a gradient of norm {norm}"
        if skipped_too_many(optimizer):
            raise NotFiniteError(
                f"loss and gradient must be finite, got {message}, {row} optimiser steps in a row; "
                "go on from the last checkpoint with a lower optimizer.learning_rate, or with "
                "generator.dtype=float32",
                inputs,
            )
        logger.warning("an optimiser step was skipped, the %d. in a row: %s", row, message)
    return _summarise(taken, norms, skipped)


def accumulate(generator: AbstractVideoGenerator, inputs: StepInputs) -> list[LossTerms]:
    """Add the gradient of an optimiser step to what learns, a micro batch at a time."""
    found = []
    for terms in step_losses(generator, inputs):
        (terms.loss * terms.share).backward()
        found.append(terms._replace(loss=terms.loss.detach()))
    return found


def _summarise(terms: list[LossTerms], norms: list[float], skipped: int) -> UpdateStatistics:
    """Means over the optimiser steps that were taken, whose shares sum to 1 each."""
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
    # Where no step was taken there is nothing to say.
    count = len(norms) or math.nan
    return UpdateStatistics(
        loss=loss / count,
        ratio_deviation=deviation if deviation >= 0 else math.nan,
        clip_fraction=clip_fraction / count,
        kl=kl / count,
        grad_norm=sum(norms) / count,
        skipped_steps=skipped,
    )
