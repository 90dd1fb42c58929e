"""VideoAlign's `VideoVLMRewardInference`, so that CaC drops in where it is called.

Change the import, keep the call: `.reward(video_paths, prompts, ...)` returns one dict for each
video with VQ, MQ, TA and Overall. Faults are of the picture and of its motion alike, so VQ and MQ
are both P(clean); TA is P(yes) of prompt alignment, NaN without it; Overall is P(clean), or the
mean of P(clean) and TA.

Source:
    KwaiVGI/VideoAlign, inference.py.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from cac_reward.adapters.base import Scorer, VideoReward
from cac_reward.adapters.settings import scorer_of
from cac_reward.frames import resize_to_budget
from cac_reward.inputs import check_rate
from cac_reward.video import Video

DIMENSIONS = ("VQ", "MQ", "TA", "Overall")


class VideoVLMRewardInference:
    """CaC with the constructor and the call of VideoAlign's class.

    Args:
        load_from_pretrained: folder or hub id of the judge, the address of a server, or a scorer.
        load_from_pretrained_step: must be -1; a judge's folder holds one checkpoint.
        device: where the judge runs.
        dtype: of the judge.
        alignment: a second reward that says how well a clip shows its prompt, in [0, 1].
        on_failure: 'raise', 'mask' for NaN, or the number that stands in for a video that could
            not be judged. DanceGRPO turns what is raised into -1.0 by itself.
    """

    def __init__(
        self,
        load_from_pretrained: str | Path | Scorer,
        load_from_pretrained_step: int = -1,
        device: str = "cuda",
        dtype: torch.dtype = torch.bfloat16,
        *,
        alignment: Scorer | None = None,
        on_failure: str | float = "raise",
    ) -> None:
        if load_from_pretrained_step != -1:
            raise ValueError(
                "load_from_pretrained_step must be -1, got "
                f"{load_from_pretrained_step}; name the folder of that checkpoint instead"
            )
        self.device = device
        scorer = scorer_of(load_from_pretrained, device=device, dtype=dtype)
        self._clean = VideoReward(scorer=scorer, on_failure=on_failure)
        self._aligned = None
        if alignment is not None:
            self._aligned = VideoReward(scorer=alignment, on_failure=on_failure)

    def reward(
        self,
        video_paths: Sequence[str | os.PathLike[str]],
        prompts: Sequence[str],
        fps: float | None = None,
        num_frames: int | None = None,
        max_pixels: int | None = None,
        use_norm: bool = True,
    ) -> list[dict[str, float]]:
        """Score video files; their rate is read from them.

        Args:
            video_paths: B video files of any sizes and lengths.
            prompts: what each was generated from.
            fps: the judge is given this many frames per second of each video; None gives it all.
            num_frames: the judge is given this many frames of each video; not together with `fps`.
            max_pixels: larger frames are shrunk to this many pixels first.
            use_norm: P(clean) needs no scaling; both values return the same.

        Returns:
            B dicts with VQ, MQ, TA and Overall in [0, 1]; NaN where there is none.

        Raises:
            ValueError: If an argument breaks its rule.
            FileNotFoundError: If a file is missing.
            RuntimeError: If a video cannot be judged and `on_failure` is 'raise'.
        """
        if fps is not None and num_frames is not None:
            raise ValueError(f"fps must be None where num_frames is given, got {fps}, {num_frames}")
        if max_pixels is not None and max_pixels < 1:
            raise ValueError(f"max_pixels must be at least 1, got {max_pixels}")
        sample = None
        if (fps, num_frames, max_pixels) != (None, None, None):
            sample = functools.partial(
                _sampled, fps=fps, num_frames=num_frames, max_pixels=max_pixels
            )
        clean = dataclasses.replace(self._clean, sample=sample)(video_paths, prompts).scores
        aligned = torch.full_like(clean, math.nan)
        overall = clean
        if self._aligned is not None:
            aligned = dataclasses.replace(self._aligned, sample=sample)(video_paths, prompts).scores
            overall = (clean + aligned) / 2
        columns = (clean.tolist(), clean.tolist(), aligned.tolist(), overall.tolist())
        return [dict(zip(DIMENSIONS, row, strict=True)) for row in zip(*columns, strict=True)]


def _sampled(
    video: Video, *, fps: float | None, num_frames: int | None, max_pixels: int | None
) -> Video:
    """The frames of a video that the caller wants the judge to see."""
    indices, rate = sample_indices(video.num_frames, video.fps, fps, num_frames)
    frames = video.to_float(indices)
    if max_pixels is not None and video.height * video.width > max_pixels:
        frames = resize_to_budget(frames, max_pixels, 1)
    return Video.from_float(frames, rate, video.source)


def sample_indices(
    num_frames: int, fps: float, wanted_fps: float | None, wanted_frames: int | None
) -> tuple[list[int], float]:
    """Evenly spaced frames of a clip, and the rate at which they follow one another.

    Args:
        num_frames: frames of the clip.
        fps: rate of the clip.
        wanted_fps: frames per second to keep; all where the clip has no more, first and last
            where less than two would be left.
        wanted_frames: frames to keep, first and last among them.

    Raises:
        ValueError: If `wanted_fps` is not above 0, or `wanted_frames` not in [2, num_frames].

    Example:
        >>> sample_indices(9, 8.0, 4.0, None), sample_indices(9, 8.0, None, 3)
        (([0, 2, 4, 6, 8], 4.0), ([0, 4, 8], 2.0))
    """
    if wanted_frames is not None and not 2 <= wanted_frames <= num_frames:
        raise ValueError(
            f"num_frames must be in [2, {num_frames}], the video's frames, got {wanted_frames}"
        )
    if wanted_frames is None:
        if wanted_fps is None or check_rate(wanted_fps) >= fps:
            return list(range(num_frames)), fps
        step = fps / wanted_fps
        count = math.floor((num_frames - 1) / step + 1e-9) + 1
        if count >= 2:
            return [round(index * step) for index in range(count)], wanted_fps
    count = wanted_frames or 2
    step = (num_frames - 1) / (count - 1)
    return [round(index * step) for index in range(count)], fps / step
