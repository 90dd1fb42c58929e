"""What users hand in, checked and brought into the one form that the judges are shown.

Axes: B videos, F frames, C channels (3), H height, W width, K chosen frames.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cac_reward.frames import resize_to_budget, scan_indices
from cac_reward.judges.base import AbstractJudge
from cac_reward.pixels import check_no_nan
from cac_reward.video import Video

Clip = Tensor | np.ndarray | Video | str | os.PathLike[str] | Sequence[Image.Image]
"""One video in any form: an array, a decoded file, a path, or its frames as pictures."""

LAYOUT = "BFCHW"
VALUE_RANGES = {"0..1": (1.0, 0.0), "-1..1": (0.5, 0.5), "0..255": (1 / 255, 0.0)}
"""Name to the factor and the summand that bring a value into [0, 1]."""
# Codecs and resizing overshoot by rounding; more than this is another range.
ROUNDING = 1e-3


def to_batch(videos: Tensor | np.ndarray, layout: str, value_range: str) -> Tensor:
    """Bring videos of one size into [B F 3 H W] float32 in [0, 1].

    Args:
        videos: array with one axis for each letter of the layout.
        layout: the letters B, F, C, H and W in the array's order. It is never guessed: three
            frames look like three channels.
        value_range: one of VALUE_RANGES. uint8 must be '0..255'.

    Raises:
        ValueError: The layout is no order of those letters or does not fit, or a value is outside
            the range.
    """
    return _standard(videos, layout, LAYOUT, value_range)


def to_clip(video: Tensor | np.ndarray, layout: str, value_range: str) -> Tensor:
    """Bring one video into [F 3 H W] float32 in [0, 1]; as `to_batch`, a B in layout is dropped."""
    return _standard(video, layout.replace("B", ""), LAYOUT[1:], value_range)


def frames_to_clip(frames: Sequence[Image.Image]) -> Tensor:
    """Bring the frames of one video, as pictures of equal size, into [F 3 H W] uint8.

    Raises:
        ValueError: There are none, or their sizes differ.
    """
    sizes = {frame.size for frame in frames}
    if len(sizes) != 1:
        got = "no frames" if not sizes else f"sizes {sorted(sizes)}"
        raise ValueError(f"frames must be pictures of one size, got {got}")
    stacked = np.stack([np.asarray(frame.convert("RGB")) for frame in frames])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2)


def _standard(videos: Tensor | np.ndarray, layout: str, wanted: str, value_range: str) -> Tensor:
    values = torch.as_tensor(videos).detach()
    if sorted(layout) != sorted(wanted):
        raise ValueError(f"layout must hold the letters of {wanted} in some order, got {layout!r}")
    if value_range not in VALUE_RANGES:
        raise ValueError(f"value_range must be one of {list(VALUE_RANGES)}, got {value_range!r}")
    if values.ndim != len(layout):
        raise ValueError(
            f"videos must have one axis for each letter of layout {layout!r}, "
            f"got shape {tuple(values.shape)}"
        )
    channels = values.shape[layout.index("C")]
    if channels != 3:
        raise ValueError(
            f"videos must have 3 channels where layout {layout!r} says C, got {channels} in shape "
            f"{tuple(values.shape)}; name the layout it has, and drop an alpha channel"
        )
    if not values.is_floating_point() and value_range != "0..255":
        raise ValueError(f"value_range must be '0..255' for {values.dtype}, got {value_range!r}")
    factor, summand = VALUE_RANGES[value_range]
    values = values.permute([layout.index(letter) for letter in wanted]).float() * factor + summand
    low, high = (values.min().item(), values.max().item()) if values.numel() else (0.0, 1.0)
    check_no_nan("videos", values, "videos" if wanted == LAYOUT else "frames", low)
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):
        raise ValueError(
            f"videos must be in {value_range}, got values from {(low - summand) / factor:.3g} to "
            f"{(high - summand) / factor:.3g}; name the range they have as value_range"
        )
    return values.clamp(0, 1)


def check_videos(videos: Tensor, fps: float | None) -> None:
    """Refuse what breaks the reward contract: [B F 3 H W] float in [0, 1], with its rate.

    Raises:
        ValueError: Naming what is wrong and how to put it right.
    """
    if not isinstance(videos, Tensor) or videos.ndim != 5 or videos.shape[2] != 3:
        shape = tuple(videos.shape) if isinstance(videos, Tensor) else type(videos).__name__
        raise ValueError(
            f"videos must be a tensor [videos, frames, 3, height, width], got {shape}; "
            "bring channels behind frames with permute"
        )
    if videos.shape[1] < 2:
        raise ValueError(
            f"videos must have at least 2 frames, got {videos.shape[1]}; "
            "one picture has no time in it"
        )
    if 0 in videos.shape[3:]:
        raise ValueError(f"videos must have pixels, got shape {tuple(videos.shape)}")
    if not videos.is_floating_point():
        raise ValueError(f"videos must be float in [0, 1], got {videos.dtype}; divide by 255")
    low, high = (videos.min().item(), videos.max().item()) if len(videos) else (0.0, 1.0)
    check_no_nan("videos", videos, "videos", low)
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"videos must be in [0, 1], got min={low:.2f}, max={high:.2f}; "
            "rescale with (x + 1) / 2 if they are in [-1, 1]"
        )
    check_rate(fps)


def check_rate(fps: float | None) -> float:
    """Refuse a frame rate that is missing or not above 0."""
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < math.inf:
        raise ValueError(
            f"fps must be above 0, got {fps!r}; a judge that answers in seconds needs the true rate"
        )
    return float(fps)


def check_prompts(prompts: Sequence[str], count: int) -> None:
    """Refuse prompts that are not one text for each video.

    Raises:
        ValueError: If there are too few or too many, or one is no text.
    """
    if isinstance(prompts, str) or len(prompts) != count:
        got = repr(prompts[:200]) if isinstance(prompts, str) else str(len(prompts))
        raise ValueError(f"prompts must hold one text for each of {count} videos, got {got}")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise ValueError(f"prompts must be texts, got {type(prompt).__name__}")


def show_scan_frames(judge: AbstractJudge, frames: Tensor, fps: float) -> tuple[list[int], Tensor]:
    """Which frames of a clip [F 3 H W] turn 1 shows, and what they look like [K 3 H' W']."""
    settings = judge.settings.scan
    chosen = scan_indices(len(frames), fps, settings)
    return chosen, show_frames(judge, frames, chosen, settings.pixels)


def open_clip(
    video: Clip, fps: float | None, layout: str = LAYOUT, value_range: str = "0..1"
) -> tuple[Tensor, float]:
    """Frames [F 3 H W] and rate of a video in any form; a file's own rate holds unless given.

    Raises:
        ValueError: The rate is missing or disagrees with a decoded video's, or the frames are not
            what layout and range say.
        FileNotFoundError: The file is missing.
    """
    if isinstance(video, str | os.PathLike):
        video = Video.decode(video, fps=fps)
    if isinstance(video, Video):
        if fps is not None and fps != video.fps:
            raise ValueError(f"fps must be None or the video's own {video.fps}, got {fps}")
        return video.frames, video.fps
    rate = check_rate(fps)
    if isinstance(video, Tensor | np.ndarray):
        return to_clip(video, layout, value_range), rate
    if isinstance(video, list | tuple) and all(isinstance(one, Image.Image) for one in video):
        return frames_to_clip(video), rate
    raise ValueError(
        "a video must be a tensor, an array, a Video, a path or a list of PIL pictures, "
        f"got {type(video).__name__}"
    )


def show_frames(
    judge: AbstractJudge, frames: Tensor, indices: Sequence[int], pixels: int
) -> Tensor:
    """[K 3 H' W'] the chosen frames as the judge sees them."""
    chosen = frames[list(indices)]
    if chosen.dtype == torch.uint8:
        chosen = chosen.float() / 255
    return resize_to_budget(chosen, pixels, judge.patch_factor)
