"""From what a language model wrote to the videos that are judged for it.

Axes: B completions, F frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cac_reward.adapters.base import Outcome, VideoReward

Render = Callable[[list[str]], Any]
"""render(B texts) -> their videos: [B F 3 H W] float in [0, 1], or B clips or files."""

JudgeTexts = Callable[[Sequence[Any], Sequence[Any], Mapping[str, Any]], Outcome]
"""judge(B completions, B prompts, columns of the data set) -> outcome."""


def judge_texts(reward: VideoReward, *, render: Render | None, column: str | None) -> JudgeTexts:
    """Judge the video that each completion makes, or the one that stands in its row.

    Args:
        reward: judges the videos.
        render: makes the videos from the completions; they are also the prompts judged.
        column: name of a column with a video file in each row, or a list with one; the prompts
            judged are those of the rows.

    Raises:
        ValueError: Unless exactly one of `render` and `column` is given. The function that is
            returned raises it where the column is missing or a row holds not one video.
    """
    if (render is None) == (column is None):
        raise ValueError(
            "render or column must be given, and not both: the videos are made from what the "
            f"model wrote, or stand in the data; got {render!r} and {column!r}"
        )

    def judge(
        completions: Sequence[Any], prompts: Sequence[Any], columns: Mapping[str, Any]
    ) -> Outcome:
        if render is not None:
            texts = [text_of(completion) for completion in completions]
            return reward(render(texts), texts)
        if column not in columns:
            raise ValueError(f"column must be among {sorted(columns)}, got {column!r}")
        videos = [_only_one(str(column), row) for row in columns[str(column)]]
        return reward(videos, [text_of(prompt) for prompt in prompts])

    return judge


def _only_one(column: str, row: Any) -> Any:
    """The video of a row that may be a list with one."""
    if not isinstance(row, list | tuple):
        return row
    if len(row) != 1:
        raise ValueError(f"{column} must hold one video in each row, got {len(row)}")
    return row[0]


def text_of(message: Any) -> str:
    """The text of a prompt or completion: plain, or the last of a list of chat messages."""
    if isinstance(message, list | tuple) and message:
        message = message[-1]
    content = message.get("content", "") if isinstance(message, Mapping) else message
    if isinstance(content, str):
        return content
    blocks = content if isinstance(content, list | tuple) else []
    return "".join(block.get("text", "") for block in blocks if isinstance(block, Mapping))
