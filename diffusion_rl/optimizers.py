"""The optimiser: its settings, its learning rate over a run, and one guarded step of it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffusion_rl.processes import add_up

OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "muon")
"""AdamW of torch; three AdamWs of bitsandbytes; torch's Adafactor; torch's Muon with AdamW for what
is no matrix."""
SCHEDULES = ("constant", "linear", "cosine")
SKIPPED = "skipped_in_a_row"
"""Key of a parameter group: how many optimiser steps in a row, up to now, were not taken."""
FROM_BITSANDBYTES = {
    "adamw_8bit": "AdamW8bit",
    "paged_adamw": "PagedAdamW32bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
}
STATE_BYTES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw": 0, "paged_adamw_8bit": 0, "muon": 4}
"""Bytes of state on the device for each weight that learns: Adam's two means in float32 or in 8
bits, none where they are paged out, Muon's one. Adafactor keeps next to nothing for matrices."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """How what learns is moved."""

    name: str = "adamw"
    """One of OPTIMIZERS; those of bitsandbytes need that package and a device it supports."""
    learning_rate: float = 3e-4
    """Of the first update after warm-up; above 0."""
    warmup_updates: int = 0
    """The first so many updates have rates that rise to it in equal steps; at least 0."""
    schedule: str = "linear"
    """How the rate falls to `final_share` of itself at the last update: in a straight line, along
    half a cosine, or not at all (constant)."""
    final_share: float = 1.0
    """Share of the learning rate left at the last update, in (0, 1]; 1 keeps it. Late in a run
    noise does more harm than the signal left does good."""
    adam_beta2: float = 0.999
    """Share of itself that Adam's mean of squared gradients keeps at each step, in [0, 1). With few
    steps, and gradients that grow as the LoRA does, a long memory lets the steps grow with them."""
    weight_decay: float = 0.0
    """At least 0."""
    max_grad_norm: float = 1.0
    """Longer gradients are scaled down to it; above 0."""
    average_decay: float = 0.0
    """What is saved is a running average of what learns, which after each update keeps this share
    of itself, in [0, 1); it evens out the noise of single updates. 0 saves the last weights."""
    skip_limit: int = 3
    """Optimiser steps in a row that are skipped because their loss or gradient is not finite; one
    more stops the run. At least 0."""

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise ValueError(f"name must be one of {', '.join(OPTIMIZERS)}, got {self.name}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if self.warmup_updates < 0:
            raise ValueError(f"warmup_updates must be at least 0, got {self.warmup_updates}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule}")
        if not 0 < self.final_share <= 1:
            raise ValueError(f"final_share must be in (0, 1], got {self.final_share}")
        if self.schedule == "constant" and self.final_share < 1:
            raise ValueError(
                f"final_share must be left out with schedule 'constant', got {self.final_share}"
            )
        if self.schedule == "cosine" and self.final_share == 1:
            raise ValueError("final_share must be below 1 with schedule 'cosine', got 1.0")
        if not 0 <= self.adam_beta2 < 1:
            raise ValueError(f"adam_beta2 must be in [0, 1), got {self.adam_beta2}")
        if self.name == "adafactor" and self.adam_beta2 != 0.999:
            raise ValueError(
                f"adam_beta2 must be left out with optimizer 'adafactor', got {self.adam_beta2}"
            )
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be above 0, got {self.max_grad_norm}")
        if not 0 <= self.average_decay < 1:
            raise ValueError(f"average_decay must be in [0, 1), got {self.average_decay}")
        if self.skip_limit < 0:
            raise ValueError(f"skip_limit must be at least 0, got {self.skip_limit}")

    def learning_rate_at(self, update: int, updates: int) -> float:
        """Learning rate of update `update`, counted from 1, of `updates` in all.

        Nothing else decides it, so that a run that was interrupted goes on with the same rates.
        """
        rising = update / (self.warmup_updates + 1)
        if rising < 1:
            return self.learning_rate * rising
        first = self.warmup_updates + 1
        passed = (update - first) / max(1, updates - first)
        if self.schedule == "cosine":
            passed = (1 - math.cos(math.pi * passed)) / 2
        return self.learning_rate * (1 - (1 - self.final_share) * passed)


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon for matrices and AdamW for all else, as one optimiser with one state.

    Muon's steps are scaled to the size of AdamW's, so that both take the same learning rate.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], settings: OptimizerSettings) -> None:
        self.parts: list[torch.optim.Optimizer] = []
        decay = settings.weight_decay
        # torch's optimisers refuse to have nothing to move.
        if matrices := [one for one in parameters if one.ndim == 2]:
            muon = torch.optim.Muon(matrices, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
            self.parts.append(muon)
        if others := [one for one in parameters if one.ndim != 2]:
            betas = (0.9, settings.adam_beta2)
            self.parts.append(torch.optim.AdamW(others, betas=betas, weight_decay=decay))
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of both, with rates and state as they are in this optimiser."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state
            part.step()
        return loss


def build_optimizer(
    parameters: list[nn.Parameter], settings: OptimizerSettings
) -> torch.optim.Optimizer:
    """The optimiser that the settings name; its groups also carry what `take_step` reads.

    Raises:
        ImportError: it is of bitsandbytes, which is not installed.
    """
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "weight_decay": settings.weight_decay,
    }
    optimizer: torch.optim.Optimizer
    if settings.name == "muon":
        optimizer = MuonWithAdamW(parameters, settings)
    elif settings.name == "adafactor":
        optimizer = torch.optim.Adafactor(parameters, **options)
    else:
        kind = torch.optim.AdamW
        if settings.name in FROM_BITSANDBYTES:
            kind = getattr(_bitsandbytes(settings.name).optim, FROM_BITSANDBYTES[settings.name])
        optimizer = kind(parameters, betas=(0.9, settings.adam_beta2), **options)
    for group in optimizer.param_groups:
        group |= {
            "lr": settings.learning_rate,
            "max_grad_norm": settings.max_grad_norm,
            "skip_limit": settings.skip_limit,
            SKIPPED: 0,
        }
    return optimizer


def _bitsandbytes(name: str) -> Any:
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ImportError(
            f"optimizer.name={name} needs bitsandbytes; install it with: "
            'pip install ".[quantization]", or use optimizer.name=adafactor, which keeps as little'
        ) from error


def take_step(
    optimizer: torch.optim.Optimizer, split: Collection[nn.Parameter] = frozenset()
) -> float:
    """Limit the gradient, step unless it is not finite, and return its norm as it was.

    A step that is not taken leaves weights and state as they were, and is counted.

    Args:
        optimizer: from `build_optimizer`.
        split: those of its parameters of which every process moves its own part.
    """
    group = optimizer.param_groups[0]
    norm = _limit_gradient(parameters_of(optimizer), group["max_grad_norm"], split)
    if math.isfinite(norm):
        optimizer.step()
        group[SKIPPED] = 0
    else:
        group[SKIPPED] = group.get(SKIPPED, 0) + 1
    optimizer.zero_grad(set_to_none=True)
    return norm


def _limit_gradient(
    parameters: Sequence[nn.Parameter], largest: float, split: Collection[nn.Parameter]
) -> float:
    """Scale the gradient down to norm `largest`; return the norm that it had."""
    if not split:
        return nn.utils.clip_grad_norm_(parameters, largest).item()
    parts = [one.grad for one in parameters if one.grad is not None and one in split]
    whole = [one.grad for one in parameters if one.grad is not None and one not in split]
    (square,) = add_up([nn.utils.get_total_norm(parts).item() ** 2])
    norm = math.sqrt(square + nn.utils.get_total_norm(whole).item() ** 2)
    nn.utils.clip_grads_with_norm_(parameters, largest, torch.tensor(norm))
    return norm


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """What it moves, of all its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def spoil_gradient(optimizer: torch.optim.Optimizer) -> None:
    """Make the gradient not finite, as the loss was that it came from."""
    for parameter in parameters_of(optimizer):
        if parameter.grad is not None and parameter.grad.numel():  # A part may be empty.
            parameter.grad.fill_(math.nan)
            return


def skipped_too_many(optimizer: torch.optim.Optimizer) -> bool:
    """Whether more steps in a row were skipped than the settings allow."""
    group = optimizer.param_groups[0]
    return group[SKIPPED] > group["skip_limit"]
