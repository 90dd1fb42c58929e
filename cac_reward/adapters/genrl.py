"""GenRL: `reward_module: cac_reward.adapters.genrl` with the reward `cac`, no code at all.

It looks up `f"{name}_score"` in the module, calls it with the device and the result with
(images, prompts, metadata); the answer must be ({"avg": Tensor [B] on that device}, {}). Videos are
tensors [N F C H W] float in [0, 1], or numpy arrays [N F H W C], float or uint8.

Source:
    ModelTC/GenRL, genrl/rewards.py (load_reward_fn, multi_score) and genrl/reward/utils.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from cac_reward.adapters.base import Scorer, VideoReward, value_range_of
from cac_reward.adapters.settings import ScorerSettings
from cac_reward.inputs import check_rate

ScoreFunction = Callable[..., tuple[dict[str, Tensor], dict[str, object]]]


def cac_score(device: torch.device | str) -> ScoreFunction:
    """Make the reward as GenRL makes its own; what it cannot say comes from the environment.

    Args:
        device: where the scores go, and the judge unless CAC_REWARD_DEVICE says otherwise.

    Raises:
        ValueError: If CAC_REWARD_JUDGE or CAC_REWARD_FPS is not set, or breaks its rule.
    """
    settings = ScorerSettings.from_environment(device=str(device))
    return score_with(settings.load(), device, fps=settings.fps, on_failure=settings.on_failure)


def score_with(
    scorer: Scorer,
    device: torch.device | str,
    *,
    fps: float | None,
    on_failure: str | float = "raise",
) -> ScoreFunction:
    """Make the reward of a scorer at hand, for a `reward_module` of one's own.

    Args:
        scorer: whoever honours the reward contract.
        device: where the scores go.
        fps: frames per second of the videos.
        on_failure: 'raise', the number that stands in for a video that could not be judged, or
            'mask' for NaN, which GenRL does not mask itself.
    """
    reward = VideoReward(scorer=scorer, fps=check_rate(fps), on_failure=on_failure)

    def score(
        images: Tensor | np.ndarray,
        prompts: Sequence[str],
        metadata: object = None,
        only_strict: bool = True,
    ) -> tuple[dict[str, Tensor], dict[str, object]]:
        layout = "FHWC" if isinstance(images, np.ndarray) else "FCHW"
        form = dataclasses.replace(reward, layout=layout, value_range=value_range_of(images))
        return {"avg": form(images, prompts).scores.to(device)}, {}

    return score
