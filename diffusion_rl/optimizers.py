"""AdamW on the adapter: its settings, how it is built, and one guarded step of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW on the adapter."""

    learning_rate: float = 3e-4
    """Of the first update; above 0."""
    final_share: float = 1.0
    """The learning rate falls in a straight line to this share of itself at the last update, in
    (0, 1]; 1 keeps it. Late in a run noise does more harm than the signal left does good."""
    adam_beta2: float = 0.999
    """Share of itself that Adam's mean of squared gradients keeps at each step, in [0, 1). With few
    steps, and gradients that grow as the LoRA does, a long memory lets the steps grow with them."""
    weight_decay: float = 0.0
    """At least 0."""
    max_grad_norm: float = 1.0
    """Longer gradients are scaled down to it; above 0."""
    average_decay: float = 0.0
    """What is saved is a running average of the adapter, which after each update keeps this share
    of itself, in [0, 1); it evens out the noise of single updates. 0 saves the last weights."""

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if not 0 < self.final_share <= 1:
            raise ValueError(f"final_share must be in (0, 1], got {self.final_share}")
        if not 0 <= self.adam_beta2 < 1:
            raise ValueError(f"adam_beta2 must be in [0, 1), got {self.adam_beta2}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be above 0, got {self.max_grad_norm}")
        if not 0 <= self.average_decay < 1:
            raise ValueError(f"average_decay must be in [0, 1), got {self.average_decay}")

    def learning_rate_at(self, update: int, updates: int) -> float:
        """Learning rate of update `update`, counted from 1, of `updates` in all."""
        passed = (update - 1) / max(1, updates - 1)
        return self.learning_rate * (1 - (1 - self.final_share) * passed)


def build_optimizer(
    parameters: list[torch.nn.Parameter], settings: OptimizerSettings
) -> torch.optim.AdamW:
    """AdamW whose parameter group also carries `max_grad_norm`."""
    group = {"params": parameters, "max_grad_norm": settings.max_grad_norm}
    return torch.optim.AdamW(
        [group],
        lr=settings.learning_rate,
        betas=(0.9, settings.adam_beta2),
        weight_decay=settings.weight_decay,
    )


def take_step(optimizer: torch.optim.Optimizer) -> float:
    """Limit the gradient, step, and return its norm as it was."""
    group = optimizer.param_groups[0]
    norm = torch.nn.utils.clip_grad_norm_(group["params"], group["max_grad_norm"]).item()
    if not math.isfinite(norm):
        optimizer.zero_grad(set_to_none=True)
        raise RuntimeError(
            f"gradient must be finite, got norm {norm}; resume from the last checkpoint with a "
            "lower optimizer.learning_rate, or with generator.dtype=float32"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
