"""Muon for convolution kernels; torch.optim.Muon takes matrices only."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Push all singular values of a matrix towards 1 by Newton-Schulz iteration.

    Source:
        Keller Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024;
        the coefficients are torch.optim.Muon's defaults.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x.bfloat16() / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


class ConvolutionMuon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised over (output channels) x (everything else).

    Args:
        parameters: Kernels of at least two dimensions.
        lr: Step size, matched to AdamW's by scaling with the root of the larger side.
        momentum: Decay of the running gradient, in [0, 1).
        weight_decay: Decoupled decay.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(
            list(parameters), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move every kernel that has a gradient."""
        for group in self.param_groups:
            for kernel in group["params"]:
                if kernel.grad is None:
                    continue
                state = self.state[kernel]
                if not state:
                    state["momentum"] = torch.zeros_like(kernel)
                state["momentum"].lerp_(kernel.grad, 1 - group["momentum"])
                ahead = kernel.grad.lerp(state["momentum"], group["momentum"])
                flat = ahead.reshape(len(ahead), -1)
                update = orthogonalise(flat).reshape(kernel.shape)
                kernel.mul_(1 - group["lr"] * group["weight_decay"])
                kernel.add_(update, alpha=-0.2 * group["lr"] * max(flat.shape) ** 0.5)
