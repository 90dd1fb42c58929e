"""The table of algorithms: each is a row of parts, never a script."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from diffusion_rl.advantages import group_advantages
from diffusion_rl.losses import clipped_surrogate_loss, nft_loss
from diffusion_rl.transitions import TransitionFunction, flow_sde, ode


@dataclass(frozen=True)
class Algorithm:
    """One row: how videos are drawn, compared and learnt from."""

    transition: TransitionFunction
    """The step taken where the rollout explores."""
    advantages: Callable[..., Tensor]
    """(scores [B], group [B], *, std, clip) -> [B]."""
    loss: Callable[..., Tensor]
    """What is minimised; a scalar."""
    learning_steps: Literal["recorded", "forward_process"]
    """Which steps learn: those the rollout recorded, or fresh noisings of the final latents."""

    @property
    def uses_old_policy(self) -> bool:
        """Whether a slowly following copy of the policy draws the videos."""
        return self.learning_steps == "forward_process"


ALGORITHMS: dict[str, Algorithm] = {
    "grpo": Algorithm(flow_sde, group_advantages, clipped_surrogate_loss, "recorded"),
    "nft": Algorithm(ode, group_advantages, nft_loss, "forward_process"),
}
"""By name. A new algorithm is one function and one row.

Source:
    grpo: Flow-GRPO, arXiv:2505.05470. nft: DiffusionNFT, arXiv:2509.16117.
"""


def algorithm(name: str) -> Algorithm:
    """Look up a row by name.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in ALGORITHMS:
        near = difflib.get_close_matches(name, list(ALGORITHMS), n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ValueError(
            f"algorithm.name must be one of {', '.join(ALGORITHMS)}, got '{name}'{hint}"
        )
    return ALGORITHMS[name]
