"""What the optimiser minimises. Pure functions of tensors.

Axes: B videos, K denoising steps; "..." are the axes of a latent.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffusion_rl.shapes import check_same_shape, check_shape

MIN_NORMALISER = 1e-5
"""Smallest mean error that DiffusionNFT divides by."""

AwmWeighting = Literal["uniform", "t", "t**2", "huber", "ghuber"]
AWM_WEIGHTINGS = ("uniform", "t", "t**2", "huber", "ghuber")  # The first three by their power of t.
AWM_FLOOR = 1e-10
"""Added to AWM's mean squared error, whose root has no slope at 0."""


class Surrogate(NamedTuple):
    """A loss of ratios, and the ratios."""

    loss: Tensor
    """Scalar to minimise."""
    log_ratios: Tensor
    """[B K] logarithm of the ratio that the loss compares with 1; no gradient."""
    outside: Tensor
    """[B K] bool: whether it has left the range in which it may go on learning."""


def clipped_surrogate_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    clip_range: float,
    clip_range_high: float | None = None,
) -> Tensor:
    """Keep the policy near the one that sampled the videos while raising advantage.

    ratio = exp(log_probs - old_log_probs)
    loss  = mean over B, K of  -min(ratio * A, clip(ratio, 1 - e, 1 + h) * A),
            e = clip_range, h = clip_range_high

    Args:
        log_probs: [B K] under the policy being trained; carries the gradient.
        old_log_probs: [B K] recorded while sampling; no gradient.
        advantages: [B] one per video, shared by its K steps.
        clip_range: e above; must be in (0, 1]. Log-probabilities are means over the elements of a
            latent, so useful ranges are small (1e-4 to 1e-2).
        clip_range_high: h above, more than 0; None takes clip_range for both.

    Returns:
        Scalar loss to minimise.

    Source:
        PPO, arXiv:1707.06347, eq. 7; with two bounds DAPO, arXiv:2503.14476.

    Example:
        >>> step = torch.zeros(1, 1)
        >>> clipped_surrogate_loss(step + 0.5, step, torch.ones(1), clip_range=0.2)
        tensor(-1.2000)
    """
    axes = check_shape("log_probs", log_probs, "B K")
    check_shape("old_log_probs", old_log_probs, "B K", **axes)
    check_shape("advantages", advantages, "B", B=axes["B"])
    log_ratios = log_probs - old_log_probs.detach()
    return clipped_terms(log_ratios, advantages, clip_range, clip_range_high).mean()


def clipped_terms(
    log_ratios: Tensor,
    advantages: Tensor,
    clip_range: float,
    clip_range_high: float | None,
    widths: Tensor | None = None,
) -> Tensor:
    """[B K] what each step adds to the surrogate, for advantages [B] or [B K].

    Ranges are for the logarithm of the ratio: [B K] widths multiply its bounds log(1 - e) and
    log(1 + h).
    """
    low, high = _check_clip_range(clip_range, clip_range_high)
    ratio = torch.exp(log_ratios)
    if widths is None:
        clipped = ratio.clamp(1 - low, 1 + high)
    else:
        clipped = ratio.clamp((1 - low) ** widths, (1 + high) ** widths)
    advantage = advantages.detach()
    advantage = advantage[:, None] if advantage.ndim == 1 else advantage
    return -torch.minimum(ratio * advantage, clipped * advantage)


def has_left_range(
    log_ratios: Tensor,
    clip_range: float,
    clip_range_high: float | None,
    widths: Tensor | None = None,
) -> Tensor:
    """[B K] whether a ratio has left its range."""
    low, high = _check_clip_range(clip_range, clip_range_high)
    if widths is None:
        change = torch.exp(log_ratios) - 1
        return (change < -low) | (change > high)
    ratio = torch.exp(log_ratios)
    return (ratio < (1 - low) ** widths) | (ratio > (1 + high) ** widths)


def nft_loss(
    prediction: Tensor,
    old_prediction: Tensor,
    latent: Tensor,
    data: Tensor,
    sigma: Tensor,
    advantages: Tensor,
    *,
    beta: float,
    advantage_limit: float = 5.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Pull the velocity towards good videos and push it away from bad ones, without likelihoods.

    r      = clamp(advantages / advantage_limit / 2 + 1 / 2, 0, 1)
    good   = beta * prediction + (1 - beta) * old_prediction
    bad    = (1 + beta) * old_prediction - beta * prediction
    error  = latent - sigma * velocity - data,  for velocity = good and bad
    L      = mean over elements of weights * error^2 / max(mean over elements of |error|, 1e-5)
    loss   = mean over B of  advantage_limit * (r * L_good + (1 - r) * L_bad) / beta

    Videos that could not be judged must be left out by the caller: at advantage 0 a video still
    holds the policy near the old one.

    Args:
        prediction: [B ...] velocity of the policy being trained; carries the gradient.
        old_prediction: [B ...] velocity of the policy that sampled the videos; no gradient.
        latent: [B ...] the video's latent with noise: (1 - sigma) * data + sigma * noise.
        data: [B ...] the video's final latent.
        sigma: [] or [B] in (0, 1].
        advantages: [B] one per video.
        beta: How far the implicit good and bad policies stand from the old one; above 0.
        advantage_limit: Advantage at which a video counts as wholly good, or bad when negative;
            above 0.
        weights: Broadcastable to [B ...], of mean 1 in each video: where in it the loss counts.
            At prediction = old_prediction they weight the gradient of each position, as
            advantages * weights would in a policy gradient; r stays that of the whole video, so
            that no weight is lost to its bounds. None is 1.

    Returns:
        Scalar loss to minimise.

    Raises:
        ValueError: A shape is wrong or an option is outside its range.

    Source:
        DiffusionNFT, arXiv:2509.16117, its published training script; without weights.
    """
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta}")
    _check_advantage_limit(advantage_limit)
    sigma = _check_noised(prediction, old_prediction, latent, data, sigma, advantages)

    old_prediction = old_prediction.detach()
    good = beta * prediction + (1 - beta) * old_prediction
    bad = (1 + beta) * old_prediction - beta * prediction
    share_good = (advantages.detach() / advantage_limit / 2 + 0.5).clamp(0, 1)
    good_loss = _normalised_error(latent - sigma * good - data, weights)
    bad_loss = _normalised_error(latent - sigma * bad - data, weights)
    per_video = (share_good * good_loss + (1 - share_good) * bad_loss) / beta
    return advantage_limit * per_video.mean()


def matching_loss(
    prediction: Tensor,
    old_prediction: Tensor,
    latent: Tensor,
    data: Tensor,
    sigma: Tensor,
    advantages: Tensor,
    *,
    weights: Tensor | None = None,
) -> Tensor:
    """Learn videos as a data set is learnt, each as often as its advantage says.

    loss = mean over B of  advantages * mean over elements of weights * (prediction - velocity)^2,
           velocity = (latent - data) / sigma = noise - data

    Args:
        prediction: [B ...] velocity of the policy being trained; carries the gradient.
        old_prediction: [B ...] of the policy before the update; takes no part.
        latent: [B ...] the video's latent with noise: (1 - sigma) * data + sigma * noise.
        data: [B ...] the video's final latent.
        sigma: [] or [B] in (0, 1].
        advantages: [B] one per video, at least 0.
        weights: Broadcastable to [B ...], of mean 1 in each video. None is 1.

    Returns:
        Scalar loss to minimise.

    Raises:
        ValueError: A shape is wrong or an advantage is negative.

    Source:
        Flow matching, arXiv:2210.02747, eq. 23, of the videos that RAFT (arXiv:2304.06767) keeps.
    """
    _check_noised(prediction, old_prediction, latent, data, sigma, advantages)
    if bool((advantages < 0).any()):
        raise ValueError(
            f"advantages must be at least 0, got {advantages.min().item()}; this loss has no lower "
            "bound for videos to be avoided"
        )
    errors = matching_errors(prediction, latent, data, sigma, weights)
    return (advantages.detach() * errors).mean()


def matching_errors(
    velocity: Tensor, latent: Tensor, data: Tensor, sigma: Tensor, weights: Tensor | None = None
) -> Tensor:
    """[B] mean over elements of weights * (velocity - (latent - data) / sigma)^2, shapes checked.

    Args as in `matching_loss`; the result has the precision of `velocity`.
    """
    axes = check_shape("velocity", velocity, "B ...")
    for name, value in (("latent", latent), ("data", data)):
        check_same_shape(name, value, "velocity", velocity)
    if sigma.ndim:
        check_shape("sigma", sigma, "B", B=axes["B"])
    level = sigma.reshape(-1, *[1] * (velocity.ndim - 1))
    return _mean_square(velocity - ((latent - data) / level).to(velocity.dtype), weights)


def awm_surrogate(
    prediction: Tensor,
    old_prediction: Tensor,
    latent: Tensor,
    data: Tensor,
    sigma: Tensor,
    advantages: Tensor,
    *,
    weighting: AwmWeighting = "ghuber",
    clip_range: float = 1.0,
    advantage_limit: float = 5.0,
    weights: Tensor | None = None,
) -> Surrogate:
    """Take how well a velocity explains a noised video for its log-probability.

    error     = mean over elements of weights * (prediction - (latent - data) / sigma)^2
    log_prob  = -w,  w = error | sigma error | sigma^2 error | sigma (sqrt(error + 1e-10) - 1e-5)
                | 4 sigma ((error + 1e-10)^(1/4) - 1e-10^(1/4))
                for weighting "uniform" | "t" | "t**2" | "huber" | "ghuber"
    loss      = clipped surrogate of exp(log_prob - old log_prob) and advantages / advantage_limit

    Args:
        prediction: [B ...] velocity of the policy being trained; carries the gradient.
        old_prediction: [B ...] velocity of the policy before the update; no gradient.
        latent: [B ...] the video's latent with noise: (1 - sigma) * data + sigma * noise.
        data: [B ...] the video's final latent.
        sigma: [] or [B] in (0, 1].
        advantages: [B] one per video.
        weighting: How log-probabilities at different noise levels compare.
        clip_range: As in `clipped_surrogate_loss`.
        advantage_limit: Advantage that counts as 1, above 0.
        weights: Broadcastable to [B ...], of mean 1 in each video: where in it the error counts.
            None is 1.

    Returns:
        The loss, and ratios [B 1].

    Raises:
        ValueError: A shape is wrong or an option is outside its range.

    Source:
        Advantage weighted matching, arXiv:2509.25050, compute_log_prob_awm of its published code.
    """
    _check_noised(prediction, old_prediction, latent, data, sigma, advantages)
    _check_advantage_limit(advantage_limit)
    log_probs = [
        matching_log_probs(velocity, latent, data, sigma, weighting, weights)
        for velocity in (prediction, old_prediction.detach())
    ]
    log_ratios = (log_probs[0] - log_probs[1])[:, None]
    terms = clipped_terms(log_ratios, advantages.double() / advantage_limit, clip_range, None)
    outside = has_left_range(log_ratios.detach(), clip_range, None)
    return Surrogate(terms.mean().to(prediction.dtype), log_ratios.detach(), outside)


def matching_log_probs(
    velocity: Tensor,
    latent: Tensor,
    data: Tensor,
    sigma: Tensor,
    weighting: AwmWeighting,
    weights: Tensor | None = None,
) -> Tensor:
    """[B] float64 log-probabilities of `awm_surrogate`, arguments as there."""
    if weighting not in AWM_WEIGHTINGS:
        known = ", ".join(AWM_WEIGHTINGS)
        raise ValueError(f"weighting must be one of {known}, got {weighting}")
    square = matching_errors(velocity.double(), latent, data, sigma, weights)
    level = sigma.double().reshape(-1)
    if weighting == "huber":
        return -(torch.sqrt(square + AWM_FLOOR) - AWM_FLOOR**0.5) * level
    if weighting == "ghuber":
        return -((square + AWM_FLOOR) ** 0.25 - AWM_FLOOR**0.25) * level / 0.25
    return -square * level ** AWM_WEIGHTINGS.index(weighting)


def _normalised_error(error: Tensor, weights: Tensor | None) -> Tensor:
    """[B] squared error of each video over its own mean error, which carries no gradient."""
    normaliser = error.detach().double().abs().flatten(1).mean(dim=1).clamp_min(MIN_NORMALISER)
    return _mean_square(error, weights) / normaliser.to(error.dtype)


def _mean_square(error: Tensor, weights: Tensor | None) -> Tensor:
    """[B] of errors [B ...]."""
    square = error**2 if weights is None else weights * error**2
    return square.flatten(1).mean(dim=1)


def _check_clip_range(clip_range: float, clip_range_high: float | None) -> tuple[float, float]:
    """Both bounds, checked."""
    if not 0 < clip_range <= 1:
        raise ValueError(f"clip_range must be in (0, 1], got {clip_range}")
    if clip_range_high is not None and not clip_range_high > 0:
        raise ValueError(f"clip_range_high must be above 0, got {clip_range_high}")
    return clip_range, clip_range if clip_range_high is None else clip_range_high


def _check_advantage_limit(limit: float) -> None:
    if not limit > 0:
        raise ValueError(f"advantage_limit must be above 0, got {limit}")


def _check_noised(
    prediction: Tensor,
    old_prediction: Tensor,
    latent: Tensor,
    data: Tensor,
    sigma: Tensor,
    advantages: Tensor,
) -> Tensor:
    """The noise level as [B 1 ...] or [1 ...], everything checked."""
    axes = check_shape("advantages", advantages, "B")
    check_shape("prediction", prediction, "B ...", **axes)
    for name, value in (("old_prediction", old_prediction), ("latent", latent), ("data", data)):
        check_same_shape(name, value, "prediction", prediction)
    if sigma.ndim:
        check_shape("sigma", sigma, "B", **axes)
    return sigma.reshape(-1, *[1] * (prediction.ndim - 1))
