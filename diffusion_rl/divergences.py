"""How far a policy has moved from another. Pure functions of tensors.

Axes: B videos; "..." are the axes of a latent.
"""

from __future__ import annotations

from torch import Tensor

from diffusion_rl.shapes import check_same_shape


def gaussian_kl(
    mean: Tensor, reference_mean: Tensor, std: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Measure how far one step's Gaussian has moved from the reference policy's.

    kl = mean over B and elements of  weights * (mean - reference_mean)^2 / (2 std^2)

    Without weights the exact divergence of two Gaussians, per element of the latent.

    Args:
        mean: [B ...] of the policy being trained; carries the gradient.
        reference_mean: [B ...] of the frozen reference; no gradient.
        std: Broadcastable to [B ...], above 0; the same for both.
        weights: Broadcastable to [B ...], at least 0; None is 1.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: The means differ in shape, or a spread is not above 0.
    """
    check_same_shape("reference_mean", reference_mean, "mean", mean)
    if not bool((std > 0).all()):
        raise ValueError(
            f"std must be above 0, got {std.min().item()}; a deterministic step has no divergence, "
            "use velocity_kl"
        )
    kl = (mean - reference_mean.detach()) ** 2 / (2 * std.detach() ** 2)
    return (kl if weights is None else weights * kl).mean()


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
    check_same_shape("reference_prediction", reference_prediction, "prediction", prediction)
    return ((prediction - reference_prediction.detach()) ** 2).mean()
