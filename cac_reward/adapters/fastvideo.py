"""FastVideo: a `RewardScorer`, the callable that `MultiRewardScorer(scorers={...})` weighs.

It is called with media [B C T H W] float in [0, 1] and B prompts, and returns a tensor [B].

Source:
    hao-ai-lab/FastVideo, fastvideo/train/methods/rl/rewards/media.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from cac_reward.adapters.base import Scorer, VideoReward, refuse_gradient
from cac_reward.inputs import check_rate


def fastvideo_scorer(
    scorer: Scorer, *, fps: float, on_failure: str | float = "raise"
) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """Make the callable.

    Args:
        scorer: whoever honours the reward contract.
        fps: frames per second of the videos.
        on_failure: 'raise', the number that stands in for a video that could not be judged, or
            'mask' for NaN, which FastVideo does not mask itself.

    Returns:
        A function of media [B 3 T H W] and prompts, which returns [B] float32 where the media are;
        it raises RuntimeError where a gradient is asked for.
    """
    reward = VideoReward(scorer=scorer, fps=check_rate(fps), layout="CFHW", on_failure=on_failure)

    def score(media: Tensor, prompts: Sequence[str]) -> Tensor:
        refuse_gradient(media)
        return reward(media, prompts).scores.to(media.device)

    return score
