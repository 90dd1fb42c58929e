"""Fine-tune a text-to-video generator with any reward, and measure what it changed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_rl.advantages import group_advantages
    from diffusion_rl.algorithms import ALGORITHMS, Algorithm
    from diffusion_rl.guards import GuardSettings
    from diffusion_rl.losses import clipped_surrogate_loss, gaussian_kl, nft_loss, velocity_kl
    from diffusion_rl.rewards import Reward, RewardSettings, judge_videos, load_callable
    from diffusion_rl.transitions import TRANSITIONS, Transition, flow_sde, ode

__all__ = [
    "ALGORITHMS",
    "TRANSITIONS",
    "Algorithm",
    "GuardSettings",
    "Reward",
    "RewardSettings",
    "Transition",
    "clipped_surrogate_loss",
    "flow_sde",
    "gaussian_kl",
    "group_advantages",
    "judge_videos",
    "load_callable",
    "nft_loss",
    "ode",
    "velocity_kl",
]

_HOMES = {
    "advantages": ("group_advantages",),
    "algorithms": ("ALGORITHMS", "Algorithm"),
    "guards": ("GuardSettings",),
    "losses": ("clipped_surrogate_loss", "gaussian_kl", "nft_loss", "velocity_kl"),
    "rewards": ("Reward", "RewardSettings", "judge_videos", "load_callable"),
    "transitions": ("TRANSITIONS", "Transition", "flow_sde", "ode"),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that the package itself stays light."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"diffusion_rl.{module}"), name)
    raise AttributeError(f"module 'diffusion_rl' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
