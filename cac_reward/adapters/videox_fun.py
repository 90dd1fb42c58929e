"""VideoX-Fun: a reward with `__call__ -> (loss, reward)` and `get_reward -> [B]`.

Batches are [B C T H W] float in [0, 1]. VideoX-Fun backpropagates through its rewards; this one has
no gradient and says so, and serves its validation and `get_reward`.

Source:
    aigc-apps/VideoX-Fun, videox_fun/reward/reward_fn.py (BaseReward, VideoAlignReward).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cac_reward.adapters.base import Scorer, VideoReward, refuse_gradient
from cac_reward.adapters.settings import scorer_of
from cac_reward.inputs import check_rate


class CaCReward:
    """CaC with the constructor and the two calls of VideoX-Fun's rewards.

    Args:
        judge: folder or hub id of the judge, the address of a server, or a scorer.
        fps: frames per second of the videos.
        device: where the judge runs.
        dtype: of the judge and of the rewards.
        max_reward: the loss is |reward - max_reward| * loss_scale; -reward * loss_scale for None.
        loss_scale: see `max_reward`.
        on_failure: 'raise', the number that stands in for a video that could not be judged, or
            'mask' for NaN; masked videos are left out of the means of `__call__`.
    """

    def __init__(
        self,
        judge: str | Path | Scorer,
        *,
        fps: float,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_reward: float | None = 1,
        loss_scale: float = 1,
        on_failure: str | float = "raise",
    ) -> None:
        scorer = scorer_of(judge, device=device, dtype=dtype)
        self.device = device
        self.dtype = dtype
        self.max_reward = max_reward
        self.loss_scale = loss_scale
        self._reward = VideoReward(
            scorer=scorer, fps=check_rate(fps), layout="CFHW", on_failure=on_failure
        )

    def __call__(
        self, batch_frames: Tensor, batch_prompt: Sequence[str] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean loss and mean reward of a batch; see `get_reward`."""
        rewards = self.get_reward(batch_frames, batch_prompt)
        distance = -rewards if self.max_reward is None else (rewards - self.max_reward).abs()
        return (distance * self.loss_scale).nanmean(), rewards.nanmean()

    def get_reward(self, batch_frames: Tensor, batch_prompt: Sequence[str] | None = None) -> Tensor:
        """[B] P(clean) of batch_frames [B 3 T H W].

        Raises:
            RuntimeError: If the frames ask for a gradient, or a video cannot be judged and
                `on_failure` is 'raise'.
        """
        refuse_gradient(batch_frames)
        scores = self._reward(batch_frames, batch_prompt).scores
        return scores.to(device=self.device, dtype=self.dtype)
