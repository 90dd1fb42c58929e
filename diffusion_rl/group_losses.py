"""Losses that set the videos of a group against one another, of one number for each video.

The number is a video's gain: by how much better the policy explains it than the old policy does. A
pass of the transformer holds some videos of a group only, and other processes hold others. So gains
are asked without gradient first and put together; the slope of the loss with regard to each of them
is all that a pass with gradient needs to know of the others:

    gradient of loss(gains) = sum over videos of  slope of the loss * gradient of the video's gain

Source:
    Gradient caching, arXiv:2101.06983, section 3, for the two passes.

Axes: N videos of the update, B of a pass; "..." are the axes of a latent.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus

from diffusion_rl.losses import AwmWeighting, matching_log_probs
from diffusion_rl.processes import sum_over_teams
from diffusion_rl.shapes import check_shape


def error_gains(
    prediction: Tensor,
    old_prediction: Tensor,
    latent: Tensor,
    data: Tensor,
    sigma: Tensor,
    *,
    weighting: AwmWeighting = "uniform",
    weights: Tensor | None = None,
) -> Tensor:
    """Measure by how much a policy explains noised videos better than the old one.

    gain = log_prob of prediction - log_prob of old_prediction, as `awm_surrogate` has them

    With weighting "uniform" that is what the mean squared error has fallen by.

    Args:
        prediction: [B ...] velocity of the policy being trained; carries the gradient.
        old_prediction: [B ...] velocity that gains are measured from; no gradient.
        latent: [B ...] the videos' latents with noise: (1 - sigma) * data + sigma * noise.
        data: [B ...] their final latents.
        sigma: [] or [B] in (0, 1].
        weighting: As in `awm_surrogate`.
        weights: Broadcastable to [B ...], of mean 1 in each video. None is 1.

    Returns:
        [B] float64, above 0 where the policy does better.

    Raises:
        ValueError: A shape is wrong or there is no such weighting.
    """
    now, old = (
        matching_log_probs(velocity, latent, data, sigma, weighting, weights)
        for velocity in (prediction, old_prediction.detach())
    )
    return now - old


def preference_loss(gains: Tensor, advantages: Tensor, group: Tensor, *, beta: float) -> Tensor:
    """Let preferred videos gain more than those that they are preferred to.

    margin = gain of the preferred - gain of the other
    loss   = mean over groups of mean over their pairs of  -log sigmoid(beta / 2 * margin)

    A pair is a video of positive advantage and another of its group with a negative one.

    Args:
        gains: [N] of `error_gains`; carries the gradient.
        advantages: [N] of which the sign counts.
        group: [N] integer.
        beta: Above 0.

    Returns:
        Scalar; 0 where no group has a pair.

    Raises:
        ValueError: A shape is wrong or beta is not above 0.

    Source:
        Diffusion-DPO, arXiv:2311.12908, eq. 14, for velocities Flow-DPO, arXiv:2501.13918, with the
        same noise for both videos of a pair and no weight of the noise level.

    Example:
        >>> gains, group = torch.tensor([0.02, 0.0]), torch.zeros(2, dtype=torch.long)
        >>> preference_loss(gains, torch.tensor([1.0, -1.0]), group, beta=100.0)
        tensor(0.3133)
    """
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta}")
    axes = check_shape("gains", gains, "N")
    check_shape("advantages", advantages, "N", **axes)
    check_shape("group", group, "N", **axes)
    losses = []
    for index in group.unique():
        preferred = gains[(group == index) & (advantages > 0)]
        others = gains[(group == index) & (advantages < 0)]
        if len(preferred) and len(others):
            margins = preferred[:, None] - others
            losses.append(softplus(-beta / 2 * margins).mean())
    return torch.stack(losses).mean() if losses else gains.sum() * 0.0


def group_directions(data: Tensor, advantages: Tensor, rows: Tensor, group: Tensor) -> Tensor:
    """Say where the better videos of a group lie from its worse ones.

    direction = mean over the videos of the group of  advantage * data

    That is the covariance of advantages and videos, where the advantages of a group average 0.

    Args:
        data: [B ...] latents of this process.
        advantages: [B].
        rows: [B] long, their places among all.
        group: [N] long, of all videos of the update.

    Returns:
        [B ...] the direction of each video's group, those of other processes included.
    """
    _, slots, counts = group.unique(return_inverse=True, return_counts=True)
    slots = slots.cpu()[rows.cpu()].to(data.device)
    shape = (-1, *[1] * (data.ndim - 1))
    found = data.new_zeros((len(counts), *data.shape[1:]))
    found.index_add_(0, slots, advantages.to(data).view(shape) * data)
    return (sum_over_teams(found) / counts.to(data).view(shape))[slots]


def with_slopes(
    loss: Callable[..., Tensor], gains: Tensor, *others: Tensor, **options: object
) -> tuple[Tensor, Tensor]:
    """A loss of gains [N], and its slope [N] with regard to each of them."""
    with torch.enable_grad():
        gains = gains.detach().requires_grad_()
        value = loss(gains, *others, **options)
        (slopes,) = torch.autograd.grad(value, gains)
    return value.detach(), slopes
