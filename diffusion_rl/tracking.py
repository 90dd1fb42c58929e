"""Where the numbers and pictures of a run go: a line, a file, a tracker, a video.

Axes: F frames, C, H, W.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_rl.whole_files import write_whole

METRICS_FILE = "metrics.jsonl"
VIDEO_SUFFIXES = (".mp4", ".webp")
VIDEO_TRACKERS = ("wandb", "trackio")
"""Trackers whose package has a `Video` to log; of WebP they take no video."""
PICTURES = 8
"""Frames of a video that a tracker of pictures gets."""


def flatten(record: Any) -> dict[str, Any]:
    """A dataclass as flat names and numbers; mappings become `name/key`."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Mapping):
            flat.update({f"{field.name}/{key}": entry for key, entry in value.items()})
        else:
            flat[field.name] = value
    return flat


class MetricsFile:
    """One JSON object for each update, in `metrics.jsonl`, readable while the run goes on.

    Args:
        folder: made if missing.
        step: updates already done; lines of later ones (an interrupted update that a resumed run
            repeats) are dropped, so that every update stands in the file once.
    """

    def __init__(self, folder: str | Path, *, step: int = 0) -> None:
        self.path = Path(folder) / METRICS_FILE
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        write_whole(self.path, "".join(_json_line(line) for line in kept))

    def write(self, record: Any) -> None:
        """Append a dataclass that has a `step`."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_json_line(flatten(record)))


def _json_line(record: Mapping[str, Any]) -> str:
    """Strict JSON: what is not a finite number is null, since browsers refuse NaN."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The updates of a `metrics.jsonl`; a last line cut off by a crash is left out."""
    path = Path(path)
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path} must hold one JSON object a line, got {line[:80]!r} in line "
                f"{number}; delete that line"
            ) from error
    return records


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not installed.

    Raises:
        ImportError: names the first and what is there.
    """
    if not names:
        return
    from accelerate.tracking import get_available_trackers

    available = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in available:
            raise ImportError(
                f"trackers must be installed, got {name!r}; install it with: pip install {name} "
                f"(there is: {', '.join(available) or 'none'})"
            )


class AccelerateTracker:
    """The same numbers to tensorboard, wandb, ... through accelerate's trackers.

    Args:
        trackers: names whose packages are installed, or objects of accelerate's GeneralTracker.
        folder: where file-based trackers write.
        project: name of the run.
        settings: flat values saved with the run.
    """

    def __init__(
        self, trackers: Sequence[Any], folder: str | Path, project: str, settings: Mapping[str, Any]
    ) -> None:
        from accelerate import Accelerator

        check_trackers([name for name in trackers if isinstance(name, str)])
        self._accelerator = Accelerator(log_with=list(trackers), project_dir=str(folder))
        self._accelerator.init_trackers(project, config=dict(settings))

    def write(self, record: Any) -> None:
        """Log the numbers of a dataclass that has a `step`."""
        flat = flatten(record)
        numbers = {key: value for key, value in flat.items() if isinstance(value, int | float)}
        self._accelerator.log(numbers, step=record.step)

    def write_videos(self, step: int, videos: Mapping[str, tuple[Path, Tensor]]) -> None:
        """Log videos to the trackers that take them, and their frames to those that take pictures.

        Args:
            step: of the run.
            videos: name to its file and to itself, [F 3 H W] in [0, 1].
        """
        for tracker in self._accelerator.trackers:
            files = {name: str(path) for name, (path, _) in videos.items()}
            is_mp4 = all(path.endswith(".mp4") for path in files.values())
            if tracker.name in VIDEO_TRACKERS and is_mp4:
                kind = importlib.import_module(tracker.name).Video
                tracker.log(
                    {name: kind(str(path)) for name, (path, _) in videos.items()}, step=step
                )
            elif hasattr(tracker, "log_images"):
                frames = {name: _spread_frames(video) for name, (_, video) in videos.items()}
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images(frames, step=step, **layout)

    def close(self) -> None:
        """Flush what the trackers hold back."""
        self._accelerator.end_training()


def _spread_frames(video: Tensor) -> Any:
    """Up to PICTURES frames of a video [F 3 H W], first and last among them: [n H W 3] uint8."""
    count = min(PICTURES, len(video))
    places = torch.linspace(0, len(video) - 1, count).round().long()
    pixels = (video[places].detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def write_video(path: str | Path, video: Tensor, fps: float, *, scale: int = 1) -> Path:
    """Save a video [F C H W] in [0, 1] as .mp4 (H.264) or .webp (lossless, for browsers).

    Args:
        path: its suffix chooses the format.
        video: float in [0, 1].
        fps: frames per second, above 0.
        scale: whole factor to enlarge small videos by, pixel for pixel; at least 1.
    """
    path = Path(path)
    if path.suffix not in VIDEO_SUFFIXES:
        raise ValueError(f"path must end in one of {', '.join(VIDEO_SUFFIXES)}, got {path}")
    if video.ndim != 4 or video.shape[1] != 3:
        raise ValueError(f"video must be [F 3 H W], got shape {tuple(video.shape)}")
    if fps <= 0:
        raise ValueError(f"fps must be above 0, got {fps}")
    if scale < 1:
        raise ValueError(f"scale must be at least 1, got {scale}")
    pixels = (video.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    frames = pixels.permute(0, 2, 3, 1).contiguous().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".webp":
        _write_webp(path, frames, fps)
    else:
        _write_mp4(path, frames, fps)
    return path


def _write_webp(path: Path, frames: Any, fps: float) -> None:
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(
        path,
        save_all=True,
        append_images=images[1:],
        duration=round(1000 / fps),
        loop=0,
        lossless=True,
    )


def _write_mp4(path: Path, frames: Any, fps: float) -> None:
    import av

    height, width = frames.shape[1:3]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        # Half-resolution colour needs even sides; full colour is kept for the odd ones.
        even = height % 2 == 0 and width % 2 == 0
        stream.pix_fmt = "yuv420p" if even else "yuv444p"
        stream.height, stream.width = height, width
        stream.options = {"crf": "12"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
