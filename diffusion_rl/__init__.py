"""Fine-tune a text-to-video generator with any reward, and measure what it changed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_rl.advantages import group_advantages
    from diffusion_rl.algorithms import ALGORITHMS, Algorithm
    from diffusion_rl.losses import clipped_surrogate_loss, gaussian_kl, nft_loss, velocity_kl
    from diffusion_rl.rewards import load_callable
    from diffusion_rl.transitions import TRANSITIONS, Transition, flow_sde, ode

_HOMES = {
    "ALGORITHMS": "algorithms",
    "Algorithm": "algorithms",
    "TRANSITIONS": "transitions",
    "Transition": "transitions",
    "clipped_surrogate_loss": "losses",
    "flow_sde": "transitions",
    "gaussian_kl": "losses",
    "group_advantages": "advantages",
    "load_callable": "rewards",
    "nft_loss": "losses",
    "ode": "transitions",
    "velocity_kl": "losses",
}

__all__ = [
    "ALGORITHMS",
    "TRANSITIONS",
    "Algorithm",
    "Transition",
    "clipped_surrogate_loss",
    "flow_sde",
    "gaussian_kl",
    "group_advantages",
    "load_callable",
    "nft_loss",
    "ode",
    "velocity_kl",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that the package itself stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'diffusion_rl' has no attribute '{name}'")
    return getattr(importlib.import_module(f"diffusion_rl.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
