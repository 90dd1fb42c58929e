"""DDPO-style rewards, (images, prompts, metadata) -> (rewards, metadata), as in ddpo-pytorch.

TRL's removed DDPOTrainer asked for the same. Videos are tensors [B F C H W] float in [0, 1].

Source:
    kvablack/ddpo-pytorch, ddpo_pytorch/rewards.py; huggingface/trl before 0.24, DDPOTrainer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from cac_reward.adapters.base import Scorer, VideoReward
from cac_reward.inputs import check_rate


def ddpo_reward(
    scorer: Scorer, *, fps: float, on_failure: str | float = "raise"
) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """Make the reward function.

    Args:
        scorer: whoever honours the reward contract.
        fps: frames per second of the videos.
        on_failure: 'raise', the number that stands in for a video that could not be judged, or
            'mask' for NaN, which these trainers do not mask themselves.

    Returns:
        A function of videos [B F C H W], B prompts and their metadata, which returns scores [B]
        float32 on the CPU and {"reports": B reports, "errors": B texts or None}.
    """
    reward = VideoReward(scorer=scorer, fps=check_rate(fps), on_failure=on_failure)

    def score(
        images: Tensor, prompts: Sequence[str], metadata: object = None
    ) -> tuple[Tensor, dict[str, Any]]:
        outcome = reward(images, prompts)
        return outcome.scores, {"reports": outcome.reports, "errors": outcome.errors}

    return score
