"""A scorer that knows a clip by its colours, so that a wrong axis, range or order shows."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from cac_reward.inputs import check_prompts, check_videos
from cac_reward.report import AnomalyReport
from cac_reward.video import Video

FPS = 8.0
UNJUDGED = 250
"""Red of the first frame, of 255, that the stub cannot judge."""


@dataclass
class StubScorer:
    """P(clean) is the mean red of the first frame; notes what it was shown."""

    with_reports: bool = True
    seen: list[tuple[Tensor, list[str], float]] = field(default_factory=list)

    def __call__(
        self, videos: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Tensor | dict[str, object]:
        check_videos(videos, fps)
        check_prompts(prompts, len(videos))
        assert not videos.requires_grad
        self.seen.append((videos, list(prompts), fps))
        red = videos[:, 0, 0].mean(dim=(1, 2)).cpu()
        score = torch.where((red * 255).round() == UNJUDGED, math.nan, red)
        if not self.with_reports:
            return score
        return {
            "score": score,
            "reports": [
                AnomalyReport(
                    score=None if math.isnan(value) else value,
                    error="too red to judge" if math.isnan(value) else None,
                    judge_id="stub",
                    fps=fps,
                    num_frames=videos.shape[1],
                    prompt=prompt,
                )
                for value, prompt in zip(score.tolist(), prompts, strict=True)
            ],
        }


def clip(red: int, num_frames: int = 3, height: int = 4, width: int = 6) -> Tensor:
    """[F 3 H W] uint8: red in the first frame only; all frames and rows differ."""
    frames = torch.zeros(num_frames, 3, height, width, dtype=torch.uint8)
    frames[0, 0] = red
    for frame in range(num_frames):
        frames[frame, 1] = 10 + 20 * frame
        frames[frame, 2] = 5 * torch.arange(height, dtype=torch.uint8)[:, None]
    return frames


def as_float(frames: Tensor) -> Tensor:
    """The same in [0, 1]."""
    return frames.float() / 255


def mp4(frames: Tensor, fps: float = FPS) -> bytes:
    """The clip as a video file; its colours come back within a few steps of 255."""
    return Video(frames, fps).encode(crf=0)


def red_of(data: bytes) -> float:
    """Mean red of the first frame of a video file, as the stub will score it."""
    return Video.decode(io.BytesIO(data)).to_float([0])[0, 0].mean().item()


def expect(scores: Sequence[float], reds: Sequence[int]) -> None:
    """The scores are these reds of 255; NaN where the stub cannot judge."""
    wanted = [math.nan if red == UNJUDGED else red / 255 for red in reds]
    assert list(scores) == pytest.approx(wanted, nan_ok=True)
