"""Which frames each turn of the judge sees, at what size, and where its findings lie in them.

Axes: B videos, K frames shown, F frames of the clip, C channels (3), H height, W width. Frame i of
a clip is shown at time i / fps.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from cac_reward.pixels import check_frames
from cac_reward.plain import read_json
from cac_reward.report import SEVERITIES, AnomalyReport, Finding, TimeWindow

JUDGE_FILE = "cac_judge.json"
SCHEMA_VERSION = 1
WORDINGS = ("brief", "full")
MAX_BLAME_SIDE = 128


@dataclass(frozen=True, kw_only=True)
class ScanSettings:
    """What turn 1 sees: few, small frames of the whole clip."""

    fps: float = 2.0
    """Frames shown per second of clip, above 0; a slower clip is shown at its own rate."""
    max_frames: int = 24
    """Most frames shown, at least 2; a longer clip is thinned evenly."""
    pixels: int = 65536
    """Budget of each frame, height * width after resizing, at least 1."""

    def __post_init__(self) -> None:
        _check_settings("scan", self.fps, self.max_frames, self.pixels)


@dataclass(frozen=True, kw_only=True)
class InspectSettings:
    """What turn 2 sees: dense, sharp frames of the windows."""

    fps: float = 8.0
    """Frames shown per second of clip, above 0; a slower clip is shown at its own rate."""
    max_frames: int = 24
    """Most frames shown, at least 2; longer windows are thinned evenly."""
    pixels: int = 262144
    """Budget of each frame, height * width after resizing, at least 1."""
    margin_seconds: float = 0.25
    """Added on both sides of every window, at least 0."""

    def __post_init__(self) -> None:
        _check_settings("inspect", self.fps, self.max_frames, self.pixels)
        if not (_is_number(self.margin_seconds) and self.margin_seconds >= 0):
            raise ValueError(
                f"inspect.margin_seconds must be at least 0, got {short(self.margin_seconds)}"
            )


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """How a judge was trained to be asked; kept beside its weights in `cac_judge.json`."""

    wording: str = "full"
    """'brief' for a judge trained on this protocol, 'full' for an untrained chat model."""
    domain: str | None = None
    """The only footage the judge knows, for example 'toy_world'; None for any footage."""
    scan: ScanSettings = field(default_factory=ScanSettings)
    """What turn 1 sees."""
    inspect: InspectSettings = field(default_factory=InspectSettings)
    """What turn 2 sees."""

    def __post_init__(self) -> None:
        if self.wording not in WORDINGS:
            raise ValueError(f"wording must be one of {WORDINGS}, got {short(self.wording)}")
        if self.domain is not None and not (isinstance(self.domain, str) and self.domain):
            raise ValueError(f"domain must be a name or null, got {short(self.domain)}")

    @classmethod
    def load(cls, folder: str | Path) -> JudgeSettings:
        """Read `cac_judge.json` of a judge's folder; the defaults where there is no such file.

        Raises:
            ValueError: If the file is there and is not what `save` writes.
        """
        path = Path(folder) / JUDGE_FILE
        if not path.is_file():
            return cls()
        record = read_json(str(path), path.read_bytes())
        try:
            return cls._from_record(record)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, folder: str | Path) -> None:
        """Write `cac_judge.json` into a judge's folder."""
        text = json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, indent=2)
        (Path(folder) / JUDGE_FILE).write_text(text + "\n", encoding="utf-8")

    def seen_as(
        self,
        scan: ScanSettings | Mapping[str, object] | None = None,
        inspect: InspectSettings | Mapping[str, object] | None = None,
    ) -> JudgeSettings:
        """These settings with other views of the clip; an object changes only what it names.

        Raises:
            ValueError: If a name or value is none that the turn has.
        """
        views: dict[str, Any] = {}
        for name, old, new in (("scan", self.scan, scan), ("inspect", self.inspect, inspect)):
            if isinstance(new, Mapping):
                new = replace(old, **_known_keys(name, new, _names(type(old))))
            if new is not None and type(new) is not type(old):
                raise ValueError(f"{name} must be {type(old).__name__} or an object, got {new!r}")
            views[name] = old if new is None else new
        return replace(self, **views)

    @classmethod
    def _from_record(cls, record: object) -> JudgeSettings:
        values = _known_keys("judge settings", record, ["schema_version", *_names(cls)])
        version = values.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise ValueError(f"schema_version must be {SCHEMA_VERSION}, got {short(version)}")
        for name, kind in (("scan", ScanSettings), ("inspect", InspectSettings)):
            if name in values:
                values[name] = kind(**_known_keys(name, values[name], _names(kind)))
        return cls(**values)


def scan_indices(num_frames: int, fps: float, settings: ScanSettings) -> list[int]:
    """Choose the frames of turn 1: the whole clip at the scan rate, at most `max_frames`.

    Raises:
        ValueError: If the clip has fewer than two frames or no rate.
    """
    _check_clip(num_frames, fps)
    return _thin(_at_rate(range(num_frames), fps, settings.fps), settings.max_frames)


def inspect_indices(
    windows: Sequence[TimeWindow], num_frames: int, fps: float, settings: InspectSettings
) -> list[int]:
    """Choose the frames of turn 2: the windows with their margins, at most `max_frames`.

    Raises:
        ValueError: If there is no window, one begins after the clip's end, or the clip has fewer
            than two frames or no rate.
    """
    _check_clip(num_frames, fps)
    if not windows:
        raise ValueError("windows must hold at least one window to inspect, got none")
    chosen: list[int] = []
    for span in _merged_spans(windows, num_frames, fps, settings.margin_seconds):
        chosen.extend(_at_rate(span, fps, settings.fps))
    return _thin(chosen, settings.max_frames)


def frame_times(indices: Sequence[int], fps: float) -> list[float]:
    """Seconds at which these frames of a clip are shown."""
    return [index / fps for index in indices]


def budget_size(height: int, width: int, pixels: int, factor: int) -> tuple[int, int]:
    """Find the size that comes nearest a pixel budget: sides multiples of `factor`, aspect kept.

    Small frames grow and large frames shrink. No side is below `factor`; apart from that,
    height * width never exceeds `pixels`.

    Example:
        >>> budget_size(32, 32, 2304, 8), budget_size(752, 1360, 65536, 32)
        ((48, 48), (192, 320))
    """
    if min(height, width, pixels, factor) < 1:
        raise ValueError(
            "height, width, pixels and factor must be at least 1, got "
            f"{(height, width, pixels, factor)}"
        )
    cells = max(1, pixels // factor**2)
    ideal = math.sqrt(cells * height / width)
    best = (-1, 0.0, 1, 1)
    for rows in {max(1, math.floor(ideal + 1e-9)), math.ceil(ideal - 1e-9)}:
        rows = min(rows, cells)
        wanted = rows * width / height
        for columns in {math.floor(wanted + 1e-9), math.ceil(wanted - 1e-9)}:
            columns = min(max(1, columns), cells // rows)
            stretch = -abs(math.log(rows * width / (columns * height)))
            best = max(best, (rows * columns, stretch, rows, columns))
    return best[2] * factor, best[3] * factor


def resize_to_budget(frames: Tensor, pixels: int, factor: int) -> Tensor:
    """Bring frames to a pixel budget exactly as a judge sees them.

    Args:
        frames: [K C H W] float in [0, 1].
        pixels: Budget of each frame, height * width.
        factor: What both sides must be a multiple of (a judge's `patch_factor`).

    Returns:
        [K C H' W'] float in [0, 1] on the grid of multiples of 1/255, so that it is the same
        picture a PNG would carry.

    Raises:
        ValueError: If the layout or range of `frames` is another one.
    """
    check_frames("frames", frames)
    size = budget_size(frames.shape[-2], frames.shape[-1], pixels, factor)
    frames = frames.float()
    if size != tuple(frames.shape[-2:]):
        frames = interpolate(
            frames, size=size, mode="bilinear", antialias=True, align_corners=False
        )
    return (frames.clamp(0, 1) * 255).round() / 255


def blame_map(
    findings: Sequence[Finding],
    num_frames: int,
    height: int,
    width: int,
    fps: float,
    p_anomalous: float,
) -> Tensor:
    """Rasterise findings: where and when the clip is broken, and how badly.

    blame[f, y, x] = p_anomalous * severity / 3 of the worst finding that covers the pixel. Between
    the times of its boxes a finding keeps the nearest box; without boxes it covers whole frames.

    Returns:
        [F H W] float in [0, 1].

    Raises:
        ValueError: If `p_anomalous` is not a probability.
    """
    if not 0 <= p_anomalous <= 1:
        raise ValueError(f"p_anomalous must be in [0, 1], got {p_anomalous}")
    blame = torch.zeros(num_frames, height, width)
    for finding in findings:
        weight = p_anomalous * finding.severity / max(SEVERITIES)
        for index in finding.window.frame_indices(num_frames, fps):
            for rows, columns in _covered(finding, index / fps, height, width):
                blame[index, rows, columns] = blame[index, rows, columns].clamp(min=weight)
    return blame


def blame_maps(
    reports: Sequence[AnomalyReport | None], num_frames: int, height: int, width: int, fps: float
) -> Tensor:
    """Rasterise what reports find in videos of one size, as `blame_map` does.

    Args:
        reports: one for each of B videos; None, or a report without a score, gives zeros.
        num_frames, height, width: of every video.
        fps: frames per second of every video.

    Returns:
        [B F H' W'] in [0, 1]; H' and W' in the videos' aspect, at most `MAX_BLAME_SIDE`.
    """
    scale = min(1.0, MAX_BLAME_SIDE / max(height, width))
    size = (math.ceil(height * scale), math.ceil(width * scale))
    blame = torch.zeros(len(reports), num_frames, *size)
    for row, report in enumerate(reports):
        if report is not None and report.score is not None:
            blame[row] = blame_map(report.findings, num_frames, *size, fps, 1 - report.score)
    return blame


def _check_settings(name: str, fps: object, max_frames: object, pixels: object) -> None:
    if not (_is_number(fps) and fps > 0):  # type: ignore[operator]
        raise ValueError(f"{name}.fps must be above 0, got {short(fps)}")
    for key, value, least in (("max_frames", max_frames, 2), ("pixels", pixels, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(
                f"{name}.{key} must be an integer of at least {least}, got {short(value)}"
            )


def _is_number(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


def _check_clip(num_frames: int, fps: float) -> None:
    if num_frames < 2:
        raise ValueError(
            f"a clip must have at least 2 frames, got {num_frames}; one picture has no time in it"
        )
    if not (_is_number(fps) and fps > 0):
        raise ValueError(f"fps must be above 0, got {fps!r}")


def _names(kind: type) -> list[str]:
    return [one.name for one in fields(kind)]


def _known_keys(name: str, record: object, known: Sequence[str]) -> dict:
    if not isinstance(record, Mapping):
        raise ValueError(f"{name} must be an object, got {short(record)}")
    for key in record:
        if key not in known:
            raise ValueError(f"{name} must have no key but {sorted(known)}, got {short(key)}")
    return dict(record)


def _at_rate(span: range, fps: float, shown_fps: float) -> list[int]:
    """Frames of a stretch at a rate that is never above the clip's own; at least one."""
    stride = max(1.0, fps / shown_fps)
    count = math.ceil(len(span) / stride - 1e-9)
    # Rounded down, since rounding to the nearest could show the last frame twice.
    return [span[math.floor(i * stride + 1e-9)] for i in range(count)]


def _thin(indices: Sequence[int], most: int) -> list[int]:
    """At most `most` of the indices, evenly, first and last kept."""
    if len(indices) <= most:
        return list(indices)
    return [indices[round(i * (len(indices) - 1) / (most - 1))] for i in range(most)]


def _merged_spans(
    windows: Sequence[TimeWindow], num_frames: int, fps: float, margin_seconds: float
) -> list[range]:
    """Disjoint stretches of frames that cover the windows with their margins, in order."""
    spans: list[range] = []
    for window in sorted(windows):
        if window.start_seconds > num_frames / fps:
            raise ValueError(
                f"windows must begin before the clip's end at {num_frames / fps:.2f} s, "
                f"got {window.to_json()}"
            )
        wide = TimeWindow(
            max(0.0, window.start_seconds - margin_seconds), window.end_seconds + margin_seconds
        )
        span = wide.frame_indices(num_frames, fps)
        if not span:
            nearest = min(num_frames - 1, round(window.start_seconds * fps))
            span = range(nearest, nearest + 1)
        if spans and span.start <= spans[-1].stop:
            span = range(spans[-1].start, max(span.stop, spans.pop().stop))
        spans.append(span)
    return spans


def _covered(finding: Finding, time: float, height: int, width: int) -> list[tuple[slice, slice]]:
    """Rows and columns that a finding covers in the frame shown at `time`."""
    if not finding.boxes:
        return [(slice(0, height), slice(0, width))]
    return [
        (
            slice(math.floor(box.y1 * height), math.ceil(box.y2 * height)),
            slice(math.floor(box.x1 * width), math.ceil(box.x2 * width)),
        )
        for box in finding.boxes_at(time)
    ]
