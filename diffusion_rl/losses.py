"""What the optimiser minimises. Pure functions of tensors.

Axes: B videos, K denoising steps; "..." are the axes of a latent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_rl.shapes import check_shape

MIN_NORMALISER = 1e-5
"""Smallest mean error that DiffusionNFT divides by."""


def clipped_surrogate_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_range: float
) -> Tensor:
    """Keep the policy near the one that sampled the videos while raising advantage.

    ratio = exp(log_probs - old_log_probs)
    loss  = mean over B, K of  -min(ratio * A, clip(ratio, 1 - e, 1 + e) * A),  e = clip_range

    Args:
        log_probs: [B K] under the policy being trained; carries the gradient.
        old_log_probs: [B K] recorded while sampling; no gradient.
        advantages: [B] one per video, shared by its K steps.
        clip_range: e above; must be in (0, 1). Log-probabilities are means over the elements of a
            latent, so useful ranges are small (1e-4 to 1e-2).

    Returns:
        Scalar loss to minimise.

    Source:
        PPO, arXiv:1707.06347, eq. 7.

    Example:
        >>> step = torch.zeros(1, 1)
        >>> clipped_surrogate_loss(step + 0.5, step, torch.ones(1), clip_range=0.2)
        tensor(-1.2000)
    """
    _check_clip_range(clip_range)
    axes = check_shape("log_probs", log_probs, "B K")
    check_shape("old_log_probs", old_log_probs, "B K", **axes)
    check_shape("advantages", advantages, "B", B=axes["B"])

    ratio = torch.exp(log_probs - old_log_probs.detach())
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    advantage = advantages.detach()[:, None]
    return -torch.minimum(ratio * advantage, clipped * advantage).mean()


def clip_fraction(log_probs: Tensor, old_log_probs: Tensor, clip_range: float) -> float:
    """Say what share of the ratios has left the range, where the surrogate may stop learning.

    Args:
        log_probs: [B K] under the policy being trained.
        old_log_probs: [B K] recorded while sampling.
        clip_range: In (0, 1).

    Returns:
        In [0, 1].
    """
    _check_clip_range(clip_range)
    axes = check_shape("log_probs", log_probs, "B K")
    check_shape("old_log_probs", old_log_probs, "B K", **axes)
    ratio = torch.exp(log_probs.detach() - old_log_probs.detach())
    return ((ratio - 1).abs() > clip_range).double().mean().item()


def gaussian_kl(mean: Tensor, reference_mean: Tensor, std: Tensor) -> Tensor:
    """Measure how far one step's Gaussian has moved from the reference policy's.

    kl = mean over B and elements of  (mean - reference_mean)^2 / (2 std^2)

    The exact divergence of two Gaussians of equal spread, per element of the latent (as the
    log-probabilities of `transitions` are).

    Args:
        mean: [B ...] of the policy being trained; carries the gradient.
        reference_mean: [B ...] of the frozen reference; no gradient.
        std: Broadcastable to [B ...], above 0; the same for both.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: The means differ in shape, or a spread is not above 0.
    """
    _check_same_shape("reference_mean", reference_mean, "mean", mean)
    if not bool((std > 0).all()):
        raise ValueError(
            f"std must be above 0, got {std.min().item()}; a deterministic step has no divergence, "
            "use velocity_kl"
        )
    return ((mean - reference_mean.detach()) ** 2 / (2 * std.detach() ** 2)).mean()


def velocity_kl(prediction: Tensor, reference_prediction: Tensor) -> Tensor:
    """Measure how far the predicted velocity has moved from the reference policy's.

    kl = mean over B and elements of  (prediction - reference_prediction)^2

    Args:
        prediction: [B ...] of the policy being trained; carries the gradient.
        reference_prediction: [B ...] of the frozen reference; no gradient.

    Returns:
        Scalar, at least 0.

    Source:
        DiffusionNFT, arXiv:2509.16117, its published training script.
    """
    _check_same_shape("reference_prediction", reference_prediction, "prediction", prediction)
    return ((prediction - reference_prediction.detach()) ** 2).mean()


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
) -> Tensor:
    """Pull the velocity towards good videos and push it away from bad ones, without likelihoods.

    r      = clamp(advantages / advantage_limit / 2 + 1 / 2, 0, 1)
    good   = beta * prediction + (1 - beta) * old_prediction
    bad    = (1 + beta) * old_prediction - beta * prediction
    error  = latent - sigma * velocity - data,  for velocity = good and bad
    L      = mean over elements of error^2 / max(mean over elements of |error|, 1e-5)
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

    Returns:
        Scalar loss to minimise.

    Raises:
        ValueError: A shape is wrong or an option is outside its range.

    Source:
        DiffusionNFT, arXiv:2509.16117, its published training script.
    """
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta}")
    if not advantage_limit > 0:
        raise ValueError(f"advantage_limit must be above 0, got {advantage_limit}")
    axes = check_shape("advantages", advantages, "B")
    check_shape("prediction", prediction, "B ...", **axes)
    for name, value in (("old_prediction", old_prediction), ("latent", latent), ("data", data)):
        _check_same_shape(name, value, "prediction", prediction)
    if sigma.ndim:
        check_shape("sigma", sigma, "B", **axes)
        sigma = sigma.reshape(-1, *[1] * (prediction.ndim - 1))

    old_prediction = old_prediction.detach()
    good = beta * prediction + (1 - beta) * old_prediction
    bad = (1 + beta) * old_prediction - beta * prediction
    share_good = (advantages.detach() / advantage_limit / 2 + 0.5).clamp(0, 1)
    good_loss = _normalised_error(latent - sigma * good - data)
    bad_loss = _normalised_error(latent - sigma * bad - data)
    per_video = (share_good * good_loss + (1 - share_good) * bad_loss) / beta
    return advantage_limit * per_video.mean()


def _normalised_error(error: Tensor) -> Tensor:
    """[B] squared error of each video over its own mean error, which carries no gradient."""
    normaliser = error.detach().double().abs().flatten(1).mean(dim=1).clamp_min(MIN_NORMALISER)
    return (error**2).flatten(1).mean(dim=1) / normaliser.to(error.dtype)


def _check_clip_range(clip_range: float) -> None:
    if not 0 < clip_range < 1:
        raise ValueError(f"clip_range must be in (0, 1), got {clip_range}")


def _check_same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} must have the shape of {other_name} {tuple(other.shape)}, "
            f"got {tuple(tensor.shape)}"
        )
