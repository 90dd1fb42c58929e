"""flow_grpo and its relatives: DiffusionNFT, Astrolabe and World-R1.

Their `multi_score` makes a reward with `name_score(device)` and calls it with
(images, prompts, metadata), from several threads; it must return ([number per video], {}). Videos
are tensors [B F C H W] or numpy arrays [B F H W C], float in [0, 1] or uint8; the kind of array
tells the layout, never its sizes. The rate is not passed on, so it is set here.

Source:
    yifan123/flow_grpo, flow_grpo/rewards.py; franklinz233/Astrolabe, astrolabe/rewards.py;
    microsoft/World-R1, flow_grpo/rewards.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from cac_reward.adapters.base import Scorer, VideoReward, value_range_of
from cac_reward.adapters.settings import ScorerSettings
from cac_reward.inputs import check_rate

ScoreFunction = Callable[..., tuple[list[float], dict[str, Any]]]


def cac_score(device: object) -> ScoreFunction:
    """Make the reward as flow_grpo makes its own; what it cannot say comes from the environment.

    Args:
        device: where the judge runs; CAC_REWARD_DEVICE overrides it.

    Raises:
        ValueError: If CAC_REWARD_JUDGE or CAC_REWARD_FPS is not set, or breaks its rule.
    """
    settings = ScorerSettings.from_environment(device=str(device))
    return score_with(settings.load(), fps=settings.fps, on_failure=settings.on_failure)


def score_with(
    scorer: Scorer, *, fps: float | None, on_failure: str | float = "raise"
) -> ScoreFunction:
    """Make the reward of a scorer at hand: `"cac": lambda device: score_with(scorer, fps=16)`.

    Args:
        scorer: whoever honours the reward contract.
        fps: frames per second of the videos.
        on_failure: 'raise', the number that stands in for a video that could not be judged, or
            'mask' for NaN, which these trainers do not mask themselves.
    """
    reward = VideoReward(scorer=scorer, fps=check_rate(fps), on_failure=on_failure)

    def score(
        images: Tensor | np.ndarray,
        prompts: Sequence[str],
        metadata: object = None,
        only_strict: bool = True,
    ) -> tuple[list[float], dict[str, Any]]:
        layout = "FHWC" if isinstance(images, np.ndarray) else "FCHW"
        form = dataclasses.replace(reward, layout=layout, value_range=value_range_of(images))
        return form(images, prompts).scores.tolist(), {}

    return score
