"""Videos for a page: the judge's boxes on the frames, its windows on a time line, as a data URI.

Axes: F frames, C channels, H height, W width.
"""

from __future__ import annotations

import base64
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_rl.shapes import check_shape
from diffusion_rl.tracking import write_video

SMALLEST_SIDE = 192
"""Pixels; smaller clips are enlarged by a whole factor, pixel for pixel."""
MAX_WEBP_PIXELS = 8_000_000
"""Pixels of all frames together up to which a clip is a lossless WebP; larger ones are MP4."""
STRIP, STRIP_GAP = 12, 2
TINT = 0.6
"""Share of red where blame is 1."""
RED, AMBER, GREY, WHITE = (
    (0.90, 0.16, 0.22),
    (0.98, 0.72, 0.20),
    (0.30, 0.33, 0.38),
    (1.0, 1.0, 1.0),
)


@dataclass(frozen=True)
class Mark:
    """One fault that a judge found."""

    type: str
    """What kind of fault."""
    window: tuple[float, float]
    """Start and end in seconds, half-open."""
    boxes: tuple[tuple[float, tuple[float, float, float, float]], ...] = ()
    """(time in seconds, (x1, y1, x2, y2) relative to the frame)."""
    why: str = ""
    """The judge's own words."""

    def boxes_at(self, time: float) -> list[tuple[float, float, float, float]]:
        """The boxes of the nearest time that has any."""
        nearest = min((abs(at - time) for at, _ in self.boxes), default=0.0)
        return [box for at, box in self.boxes if abs(at - time) <= nearest + 1e-6]


@dataclass(frozen=True)
class Clip:
    """A video and what a judge said of it."""

    video: Tensor
    """[F C H W] float in [0, 1]."""
    fps: float
    """Frames per second, above 0."""
    score: float | None = None
    """Of the judge; None or NaN where there is none."""
    marks: tuple[Mark, ...] = ()
    """Faults found."""
    windows: tuple[tuple[float, float], ...] = ()
    """Stretches in seconds that the judge looked at again."""
    note: str = ""
    """Anything else to write below the video, e.g. what another judge says."""

    def __post_init__(self) -> None:
        axes = check_shape("video", self.video, "F C H W")
        if axes["C"] != 3 or not axes["F"]:
            raise ValueError(
                "video must have axes [F C H W] with 3 channels and at least one frame, "
                f"got shape {tuple(self.video.shape)}"
            )
        if not self.fps > 0:
            raise ValueError(f"fps must be above 0, got {self.fps}")


def judged_clip(video: Tensor, fps: float, report: Any = None, note: str = "") -> Clip:
    """Make a clip from a video and a judge's report.

    Args:
        video: [F C H W] float in [0, 1].
        fps: Frames per second.
        report: A mapping, or an object whose to_dict() gives one, with `score`, `windows`
            [[start, end], ...] and `findings` [{"type", "window": [start, end],
            "boxes": [{"time", "box": [x1, y1, x2, y2]}], "why"}]; any may be absent. None where
            there is no report; anything else is written below the video as text.
        note: Anything else to write below the video.

    Raises:
        ValueError: The findings of the report have another form.
    """
    if hasattr(report, "to_dict"):
        report = report.to_dict()
    if report is None:
        return Clip(video, fps, note=note)
    if not isinstance(report, Mapping):
        return Clip(video, fps, note="; ".join(text for text in (str(report), note) if text))
    try:
        marks = tuple(_mark(finding) for finding in report.get("findings") or ())
        windows = tuple(_window(window) for window in report.get("windows") or ())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"report must hold findings with type, window and boxes, got {str(report)[:200]}"
        ) from error
    return Clip(video, fps, report.get("score"), marks, windows, note)


def draw_clip(clip: Clip) -> Tensor:
    """Draw boxes and a time line on an enlarged copy of a clip.

    The time line is part of every frame, so that its play head always agrees with the picture:
    amber where the judge looked again, red where it found a fault, white the present frame.

    Returns:
        [F 3 H W] float32 in [0, 1], with even sides.
    """
    video = clip.video.detach().float().cpu().clamp(0, 1)
    frames, _, height, width = video.shape
    factor = max(1, math.ceil(SMALLEST_SIDE / min(height, width)))
    large = video.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    height, width = height * factor, width * factor
    total = height + STRIP_GAP + STRIP
    canvas = torch.zeros(frames, 3, total + total % 2, width + width % 2)
    canvas[:, :, :height, :width] = large
    strip = canvas[:, :, height + STRIP_GAP :, :width]
    strip[:] = _colour(GREY)
    seconds = frames / clip.fps
    for start, end in clip.windows:
        strip[..., _columns(start, end, seconds, width)] = _colour(AMBER)
    for mark in clip.marks:
        strip[..., _columns(*mark.window, seconds, width)] = _colour(RED)
    for index in range(frames):
        time = index / clip.fps
        head = _columns(time, time + 1 / clip.fps, seconds, width)
        canvas[index, :, height + STRIP_GAP + STRIP // 3 : total - STRIP // 3, head] = _colour(
            WHITE
        )
        for mark in clip.marks:
            if mark.window[0] <= time < mark.window[1]:
                for box in mark.boxes_at(time):
                    _draw_box(canvas[index, :, :height, :width], box)
    return canvas


def tint_blame(video: Tensor, blame: Tensor) -> Tensor:
    """Tint a video where and when a judge blames it, the more the redder.

    Args:
        video: [F C H W] float in [0, 1].
        blame: [F h w] in [0, 1], any h and w.

    Returns:
        [F C H W] float32 in [0, 1].
    """
    video, blame = video.detach().float().cpu(), blame.detach().float().cpu()
    size = video.shape[-2:]
    weight = TINT * torch.nn.functional.interpolate(blame[:, None], size=size, mode="nearest")
    return (1 - weight) * video + weight * _colour(RED)


def data_uri(video: Tensor, fps: float) -> str:
    """Encode a video into text that a page can hold: WebP where small, else MP4.

    Args:
        video: [F 3 H W] float in [0, 1].
        fps: Frames per second, above 0.
    """
    pixels = video.shape[0] * video.shape[2] * video.shape[3]
    suffix, kind = (".webp", "image/webp") if pixels <= MAX_WEBP_PIXELS else (".mp4", "video/mp4")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"clip{suffix}"
        write_video(path, video, fps)
        encoded = base64.b64encode(path.read_bytes()).decode("ascii")
    return f"data:{kind};base64,{encoded}"


def _mark(finding: Mapping[str, Any]) -> Mark:
    boxes = []
    for entry in finding.get("boxes") or ():
        x1, y1, x2, y2 = (float(value) for value in entry["box"])
        boxes.append((float(entry["time"]), (x1, y1, x2, y2)))
    window = _window(finding["window"])
    return Mark(str(finding["type"]), window, tuple(boxes), str(finding.get("why") or ""))


def _window(window: Sequence[float]) -> tuple[float, float]:
    start, end = window
    return float(start), float(end)


def _columns(start: float, end: float, seconds: float, width: int) -> slice:
    """The part of the time line that a stretch of time covers, at least one pixel."""
    first = min(max(round(start / seconds * width), 0), width - 1)
    return slice(first, max(first + 1, round(end / seconds * width)))


def _draw_box(frame: Tensor, box: tuple[float, float, float, float]) -> None:
    """A red outline with a white one inside, seen on any ground."""
    height, width = frame.shape[-2:]
    left, top = round(box[0] * width), round(box[1] * height)
    right, bottom = round(box[2] * width), round(box[3] * height)
    thick = max(2, min(height, width) // 96)
    for colour, inset, weight in ((RED, 0, thick), (WHITE, thick, max(1, thick // 2))):
        x1, y1 = max(left + inset, 0), max(top + inset, 0)
        x2, y2 = min(right - inset, width), min(bottom - inset, height)
        paint = _colour(colour)
        frame[:, y1 : min(y1 + weight, y2), x1:x2] = paint
        frame[:, max(y2 - weight, y1) : y2, x1:x2] = paint
        frame[:, y1:y2, x1 : min(x1 + weight, x2)] = paint
        frame[:, y1:y2, max(x2 - weight, x1) : x2] = paint


def _colour(rgb: tuple[float, float, float]) -> Tensor:
    """[3 1 1], to be broadcast over pixels."""
    return torch.tensor(rgb).reshape(3, 1, 1)
