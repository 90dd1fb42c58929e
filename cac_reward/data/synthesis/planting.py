"""One clip in, the same clip with a fault, without, and with an edit that is no fault, out.

Axes: F frames, H W pixels of a frame.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from cac_reward.data.synthesis import harmless
from cac_reward.data.synthesis.blending import Canvas
from cac_reward.data.synthesis.faults import FAULTS, Fault
from cac_reward.data.synthesis.lettering import scramble, write_sign
from cac_reward.data.synthesis.motion import LEAST_FRAMES, Pixels, measure_motion, moving_regions
from cac_reward.data.synthesis.targets import Rect, Scene, Target, follow
from cac_reward.report import Box, Finding, TimeWindow

_WINDOW_TRIES = 12
_HARMLESS_TRIES = 6
_SIGN_TRIES = 4
_REGIONS_EACH = 3
_LEAST_WINDOW = 3
"""Frames."""
_LEAST_SEEN = 0.6
"""Share of a fault's frames in which it must be visible."""
_SEVERE_SHARES = (0.01, 0.05)
"""Of the frame, on the average over the boxes: below is severity 1, from the second on 3."""


@dataclass(frozen=True, kw_only=True)
class PlantSettings:
    """What to plant."""

    faults: tuple[str, ...] = tuple(FAULTS)
    """Names in `FAULTS`."""
    window_seconds: tuple[float, float] = (0.25, 1.5)
    """Shortest and longest fault; never less than 3 frames or more than half the clip."""
    area: tuple[float, float] = (0.003, 0.2)
    """Least and most share of the frame that the moving region has."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.faults if name not in FAULTS]
        if unknown or not self.faults:
            raise ValueError(
                f"faults must be some of {', '.join(FAULTS)}, got {', '.join(unknown) or 'none'}"
            )
        if len(set(self.faults)) < len(self.faults):
            raise ValueError(f"faults must each be named once, got {', '.join(self.faults)}")
        shortest, longest = self.window_seconds
        if not 0 < shortest <= longest:
            raise ValueError(
                f"window_seconds must be 0 < shortest <= longest, got {shortest}, {longest}"
            )
        least, most = self.area
        if not 0 < least < most <= 0.5:
            raise ValueError(f"area must be 0 < least < most <= 0.5, got {least}, {most}")


@dataclass(frozen=True, eq=False)
class PlantedFault:
    """A clip with a fault, and what it is to be compared with."""

    name: str
    """In `FAULTS`."""
    finding: Finding
    clean: Pixels
    """[F H W 3] the counterpart: the same without the fault. Where text was to be scrambled, this
    has the text too."""
    frames: Pixels
    """[F H W 3]."""
    boxes: dict[int, list[Rect]]
    """Where it can be seen, by frame."""


class NothingMovesError(ValueError):
    """No region of a clip moves by itself."""


def make_scene(frames: Pixels, fps: float) -> Scene:
    """Measure what moves in a clip.

    Args:
        frames: [F H W 3] uint8, at least 8 frames of at least 32x32 pixels.
        fps: Frames per second.

    Raises:
        ValueError: If the clip is too short, or its frames are too small.
    """
    return Scene(frames, fps, measure_motion(frames))


def plant_fault(scene: Scene, settings: PlantSettings, random: np.random.Generator) -> PlantedFault:
    """Plant one fault, of a type drawn at random; where it does not suit the clip, of the next.

    Text faults are planted only where they are drawn first: they suit every clip, and would take
    the place of all that do not.

    Args:
        scene: A clean clip.
        settings: What to choose from.
        random: The same generator plants the same fault.

    Raises:
        NothingMovesError: If no region moves by itself.
        ValueError: If none of the faults can be planted so that it is seen.
    """
    order = [str(name) for name in random.permutation(np.array(settings.faults))]
    if FAULTS[order[0]].plant is None:
        planted = _plant_text(scene, FAULTS[order[0]], settings, random)
        if planted is not None:
            return planted
    order = [name for name in order if FAULTS[name].plant is not None]
    found = False
    for name in order:
        for target in _targets(scene, settings, random, FAULTS[name].ahead):
            found = True
            canvas = Canvas(scene)
            fault = FAULTS[name]
            assert fault.plant is not None
            if not fault.plant(canvas, target, random):
                continue
            planted = finished(canvas, fault, target.start, target.stop)
            if planted is not None:
                return planted
    if order and not found:
        raise NothingMovesError("clip must have a region that moves by itself, got none")
    raise ValueError(f"clip must suit one of the faults {', '.join(settings.faults)}, got none")


def plant_harmless(
    scene: Scene, settings: PlantSettings, random: np.random.Generator
) -> tuple[str, Pixels]:
    """Edit a clip without a fault.

    Returns:
        Name of the edit, in `harmless.LOCAL` or `harmless.GLOBAL`, and [F H W 3].
    """
    order = [str(name) for name in random.permutation([*harmless.LOCAL, *harmless.GLOBAL])]
    for name in order:
        if name in harmless.GLOBAL:
            return name, harmless.GLOBAL[name](scene.frames, random)
        for target in islice(_targets(scene, settings, random, False), _HARMLESS_TRIES):
            canvas = Canvas(scene)
            if not harmless.LOCAL[name](canvas, target, random):
                continue
            edited = _assembled(canvas)
            # Of a background that stands quite still another moment is the same picture.
            if np.array_equal(edited, scene.frames):
                continue
            # The rule of what is seen of a fault, turned round.
            copies = {index: one.copy() for index, one in canvas.frames.items()}
            seen = Canvas(scene, copies, dict(canvas.places))
            if not any(seen.settle(index) for index in list(seen.frames)):
                return name, edited
    raise AssertionError("an edit of the whole clip always works")


def window_frames(
    scene: Scene, settings: PlantSettings, random: np.random.Generator
) -> tuple[int, int]:
    """First frame of a fault and the one behind its last: neither at the clip's beginning, so
    that there is something to compare with; about a third last until its end."""
    count = len(scene.frames)
    longest = max(_LEAST_WINDOW, min(count // 2, round(settings.window_seconds[1] * scene.fps)))
    shortest = min(longest, max(_LEAST_WINDOW, round(settings.window_seconds[0] * scene.fps)))
    # Short ones are as frequent as long ones.
    length = round(float(np.exp(random.uniform(np.log(shortest), np.log(longest)))))
    latest = count - length
    start = int(random.integers(2, max(3, latest)))
    if random.random() < 0.3:
        start = latest
    return start, start + length


def _targets(
    scene: Scene, settings: PlantSettings, random: np.random.Generator, ahead: bool
) -> Iterator[Target]:
    """Moving things in stretches drawn at random, large and fast ones first."""
    count = len(scene.frames)
    for _ in range(_WINDOW_TRIES):
        start, stop = window_frames(scene, settings, random)
        if ahead:
            shift = min(start - 2, max(0, (stop - start) // 2))
            start, stop = start - shift, stop - shift
        regions = moving_regions(scene.motion, start, stop, settings.area)
        if not regions:
            continue
        weights = np.array(
            [energy * np.sqrt(mask.sum()) * _at_edge(mask) for mask, energy in regions]
        )
        chosen = random.choice(
            len(regions),
            size=min(_REGIONS_EACH, len(regions)),
            replace=False,
            p=weights / weights.sum(),
        )
        last = min(count, stop + (stop - start if ahead else 0))
        for index in chosen:
            target = follow(scene, regions[index][0], start, stop, last)
            if target is not None:
                yield target


def _at_edge(region: NDArray[np.bool_]) -> float:
    """Weight of a region: what the frame cuts off is rarely a thing of its own."""
    edges = (region[0], region[-1], region[:, 0], region[:, -1])
    return 0.1 if any(edge.any() for edge in edges) else 1.0


def _plant_text(
    scene: Scene, fault: Fault, settings: PlantSettings, random: np.random.Generator
) -> PlantedFault | None:
    """Write text into the clip and scramble it for a while."""
    for _ in range(_SIGN_TRIES):
        written = write_sign(scene.frames, random)
        if written is None:
            return None
        frames, sign = written
        canvas = Canvas(Scene(frames, scene.fps, scene.motion))
        start, stop = window_frames(scene, settings, random)
        scramble(canvas, sign, start, stop, random)
        planted = finished(canvas, fault, start, stop)
        if planted is not None:
            return planted
    return None


def finished(canvas: Canvas, fault: Fault, start: int, stop: int) -> PlantedFault | None:
    """Keep of some edits what can be seen, and say where.

    Args:
        canvas: Edited.
        fault: What was planted.
        start: First frame of the edits.
        stop: Frame behind the last.

    Returns:
        None where too little can be seen, or in too few of the frames.
    """
    scene = canvas.scene
    least = max(30.0, 0.0015 * scene.size[0] * scene.size[1])
    boxes: dict[int, list[Rect]] = {}
    for index in range(start, stop):
        found = canvas.settle(index)
        if sum(one.width * one.height for one in found) >= least:
            boxes[index] = found
    if len(boxes) < max(_LEAST_WINDOW, _LEAST_SEEN * (stop - start)):
        return None
    first, last = min(boxes), max(boxes)
    for index in list(canvas.frames):
        if not first <= index <= last:
            canvas.restore(index)
    return PlantedFault(
        fault.name,
        _finding(scene, fault, boxes),
        scene.frames,
        _assembled(canvas),
        boxes,
    )


def _assembled(canvas: Canvas) -> Pixels:
    frames = canvas.scene.frames.copy()
    for index, frame in canvas.frames.items():
        frames[index] = frame
    return frames


def _finding(scene: Scene, fault: Fault, boxes: dict[int, list[Rect]]) -> Finding:
    """The fault in the words of a judge: seconds, and shares of the frame."""
    height, width = scene.size
    first, last = min(boxes), max(boxes)
    relative = tuple(
        Box(index / scene.fps, one.left / width, one.top / height, one.right / width,
            one.bottom / height)
        for index, listed in sorted(boxes.items())
        for one in listed
    )  # fmt: skip
    share = sum(one.area for one in relative) / len(boxes)
    severity = 1 + sum(share >= least for least in _SEVERE_SHARES)
    # A box's last frame is shown until the window ends.
    window = TimeWindow(first / scene.fps, (last + 1) / scene.fps)
    why = fault.why.format(place=_place(relative))
    return Finding(fault.type, window, relative, severity, why)


def _place(boxes: Sequence[Box]) -> str:
    """For example 'at the upper left', of the middle of the first box."""
    x, y = (boxes[0].x1 + boxes[0].x2) / 2, (boxes[0].y1 + boxes[0].y2) / 2
    across = "left" if x < 0.4 else "right" if x > 0.6 else ""
    down = "upper" if y < 0.4 else "lower" if y > 0.6 else ""
    if not across and not down:
        return "in the middle"
    if not across:
        return f"in the {down} middle"
    return f"at the {down} {across}" if down else f"on the {across}"


__all__ = [
    "LEAST_FRAMES",
    "NothingMovesError",
    "PlantSettings",
    "PlantedFault",
    "make_scene",
    "plant_fault",
    "plant_harmless",
]
