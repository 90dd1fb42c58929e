"""Fine-tune a text-to-video generator with any reward, and measure what it changed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_rl.advantages import group_advantages, history_advantages, separate_advantages
    from diffusion_rl.algorithms import ALGORITHMS, Algorithm
    from diffusion_rl.divergences import gaussian_kl, velocity_kl
    from diffusion_rl.gaussian_steps import Transition
    from diffusion_rl.guards import GuardSettings
    from diffusion_rl.losses import Surrogate, awm_surrogate, clipped_surrogate_loss, nft_loss
    from diffusion_rl.rewards import Reward, RewardSettings, judge_videos, load_callable
    from diffusion_rl.surrogates import (
        ReplayedSteps,
        clipped_surrogate,
        divergence_masked_surrogate,
        guarded_surrogate,
    )
    from diffusion_rl.transitions import (
        TRANSITIONS,
        cps,
        dance_sde,
        ddim,
        flow_sde,
        flow_sde_cut,
        flow_sde_wan,
        ode,
    )

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "GuardSettings",
    "ReplayedSteps",
    "Reward",
    "RewardSettings",
    "Surrogate",
    "TRANSITIONS",
    "Transition",
    "awm_surrogate",
    "clipped_surrogate",
    "clipped_surrogate_loss",
    "cps",
    "dance_sde",
    "ddim",
    "divergence_masked_surrogate",
    "flow_sde",
    "flow_sde_cut",
    "flow_sde_wan",
    "gaussian_kl",
    "group_advantages",
    "guarded_surrogate",
    "history_advantages",
    "judge_videos",
    "load_callable",
    "nft_loss",
    "ode",
    "separate_advantages",
    "velocity_kl",
]

_HOMES = {
    "advantages": (
        "group_advantages",
        "history_advantages",
        "separate_advantages",
    ),
    "algorithms": (
        "ALGORITHMS",
        "Algorithm",
    ),
    "divergences": (
        "gaussian_kl",
        "velocity_kl",
    ),
    "gaussian_steps": ("Transition",),
    "guards": ("GuardSettings",),
    "losses": (
        "Surrogate",
        "awm_surrogate",
        "clipped_surrogate_loss",
        "nft_loss",
    ),
    "rewards": (
        "Reward",
        "RewardSettings",
        "judge_videos",
        "load_callable",
    ),
    "surrogates": (
        "ReplayedSteps",
        "clipped_surrogate",
        "divergence_masked_surrogate",
        "guarded_surrogate",
    ),
    "transitions": (
        "TRANSITIONS",
        "cps",
        "dance_sde",
        "ddim",
        "flow_sde",
        "flow_sde_cut",
        "flow_sde_wan",
        "ode",
    ),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that the package itself stays light."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"diffusion_rl.{module}"), name)
    raise AttributeError(f"module 'diffusion_rl' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
