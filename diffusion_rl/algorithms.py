"""The table of algorithms: each is a row of parts, never a script."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from diffusion_rl.advantages import (
    best_advantages,
    group_advantages,
    history_advantages,
    paired_advantages,
)
from diffusion_rl.group_losses import preference_loss
from diffusion_rl.losses import awm_surrogate, matching_loss, nft_loss
from diffusion_rl.surrogates import (
    clipped_surrogate,
    divergence_masked_surrogate,
    guarded_surrogate,
)
from diffusion_rl.transitions import (
    TransitionFunction,
    dance_sde,
    ddim,
    flow_sde,
    ode,
)


@dataclass(frozen=True)
class Algorithm:
    """One row: how videos are drawn, compared and learnt from."""

    transition: TransitionFunction
    """The step taken where the rollout explores."""
    advantages: Callable[..., Any]
    """Scores [B] to advantages [B]: a function of `advantages`."""
    loss: Callable[..., Any]
    """What is minimised: of replayed steps (`surrogates`), of noised videos (a scalar, or a
    Surrogate where there are ratios), or of what they gained (`group_losses`)."""
    learning_steps: Literal["recorded", "forward_process"]
    """Which steps learn: those the rollout recorded, or fresh noisings of the final latents."""
    old_policy: Literal["none", "draws", "anchors", "compares"] = "none"
    """What a copy of the policy from earlier updates does: it draws the videos, the policy is held
    near it, or gains are measured from it."""
    of_groups: bool = False
    """Whether the loss is one of all videos of an update at once, as `group_losses` has it; then
    those of a group learn at the same noise."""
    needs_directions: bool = False
    """Whether the loss of noised videos takes `directions` [B ...], what the better videos of a
    group have in common (`group_losses.group_directions`)."""
    idle_at_zero: bool = False
    """Whether a video of advantage 0 has no part in the loss, and need not be passed."""
    needs_density: bool = False
    """Whether the loss relies on log_prob being the Gaussian's log-density, which `cps` is not."""

    @property
    def uses_old_policy(self) -> bool:
        """Whether a copy of the policy from earlier updates is kept."""
        return self.old_policy != "none"

    @property
    def uses_history(self) -> bool:
        """Whether videos are compared with what their prompt scored in earlier updates."""
        return self.advantages is history_advantages


ALGORITHMS: dict[str, Algorithm] = {
    "ddpo": Algorithm(ddim, history_advantages, clipped_surrogate, "recorded"),
    "grpo": Algorithm(flow_sde, group_advantages, clipped_surrogate, "recorded"),
    "dance_grpo": Algorithm(dance_sde, group_advantages, clipped_surrogate, "recorded"),
    "mix_grpo": Algorithm(flow_sde, group_advantages, clipped_surrogate, "recorded"),
    "grpo_guard": Algorithm(
        flow_sde, group_advantages, guarded_surrogate, "recorded", needs_density=True
    ),
    "dppo": Algorithm(
        flow_sde, group_advantages, divergence_masked_surrogate, "recorded", needs_density=True
    ),
    "nft": Algorithm(ode, group_advantages, nft_loss, "forward_process", "draws"),
    "awm": Algorithm(ode, group_advantages, awm_surrogate, "forward_process", "anchors"),
    "raft": Algorithm(ode, best_advantages, matching_loss, "forward_process", idle_at_zero=True),
    "online_dpo": Algorithm(
        *(ode, paired_advantages, preference_loss, "forward_process", "compares"),
        of_groups=True,
        idle_at_zero=True,
    ),
}
"""By name. A new algorithm is at most one pure function, one row here and one class in
`row_settings`; docs/algorithms.md describes each.

Source:
    ddpo: DDPO, arXiv:2305.13301. grpo: Flow-GRPO, arXiv:2505.05470. dance_grpo: DanceGRPO,
    arXiv:2505.07818. mix_grpo: MixGRPO, arXiv:2507.21802. grpo_guard: GRPO-Guard,
    arXiv:2510.22319. dppo: Flow-DPPO, arXiv:2606.11025. nft: DiffusionNFT, arXiv:2509.16117.
    awm: Advantage weighted matching, arXiv:2509.25050. raft: RAFT, arXiv:2304.06767.
    online_dpo: Flow-DPO, arXiv:2501.13918.
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
