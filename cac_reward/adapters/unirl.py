"""UniRL: a `BaseScorer` for its reward service.

In the reward service, reward_service/scorers/cac.py:

    from cac_reward.adapters.unirl import CaCVideoScorer
    from reward_service.scorers.registry import register

    register("cac", CaCVideoScorer)

and the row "cac": "reward_service.scorers.cac" in SCORER_MODULES. UniRL's client writes its mp4 at
`video_fps: 8` by default: set it to the generator's rate, or pass `fps` here. `cac-reward serve`
stands in for the whole service: it answers that service's /score.

Source:
    Tencent-Hunyuan/UniRL, unirl-reward-service/reward_service/scorers/{base,registry,
    videoalign}.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cac_reward.adapters.base import Scorer, VideoReward, missing_package
from cac_reward.adapters.settings import scorer_of

SUB_METRIC = "p_clean"


def __getattr__(name: str) -> type:
    """`CaCVideoScorer`, made when it is first asked for."""
    if name == "CaCVideoScorer":
        return _scorer_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _scorer_class() -> type:
    try:
        from reward_service.scorers.base import BaseScorer
    except ImportError as error:
        how = "install unirl-reward-service from Tencent-Hunyuan/UniRL"
        raise missing_package("CaCVideoScorer", "reward_service", how) from error

    class CaCVideoScorer(BaseScorer):
        """P(clean) of the video on each item's last turn; NaN where it could not be judged.

        Args:
            judge: folder or hub id of the judge, the address of a server, or a scorer.
            fps: frames per second to believe instead of the files' own.
            device: where the judge runs.
            dtype: of the judge.
            mode: 'full' or 'fast', as for `CaCScorer`.
            revision: branch, tag or commit of the hub id.
            on_failure: 'mask' for NaN, which UniRL drops by itself, 'raise', or a number.
        """

        name = "cac"
        input_kind = "video"
        sub_metric_names = (SUB_METRIC,)

        def __init__(
            self,
            judge: str | Path | Scorer,
            fps: float | None = None,
            device: str = "cuda",
            dtype: str = "bfloat16",
            mode: str = "full",
            revision: str | None = None,
            on_failure: str | float = "mask",
        ) -> None:
            scorer = scorer_of(judge, device=device, dtype=dtype, mode=mode, revision=revision)
            self._reward = VideoReward(scorer=scorer, fps=fps, on_failure=on_failure)

        def score(self, items: Sequence[Any]) -> list[dict[str, float]]:
            """One dict for each item, in order.

            Raises:
                ValueError: If an item has no video on its last turn.
            """
            for row, item in enumerate(items):
                if not item.videos or item.videos[-1] is None:
                    raise ValueError(f"item {row} must have a video on its last turn, got none")
            videos = [item.videos[-1] for item in items]
            outcome = self._reward(videos, [item.history[-1][0] for item in items])
            return [{SUB_METRIC: score} for score in outcome.scores.tolist()]

    CaCVideoScorer.__qualname__ = "CaCVideoScorer"  # So that pickle finds it by __getattr__.
    return CaCVideoScorer
