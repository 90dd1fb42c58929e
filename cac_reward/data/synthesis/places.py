"""Faults of place and number: vanish, appear, duplicate, teleport, cross."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cac_reward.data.synthesis.blending import (
    Backdrop,
    Canvas,
    background,
    find_backdrop,
    paste,
)
from cac_reward.data.synthesis.motion import Floats, import_cv2
from cac_reward.data.synthesis.targets import Rect, Target

_TRIES = 40
_MOST_COST = 45.0
"""Levels of 255 by which a new place may differ from the old one on the average."""


@dataclass(frozen=True, eq=False)
class _Copy:
    """How a thing is laid down again."""

    offset: tuple[int, int]
    """Pixels to the right and down."""
    mirrored: bool = False
    scale: float = 1.0
    through: Floats | None = None
    """[H W] of the frame: how much shows through the thing there."""


def vanish(canvas: Canvas, target: Target, random: np.random.Generator) -> bool:
    """The thing is gone, at once or within three frames."""
    backdrop = find_backdrop(target)
    if backdrop is None:
        return False
    fade = int(random.integers(1, 4))
    for frame in range(target.start, target.stop):
        _remove(canvas, target, frame, backdrop, min(1.0, (frame - target.start + 1) / fade))
    return True


def duplicate(canvas: Canvas, target: Target, random: np.random.Generator) -> bool:
    """A second one moves beside the first, in step with it."""
    offset = _free_offset(target, random)
    if offset is None:
        return False
    for frame in range(target.start, target.stop):
        _copy(canvas, target, frame, frame, _Copy(offset))
    return True


def appear(canvas: Canvas, target: Target, random: np.random.Generator) -> bool:
    """The thing as it is at other moments, mirrored and of another size, comes from nowhere."""
    offset = _free_offset(target, random)
    if offset is None:
        return False
    copy = _Copy(offset, mirrored=True, scale=float(random.uniform(0.85, 1.2)))
    for frame in range(target.start, target.stop):
        # Its own moments backwards: the two do not move in step.
        moment = target.start + target.stop - 1 - frame
        _copy(canvas, target, frame, moment, copy)
    return True


def teleport(canvas: Canvas, target: Target, random: np.random.Generator) -> bool:
    """The thing is suddenly elsewhere, and not where it was."""
    backdrop, offset = find_backdrop(target), _free_offset(target, random)
    if backdrop is None or offset is None:
        return False
    for frame in range(target.start, target.stop):
        _remove(canvas, target, frame, backdrop)
        _copy(canvas, target, frame, frame, _Copy(offset))
    return True


def cross(canvas: Canvas, target: Target, random: np.random.Generator) -> bool:
    """The thing slides into something else and back; where they meet both are seen."""
    backdrop, obstacle = find_backdrop(target), _obstacle(target, random)
    if backdrop is None or obstacle is None:
        return False
    middle = target.rect((target.start + target.stop) // 2)
    away_x = obstacle.centre[0] - middle.centre[0]
    away_y = obstacle.centre[1] - middle.centre[1]
    height, width = canvas.scene.size
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    # The obstacle is a soft ellipse as large as the thing.
    near = ((columns - obstacle.centre[0]) / (0.55 * obstacle.width)) ** 2
    near += ((rows - obstacle.centre[1]) / (0.55 * obstacle.height)) ** 2
    through = 0.6 * np.clip(1.6 - near, 0, 1).astype(np.float32)
    count = target.stop - target.start
    for frame in range(target.start, target.stop):
        gone = float(np.sin(np.pi * (frame - target.start + 0.5) / count)) ** 0.7
        offset = (round(away_x * gone), round(away_y * gone))
        _remove(canvas, target, frame, backdrop)
        _copy(canvas, target, frame, frame, _Copy(offset, through=through))
    return True


def _remove(
    canvas: Canvas, target: Target, frame: int, backdrop: Backdrop, share: float = 1.0
) -> None:
    """Put what is behind the thing in its place."""
    found = background(target, frame, backdrop)
    if found is not None:
        rect, content, alpha = found
        canvas.blend(frame, rect, content, alpha * share)


def _copy(canvas: Canvas, target: Target, frame: int, moment: int, copy: _Copy) -> None:
    """Lay the thing of one moment over a frame, moved."""
    cv2 = import_cv2()
    scene = canvas.scene
    matte = target.matte(moment)
    rect = target.rect(moment).grown(scene.margin, *scene.size)
    thing = scene.frames[moment][rect.slices].astype(np.float32)
    matte = matte[rect.slices]
    if copy.mirrored:
        thing, matte = thing[:, ::-1], matte[:, ::-1]
    size = (max(4, round(rect.width * copy.scale)), max(4, round(rect.height * copy.scale)))
    if copy.scale != 1.0:
        thing = cv2.resize(np.ascontiguousarray(thing), size, interpolation=cv2.INTER_LINEAR)
        matte = cv2.resize(np.ascontiguousarray(matte), size, interpolation=cv2.INTER_LINEAR)
    left = round(rect.centre[0] - size[0] / 2) + copy.offset[0]
    top = round(rect.centre[1] - size[1] / 2) + copy.offset[1]
    place = Rect(left, top, left + size[0], top + size[1])
    if copy.through is not None:
        matte = matte * (1 - _window(copy.through, place))
    paste(canvas, frame, np.ascontiguousarray(thing), np.ascontiguousarray(matte), place)


def _window(values: Floats, rect: Rect) -> Floats:
    """[H W] of a rectangle, zero outside of the frame."""
    height, width = values.shape
    result = np.zeros((rect.height, rect.width), np.float32)
    kept = rect.cut(height, width)
    if kept.width > 0 and kept.height > 0:
        result[kept.moved(-rect.left, -rect.top).slices] = values[kept.slices]
    return result


def _free_offset(target: Target, random: np.random.Generator) -> tuple[int, int] | None:
    """By how much to move a thing so that it is in the frame, off itself, and on a like ground."""
    if not target.is_whole:
        return None
    scene = target.scene
    small = scene.motion.small[target.start].astype(np.float32)
    speed = scene.motion.residual[target.start : target.stop].mean(axis=0)
    height, width = scene.size
    rects = [target.rect(frame) for frame in range(target.start, target.stop)]
    best: tuple[float, tuple[int, int]] | None = None
    for _ in range(_TRIES):
        x = round(float(random.uniform(0.8, 3.0)) * rects[0].width * float(random.choice([-1, 1])))
        y = round(float(random.uniform(-0.5, 0.5)) * rects[0].height)
        moved = [one.moved(x, y).padded(2) for one in rects]
        if not all(one.moved(x, y).is_inside(height, width) for one in rects):
            continue
        if any(one.meets(other) for one, other in zip(moved, rects, strict=True)):
            continue
        old, new = (
            _rim(small, one, scene.pixel) for one in (rects[0], rects[0].moved(x, y))
        )  # fmt: skip
        cost = float(np.abs(old - new).mean())
        cost += 30 * float(_inside(speed, rects[0].moved(x, y), scene.pixel).mean())
        if best is None or cost < best[0]:
            best = (cost, (x, y))
    return None if best is None or best[0] > _MOST_COST else best[1]


def _rim(small: Floats, rect: Rect, pixel: float) -> Floats:
    """[K 3] on the edges of a rectangle, at fixed places, from the small frame."""
    share = np.linspace(0, 1, 12)
    across, down = rect.left + share * rect.width, rect.top + share * rect.height
    columns = np.concatenate([across, across, np.full(12, rect.left), np.full(12, rect.right)])
    rows = np.concatenate([np.full(12, rect.top), np.full(12, rect.bottom), down, down])
    columns = (columns / pixel).astype(int).clip(0, small.shape[1] - 1)
    rows = (rows / pixel).astype(int).clip(0, small.shape[0] - 1)
    return small[rows, columns]


def _inside(values: Floats, rect: Rect, pixel: float) -> Floats:
    """A rectangle of the small frame, never empty."""
    left, top = int(rect.left / pixel), int(rect.top / pixel)
    right = max(left + 1, int(rect.right / pixel))
    bottom = max(top + 1, int(rect.bottom / pixel))
    part = values[max(0, top) : bottom, max(0, left) : right]
    return part if part.size else values


def _obstacle(target: Target, random: np.random.Generator) -> Rect | None:
    """Something with structure, as large as the thing, that it could run into."""
    cv2 = import_cv2()
    if not target.is_whole:
        return None
    scene = target.scene
    middle = (target.start + target.stop) // 2
    grey = cv2.cvtColor(scene.motion.small[middle], cv2.COLOR_RGB2GRAY).astype(np.float32)
    detail = np.abs(grey - cv2.GaussianBlur(grey, (0, 0), 3))
    own = target.rect(middle)
    height, width = scene.size
    best: tuple[float, Rect] | None = None
    for _ in range(_TRIES):
        far, angle = float(random.uniform(0.8, 2.2)), float(random.uniform(0, 2 * np.pi))
        x, y = far * own.width * np.cos(angle), far * own.height * np.sin(angle)
        place = own.moved(round(float(x)), round(float(y)))
        if not place.is_inside(height, width):
            continue
        structure = float(_inside(detail, place, scene.pixel).mean())
        if best is None or structure > best[0]:
            best = (structure, place)
    return None if best is None else best[1]
