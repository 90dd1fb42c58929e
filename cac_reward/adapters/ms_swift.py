"""ms-swift: an outcome reward model for `--external_plugins`, `orms["cac"] = cac_orm(...)`.

ms-swift makes an object of the class, with its arguments or with none, and calls it with the
completions and, by keyword, every column; the answer is a list of numbers, None is masked.

Source:
    modelscope/ms-swift, swift/rewards/orm.py and the GRPO trainer's _prepare_rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cac_reward.adapters.base import Scorer, VideoReward
from cac_reward.adapters.settings import scorer_of
from cac_reward.adapters.texts import Render, judge_texts


def cac_orm(
    judge: str | Path | Scorer,
    *,
    render: Render | None = None,
    column: str | None = None,
    fps: float | None = None,
    device: str = "cuda",
    dtype: str = "bfloat16",
    on_failure: str | float = "mask",
) -> type:
    """Make the class.

    Args:
        judge: folder or hub id of the judge, the address of a server, or a scorer.
        render: takes the B texts that the model wrote, returns their videos: [B F 3 H W] float in
            [0, 1], or B files or clips.
        column: the data set's column to judge instead: one video file for each row, or a list with
            one, as in ms-swift's own `videos`.
        fps: frames per second of the videos; not needed for files.
        device: where the judge runs.
        dtype: of the judge.
        on_failure: 'mask' for None, 'raise', or the number that stands in for a video that could
            not be judged.

    Raises:
        ValueError: Unless one of `render` and `column` is given.
    """
    reward = VideoReward(
        scorer=scorer_of(judge, device=device, dtype=dtype), fps=fps, on_failure=on_failure
    )
    score = judge_texts(reward, render=render, column=column)

    class CaCORM:
        """P(clean) of the video that belongs to each completion."""

        def __init__(self, args: object = None, **kwargs: object) -> None:
            self.args = args

        def __call__(self, completions: Sequence[str], **columns: Any) -> list[float | None]:
            prompts = columns.get("messages", [""] * len(completions))
            return score(completions, prompts, columns).or_none()

    return CaCORM
