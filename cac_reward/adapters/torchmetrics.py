"""torchmetrics: `CaCMetric`, the mean P(clean) over everything it was shown.

Videos are [B C F H W] float in [0, 1], as for torchmetrics' own video metrics.

Source:
    torchmetrics 1.9, Metric (add_state, update, compute).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from cac_reward.adapters.base import Scorer, VideoReward, missing_package
from cac_reward.inputs import check_rate

# The sum is kept in float64: millions of scores added in float32 lose their last digits.
STATES = {"total": torch.float64, "count": torch.int64, "failed": torch.int64}


def __getattr__(name: str) -> type:
    """`CaCMetric`, made when it is first asked for."""
    if name == "CaCMetric":
        return _metric_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _metric_class() -> type:
    try:
        from torchmetrics import Metric
    except ImportError as error:
        raise missing_package("CaCMetric", "torchmetrics", "pip install torchmetrics") from error

    class CaCMetric(Metric):
        """Mean P(clean) of the videos that could be judged; `failed` counts the others.

        Args:
            scorer: whoever honours the reward contract.
            fps: frames per second of the videos.
            layout: order of the axes of one video.
            value_range: '0..1', '-1..1' or '0..255'.
            on_failure: as for `VideoReward`; 'mask' leaves a video out of the mean.
            kwargs: those of every torchmetrics.Metric.
        """

        is_differentiable = False
        higher_is_better = True
        full_state_update = False
        total: Tensor
        count: Tensor
        failed: Tensor

        def __init__(
            self,
            scorer: Scorer,
            *,
            fps: float,
            layout: str = "CFHW",
            value_range: str = "0..1",
            on_failure: str | float = "mask",
            **kwargs: object,
        ) -> None:
            super().__init__(**kwargs)
            self._reward = VideoReward(
                scorer=scorer,
                fps=check_rate(fps),
                layout=layout,
                value_range=value_range,
                on_failure=on_failure,
            )
            for state, dtype in STATES.items():
                self.add_state(state, torch.zeros((), dtype=dtype), dist_reduce_fx="sum")

        def update(self, videos: Tensor, prompts: Sequence[str] | None = None) -> None:
            """Show it videos, B before the letters of the layout, and their prompts if known."""
            outcome = self._reward(videos, prompts)
            scores = outcome.scores.double()
            self.total += scores.nansum().to(self.total.device)
            self.count += int((~scores.isnan()).sum())
            self.failed += sum(error is not None for error in outcome.errors)

        def compute(self) -> Tensor:
            """Mean P(clean) [], float32; NaN where no video could be judged."""
            return (self.total / self.count).float()

    CaCMetric.__qualname__ = "CaCMetric"  # So that pickle finds it through __getattr__.
    return CaCMetric
