"""TRL: a `reward_funcs` entry for a language model whose text becomes a video.

TRL 1.x trains language models only; CaC rewards one that writes prompts for a video generator. The
function is called by keyword with prompts, completions, completion_ids, every column of the data
set and TRL's own log functions, and returns a list of numbers; None is masked by TRL.

Source:
    huggingface/trl 1.16.0, trl/trainer/grpo_trainer.py (_calculate_rewards).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cac_reward.adapters.base import Scorer, VideoReward
from cac_reward.adapters.texts import Render, judge_texts


def trl_reward(
    scorer: Scorer,
    *,
    render: Render | None = None,
    column: str | None = None,
    fps: float | None = None,
    on_failure: str | float = "mask",
) -> Callable[..., list[float | None]]:
    """Make the reward function: `GRPOTrainer(reward_funcs=trl_reward(scorer, render=..., fps=16))`.

    Args:
        scorer: whoever honours the reward contract.
        render: takes the B texts that the model wrote, returns their videos: [B F 3 H W] float in
            [0, 1], or B files or clips.
        column: the data set's column of video files to judge instead, one for each row.
        fps: frames per second of the videos; not needed for files.
        on_failure: 'mask' for None, 'raise', or the number that stands in for a video that could
            not be judged.

    Raises:
        ValueError: Unless one of `render` and `column` is given.
    """
    judge = judge_texts(
        VideoReward(scorer=scorer, fps=fps, on_failure=on_failure), render=render, column=column
    )

    def cac_reward(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        outcome = judge(completions, prompts, columns)
        if log_metric is not None:
            log_metric("cac_failed_share", outcome.failed_share)
        return outcome.or_none()

    return cac_reward
