"""Sub-clips: where a clip is cut, what is annotated in each part, which frames show it.

A frame i of a clip is shown at time i / fps. Times are rounded to 0.01 s once, here, so that what a
teacher is told, what it answers and what it is compared with are on one grid.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cac_reward.data.annotations import AnnotatedClip, Caption
from cac_reward.data.videos import open_video
from cac_reward.frames import ScanSettings, scan_indices
from cac_reward.report import TIME_TOLERANCE, VERDICTS, Box, Finding, TimeWindow
from cac_reward.video import Video


@dataclass(frozen=True)
class Stretch:
    """A part of a clip and what is known of it."""

    frames: range
    """Of the clip."""
    window: TimeWindow
    """From its first frame to the end of its last, to 0.01 s."""
    verdict: str | None
    """'clean' or 'anomalous'; None where nobody has said."""
    findings: tuple[Finding, ...]
    """Those with a frame in it, cut at its ends."""
    captions: tuple[Caption, ...]
    """Those with a frame in it, cut at its ends."""
    telling: tuple[int, ...]
    """Frames that show the findings: first, middle and last of each."""

    @property
    def unlocated(self) -> bool:
        """Whether something is wrong in it and nobody knows when."""
        return self.verdict == VERDICTS[1] and not self.findings


def open_clip(clip: AnnotatedClip, root: Path) -> Video:
    """Decode a clip's video.

    Frames leave this machine, so a path must be below the root as it is written: a file of
    annotations from elsewhere cannot name any video of this machine.

    Raises:
        FileNotFoundError: If the video, or the sample of its shard, is missing.
        ValueError: If the path leads out of the root, or it is no readable video.
    """
    base = os.path.abspath(root)
    place = os.path.normpath(os.path.join(base, clip.path))
    if os.path.commonpath([base, place]) != base:
        raise ValueError(
            f"path must be below {base}, got {clip.path!r}; frames are sent elsewhere, so name the "
            "folder above them by --videos"
        )
    return open_video(clip, base)


def check_times(clip: AnnotatedClip, video: Video) -> None:
    """Refuse an annotation that ends after its video; one frame of rounding is allowed.

    Raises:
        ValueError: With the window and the length.
    """
    length = video.duration_seconds
    allowed = 1 / video.fps + TIME_TOLERANCE
    windows = [one.window for one in clip.findings] + [one.window for one in clip.captions]
    for window in windows:
        if window.end_seconds > length + allowed or window.start_seconds >= length:
            raise ValueError(
                f"annotation must end with its video of {length:.2f} s, got {window.to_json()}; "
                "see annotate check"
            )


def cut(clip: AnnotatedClip, num_frames: int, fps: float, seconds: float | None) -> list[Stretch]:
    """Cut a clip into parts of as equal a length as frames allow.

    A clip that is anomalous at times which nobody knows stays whole: nothing that is said of one
    of its parts could be checked.

    Args:
        clip: What is known.
        num_frames: Of the clip.
        fps: Frames per second.
        seconds: Longest part; None for the whole clip.
    """
    most = num_frames
    if seconds is not None and not (clip.verdict == VERDICTS[1] and not clip.findings):
        most = max(1, math.floor(seconds * fps + 1e-9))
    count = math.ceil(num_frames / most)
    ends = [number * num_frames // count for number in range(count + 1)]
    return [
        _stretch(clip, range(first, stop), num_frames, fps)
        for first, stop in zip(ends, ends[1:], strict=False)
    ]


def frames_of(window: TimeWindow, num_frames: int, fps: float) -> range:
    """Frames shown inside a window; the one on screen at its start where there are none."""
    found = window.frame_indices(num_frames, fps)
    if found:
        return found
    nearest = min(num_frames - 1, math.floor((window.start_seconds + TIME_TOLERANCE) * fps))
    return range(nearest, nearest + 1)


def even_frames(frames: range, fps: float, shown_fps: float, max_frames: int) -> list[int]:
    """At most `max_frames` frames of a part at a rate, evenly."""
    if len(frames) < 2:
        return list(frames)
    settings = ScanSettings(fps=shown_fps, max_frames=max_frames)
    return [frames.start + index for index in scan_indices(len(frames), fps, settings)]


def frames_with(telling: Sequence[int], even: Sequence[int], max_frames: int) -> list[int]:
    """The frames that tell something and as many of the others as there is room for."""
    kept = _thin(sorted(set(telling)), max_frames)
    rest = [index for index in even if index not in set(kept)]
    return sorted({*kept, *_thin(rest, max_frames - len(kept))})


def _stretch(clip: AnnotatedClip, frames: range, num_frames: int, fps: float) -> Stretch:
    window = _rounded(frames.start / fps, frames.stop / fps)
    shown = [
        (one, _shared(frames_of(one.window, num_frames, fps), frames)) for one in clip.findings
    ]
    inside = [(one, own) for one, own in shown if own]
    verdict = clip.verdict
    if clip.findings:
        verdict = VERDICTS[bool(inside)]
    telling: set[int] = set()
    for _, own in inside:
        telling.update((own[0], own[len(own) // 2], own[-1]))
    return Stretch(
        frames=frames,
        window=window,
        verdict=verdict,
        findings=tuple(_cut_finding(one, window) for one, _ in inside),
        captions=tuple(
            replace(one, window=_cut_window(one.window, window))
            for one in clip.captions
            if _shared(frames_of(one.window, num_frames, fps), frames)
        ),
        telling=tuple(sorted(telling)),
    )


def _shared(first: range, second: range) -> range:
    return range(max(first.start, second.start), min(first.stop, second.stop))


def _rounded(start: float, end: float) -> TimeWindow:
    """On the grid of 0.01 s, at least one step long."""
    first = round(start, 2)
    return TimeWindow(first, max(round(end, 2), round(first + 0.01, 2)))


def _cut_window(window: TimeWindow, within: TimeWindow) -> TimeWindow:
    start = min(max(window.start_seconds, within.start_seconds), within.end_seconds - 0.01)
    return _rounded(start, max(start, min(window.end_seconds, within.end_seconds)))


def _cut_finding(finding: Finding, within: TimeWindow) -> Finding:
    window = _cut_window(finding.window, within)
    boxes: Iterable[Box] = (box for box in finding.boxes if window.holds(box.time_seconds))
    return replace(finding, window=window, boxes=tuple(boxes))


def _thin(indices: Sequence[int], most: int) -> list[int]:
    """At most `most` of the indices, evenly."""
    if len(indices) <= most:
        return list(indices)
    if most < 2:
        return [indices[len(indices) // 2]][:most]
    return [indices[round(i * (len(indices) - 1) / (most - 1))] for i in range(most)]
