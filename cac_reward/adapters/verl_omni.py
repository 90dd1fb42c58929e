"""verl-omni: an async `compute_score`, called by keyword with one sample at a time.

In its configuration, with any of the keyword arguments below beside path and name:

    reward.reward_functions.cac.path=pkg://cac_reward.adapters.verl_omni
    reward.reward_functions.cac.name=compute_score
    reward.reward_functions.cac.judge=Qwen/Qwen3-VL-4B-Instruct

The video is a tensor [T C H W] uint8 in [0, 255]. Everything in the answer but `score` becomes a
metric. Set `required: true`: otherwise verl-omni turns what is raised into a reward of 0.

Source:
    verl-project/verl-omni, verl_omni/reward_loop/reward_manager/{visual,multi}.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cac_reward.adapters.base import Scorer, VideoReward
from cac_reward.adapters.settings import scorer_of
from cac_reward.inputs import check_rate


async def compute_score(
    data_source: object,
    solution_image: Tensor,
    ground_truth: object,
    extra_info: Mapping[str, Any] | None = None,
    *,
    judge: str | Path | Scorer,
    fps: float | None = None,
    device: str = "cuda",
    dtype: str = "bfloat16",
    mode: str = "full",
    revision: str | None = None,
    model: str | None = None,
    on_failure: str | float = "raise",
) -> dict[str, float]:
    """Score one video; the event loop goes on while the judge looks.

    Args:
        data_source: unused.
        solution_image: [T 3 H W] uint8.
        ground_truth: where it is text, the prompt that goes into the report.
        extra_info: its `fps` is the video's rate where `fps` is None.
        judge: folder or hub id of the judge, the address of a server, or a scorer.
        fps: frames per second of the video.
        device: where the judge runs.
        dtype: of the judge.
        mode: 'full' or 'fast', as for `CaCScorer`.
        revision: branch, tag or commit of the hub id.
        model: the judge's name where the address is that of an OpenAI-compatible server.
        on_failure: 'raise', 'mask' for NaN, which verl-omni does not mask itself, or the number
            that stands in for a video that could not be judged.

    Returns:
        score, P(clean); failed, 1 where it could not be judged and else 0.

    Raises:
        ValueError: If the video or its rate is not what it must be.
        RuntimeError: If the video cannot be judged and `on_failure` is 'raise'.
    """
    rate = (extra_info or {}).get("fps") if fps is None else fps
    if rate is None:
        raise ValueError(
            "fps must be given in the reward's configuration or as extra_info['fps'], got neither"
        )
    scorer = await asyncio.to_thread(
        scorer_of, judge, device=device, dtype=dtype, mode=mode, revision=revision, model=model
    )
    reward = VideoReward(
        scorer=scorer,
        fps=check_rate(rate),
        value_range="0..255",
        on_failure=on_failure,
    )
    prompt = ground_truth if isinstance(ground_truth, str) else ""
    outcome = await asyncio.to_thread(reward, solution_image[None], [prompt])
    return {"score": outcome.scores.item(), "failed": outcome.failed_share}
