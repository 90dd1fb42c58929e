"""Findings drawn over frames, and clips made ready to be looked at.

Axes: F frames, C channels (3), H height, W width.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from cac_reward.report import Finding
from cac_reward.video import Video

COLOURS = ("#e6194b", "#ffb000", "#00b4d8", "#8ac926", "#c77dff", "#ff7f51")
"""One for each finding of a clip, in turn; the same in frames, timeline and table."""

_LEAST_SIDE = 192
# Half the time of x264's default for 1 dB; what is embedded is looked at, not judged.
_PRESET = "veryfast"
MOST_SIDE = 480
"""Pixels; what is embedded to be looked at is no wider or higher."""


def draw_findings(frames: Tensor, findings: Sequence[Finding], fps: float) -> Tensor:
    """Outline every finding's boxes in the frames of its window.

    A finding without boxes outlines the whole frame. Each finding has its colour from `COLOURS`.

    Args:
        frames: [F 3 H W] uint8, all frames of the clip.
        findings: What to draw.
        fps: Frames per second of the clip.

    Returns:
        [F 3 H W] uint8, a copy.
    """
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.dtype != torch.uint8:
        raise ValueError(
            "frames must be uint8 [frames, 3, height, width], got "
            f"{frames.dtype} {tuple(frames.shape)}"
        )
    drawn = frames.clone()
    height, width = frames.shape[-2:]
    for number, finding in enumerate(findings):
        colour = _rgb(COLOURS[number % len(COLOURS)])
        for index in finding.window.frame_indices(len(frames), fps):
            boxes = [box.coordinates for box in finding.boxes_at(index / fps)]
            for x1, y1, x2, y2 in boxes or [(0.0, 0.0, 1.0, 1.0)]:
                corners = (x1 * width, y1 * height, x2 * width, y2 * height)
                _outline(drawn[index], corners, colour)
    return drawn


def video_uri(video: Video) -> str:
    """A clip as an mp4 inside a data URI; odd sides are padded by repeating the edge."""
    data = _even(video).encode(preset=_PRESET)
    return "data:video/mp4;base64," + base64.b64encode(data).decode("ascii")


def write_overlay(path: str | Path, video: Video, findings: Sequence[Finding]) -> None:
    """Write a clip with its findings drawn over it as an mp4, whole or not at all.

    Args:
        path: Of the mp4; its folder is made if missing.
        video: The clip, at its own size; odd sides are padded by repeating the edge.
        findings: What to draw.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = draw_findings(video.frames, findings, video.fps)
    _even(Video(drawn, video.fps, video.source)).save(path)


def fit_for_display(video: Video) -> Video:
    """Bring a clip to a size to look at: tiny ones grow by whole pixels, large ones shrink."""
    height, width = video.height, video.width
    if min(height, width) < _LEAST_SIDE and max(height, width) * 2 <= MOST_SIDE:
        times = min(-(-_LEAST_SIDE // min(height, width)), MOST_SIDE // max(height, width))
        grown = video.frames.repeat_interleave(times, 2).repeat_interleave(times, 3)
        return Video(grown, video.fps, video.source)
    if max(height, width) <= MOST_SIDE:
        return video
    scale = MOST_SIDE / max(height, width)
    size = (max(2, round(height * scale)), max(2, round(width * scale)))
    small = torch.stack([_shrink(frame, size) for frame in video.frames])
    return Video(small, video.fps, video.source)


def _even(video: Video) -> Video:
    """The same clip with even sides, as h264 needs them."""
    odd = (0, video.width % 2, 0, video.height % 2)
    if not any(odd):
        return video
    frames = pad(video.frames.float(), odd, mode="replicate").to(torch.uint8)
    return Video(frames, video.fps, video.source)


def _rgb(colour: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(colour[1:])), dtype=torch.uint8)


def _outline(frame: Tensor, corners: tuple[float, float, float, float], colour: Tensor) -> None:
    """Draw a rectangle into [3 H W] uint8, in place; it stays inside the frame."""
    height, width = frame.shape[-2:]
    thick = max(1, round(min(height, width) / 120))
    left = min(max(0, int(corners[0])), width - 1)
    top = min(max(0, int(corners[1])), height - 1)
    right = max(left + 1, min(width, round(corners[2])))
    bottom = max(top + 1, min(height, round(corners[3])))
    paint = colour[:, None, None]
    frame[:, top : min(top + thick, bottom), left:right] = paint
    frame[:, max(bottom - thick, top) : bottom, left:right] = paint
    frame[:, top:bottom, left : min(left + thick, right)] = paint
    frame[:, top:bottom, max(right - thick, left) : right] = paint


def _shrink(frame: Tensor, size: tuple[int, int]) -> Tensor:
    """[3 H W] uint8 to another size."""
    small = interpolate(
        frame[None].float(), size=size, mode="bilinear", antialias=True, align_corners=False
    )
    return small[0].round().clamp(0, 255).to(torch.uint8)
