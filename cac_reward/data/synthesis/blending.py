"""Edits of frames without seams, and what of them can be seen.

Axes: H W pixels of a frame or of a part of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from cac_reward.data.synthesis.motion import Floats, Pixels, import_cv2
from cac_reward.data.synthesis.targets import Rect, Scene, Target, bounds

VISIBLE_LEVELS = 14
"""Of 255; a pixel that differs by this much from the clean clip, when slightly blurred, counts as
visibly changed."""

_LEAST_SEEN = 0.2
"""Share of a box that must be visibly changed."""
_MEMBRANE_SIDE = 48
_SPEED_COST = 40.0
"""Levels of 255 for a speed of one small pixel per frame."""


@dataclass(eq=False)
class Canvas:
    """A scene being edited; what is not touched stays what it is, to the bit."""

    scene: Scene
    frames: dict[int, Pixels] = field(default_factory=dict)
    """Edited frames [H W 3] by index."""
    places: dict[int, list[Rect]] = field(default_factory=dict)
    """Where each edit was, by frame, in the order of the edits."""

    def frame(self, index: int) -> Pixels:
        """[H W 3] as it is now."""
        return self.frames.get(index, self.scene.frames[index])

    def part(self, index: int, rect: Rect) -> Floats:
        """[H W 3] of a part of a frame as it is now."""
        return self.frame(index)[rect.slices].astype(np.float32)

    def blend(self, index: int, rect: Rect, content: Floats, alpha: Floats) -> None:
        """Lay content over a part of a frame.

        Args:
            index: Of the frame.
            rect: The part, inside the frame.
            content: [H W 3] in 0 to 255, cut there.
            alpha: [H W] in [0, 1]; where it is 0 nothing changes.
        """
        if index not in self.frames:
            self.frames[index] = self.scene.frames[index].copy()
        below = self.part(index, rect)
        mixed = below + alpha[..., None] * (content - below)
        self.frames[index][rect.slices] = np.clip(np.rint(mixed), 0, 255).astype(np.uint8)
        self.places.setdefault(index, []).append(rect)

    def settle(self, index: int) -> list[Rect]:
        """Keep of a frame's edits what lies within the margin of what can be seen of them.

        Returns:
            Boxes around what can be seen, at most one for each edit; those that touch are joined.
            None: nothing of it can be seen, and the frame is as it was.
        """
        if index not in self.frames:
            return []
        cv2 = import_cv2()
        whole = reduce(Rect.joined, self.places[index])
        whole = whole.grown(self.scene.margin + 2, *self.scene.size)
        old, edited = self.scene.frames[index][whole.slices], self.frames[index][whole.slices]
        # Channel by channel is ten times as fast as along the last axis.
        change = reduce(cv2.max, cv2.split(cv2.absdiff(old, edited)))
        seen = cv2.blur(change, (3, 3)) >= VISIBLE_LEVELS
        boxes: list[Rect] = []
        for place in self.places[index]:
            place = place.moved(-whole.left, -whole.top)
            found = _main_bounds(seen[place.slices])
            if found is not None:
                box = found.moved(place.left, place.top)
                # A thin line along an edge is not what a person would point at.
                if seen[box.slices].mean() >= _LEAST_SEEN:
                    boxes.append(box)
        boxes = _joined(boxes)
        if not boxes:
            self.restore(index)
            return []
        ramp = np.zeros(change.shape, np.float32)
        for box in boxes:
            np.maximum(ramp, _ramp(box, self.scene.margin, *change.shape), out=ramp)
        if ((ramp < 1) & (change > 0)).any():
            below = old.astype(np.float32)
            kept = below + ramp[..., None] * (edited.astype(np.float32) - below)
            edited[:] = np.rint(kept).astype(np.uint8)
        return [box.moved(whole.left, whole.top) for box in boxes]

    def restore(self, index: int) -> None:
        """Make a frame what it was."""
        self.frames.pop(index, None)
        self.places.pop(index, None)


def membrane(difference: Floats, known: Floats) -> Floats:
    """Carry a difference smoothly into where it is not known, as a soap film in a frame.

    Averages of what is known are taken at coarser and coarser scales and fill the gaps of the finer
    ones (pull and push).

    Args:
        difference: [H W 3].
        known: [H W] weights in [0, 1].

    Returns:
        [H W 3]; zero where nothing at all is known.
    """
    cv2 = import_cv2()
    height, width = known.shape
    ratio = min(1.0, _MEMBRANE_SIDE / max(height, width))
    size = (max(2, round(width * ratio)), max(2, round(height * ratio)))
    weighted = cv2.resize(difference * known[..., None], size, interpolation=cv2.INTER_AREA)
    weight = cv2.resize(known, size, interpolation=cv2.INTER_AREA)
    levels = [(weighted, weight)]
    while min(levels[-1][1].shape) > 2:
        above, share = levels[-1]
        levels.append((cv2.pyrDown(above), cv2.pyrDown(share)))
    total = max(float(levels[-1][1].sum()), 1e-6)
    filled = np.broadcast_to(levels[-1][0].sum(axis=(0, 1)) / total, levels[-1][0].shape)
    for weighted, weight in reversed(levels):
        coarse = cv2.resize(
            np.ascontiguousarray(filled), weight.shape[::-1], interpolation=cv2.INTER_LINEAR
        )
        trust = np.clip(weight * 2, 0, 1)[..., None]
        own = weighted / np.maximum(weight, 1e-4)[..., None]
        filled = trust * own + (1 - trust) * coarse
    return cv2.resize(filled, (width, height), interpolation=cv2.INTER_LINEAR)


@dataclass(frozen=True)
class Backdrop:
    """Where the background behind a target is taken from: another moment, or beside it."""

    moment: int | None
    """Frame that shows what is behind; None: the same frame, moved."""
    x: int = 0
    y: int = 0
    """Pixels of a frame by which to move."""


def find_backdrop(target: Target) -> Backdrop | None:
    """Choose what fits best to the surroundings of a target and does not move itself.

    Returns:
        None where there is no room around it.
    """
    cv2 = import_cv2()
    scene, motion = target.scene, target.scene.motion
    middle = (target.start + target.stop) // 2
    picture = motion.small[middle].astype(np.float32)
    hole = cv2.dilate(target.masks[middle - target.start], np.ones((5, 5), np.uint8)) > 0.3
    ring = (cv2.dilate(hole.astype(np.uint8), np.ones((7, 7), np.uint8)) > 0) & ~hole
    rect = bounds(hole | ring)
    if rect is None or not ring.any() or not hole.any():
        return None
    speed = motion.residual[max(0, target.start - 1) : target.stop].mean(axis=0)
    best: tuple[float, Backdrop] | None = None

    def offer(other: Floats, moving: Floats, place: Backdrop, mine: Rect) -> None:
        nonlocal best
        inside, around = hole[rect.slices], ring[rect.slices]
        apart = np.abs(picture[rect.slices] - other[mine.slices]).max(axis=2)
        if apart[inside].mean() < VISIBLE_LEVELS:
            return
        cost = float(apart[around].mean() + _SPEED_COST * moving[mine.slices][inside].mean())
        if best is None or cost < best[0]:
            best = (cost, place)

    for angle in np.arange(16) * (np.pi / 8):
        for far in (1.05, 1.5):
            x = round(float(far * rect.width * np.cos(angle)))
            y = round(float(far * rect.height * np.sin(angle)))
            moved = rect.moved(x, y)
            clear = not (hole[rect.slices] & _shifted(hole, rect, x, y)).any()
            if moved.is_inside(*hole.shape) and clear:
                offer(picture, speed, Backdrop(None, *_pixels(scene, x, y)), moved)
    for moment in np.linspace(0, len(scene.frames) - 1, 6).astype(int):
        path = motion.background_path(int(moment), middle)[:2]
        seen = cv2.warpAffine(motion.small[moment].astype(np.float32), path, hole.shape[::-1])
        then = motion.residual[min(moment, len(motion.residual) - 1)]
        moving = cv2.warpAffine(then, path, hole.shape[::-1], borderValue=10.0)
        offer(seen, moving, Backdrop(int(moment)), rect)
    return None if best is None else best[1]


def background(
    target: Target, frame: int, backdrop: Backdrop
) -> tuple[Rect, Floats, Floats] | None:
    """What is behind a target in one frame, joined to its surroundings without a seam.

    Returns:
        The part of the frame, its content [H W 3] and alpha [H W]; None where it cannot be had.
    """
    scene = target.scene
    height, width = scene.size
    alpha = target.matte(frame, grow=2)
    rect = bounds(alpha > 0)
    if rect is None:
        return None
    rect = rect.grown(scene.margin, height, width)
    if backdrop.moment is not None:
        content = scene.from_moment(backdrop.moment, frame)[rect.slices]
    else:
        content = _taken(scene.frames[frame], rect.moved(backdrop.x, backdrop.y))
    alpha = alpha[rect.slices]
    difference = scene.frames[frame][rect.slices].astype(np.float32) - content
    known = (target.matte(frame, grow=3)[rect.slices] == 0).astype(np.float32)
    return rect, content + membrane(difference, known), alpha


def paste(
    canvas: Canvas, frame: int, thing: Floats, matte: Floats, rect: Rect, fit: float = 0.4
) -> None:
    """Lay a thing over a frame, lit a little as the place is.

    Args:
        canvas: What is edited.
        frame: Index.
        thing: [H W 3] cut with what was around it.
        matte: [H W].
        rect: Where to, of that size; what is outside of the frame is cut off.
        fit: Share of the difference in light between the two places to take over.
    """
    height, width = canvas.scene.size
    kept = rect.cut(height, width)
    if kept.width <= 0 or kept.height <= 0:
        return
    cut = kept.moved(-rect.left, -rect.top).slices
    thing, matte = thing[cut], matte[cut]
    known = (matte == 0).astype(np.float32)
    light = membrane(canvas.part(frame, kept) - thing, known)
    canvas.blend(frame, kept, thing + fit * np.clip(light, -60, 60), matte)


def _taken(frame: Pixels, rect: Rect) -> Floats:
    """[H W 3] of a rectangle that may reach over the edge, where the frame is mirrored."""
    rows = np.arange(rect.top, rect.bottom)
    columns = np.arange(rect.left, rect.right)
    height, width = frame.shape[:2]
    rows = np.abs((rows + height) % (2 * height) - height).clip(0, height - 1)
    columns = np.abs((columns + width) % (2 * width) - width).clip(0, width - 1)
    return frame[rows[:, None], columns[None]].astype(np.float32)


def _shifted(mask: NDArray[np.bool_], rect: Rect, x: int, y: int) -> NDArray[np.bool_]:
    """What a part of a mask would meet if it came from (x, y) away."""
    moved = rect.moved(x, y)
    if not moved.is_inside(*mask.shape):
        return np.ones((rect.height, rect.width), bool)
    return mask[moved.slices]


def _pixels(scene: Scene, x: int, y: int) -> tuple[int, int]:
    """Small pixels as pixels of a frame."""
    height, width = scene.size
    small_height, small_width = scene.motion.size
    return round(x * width / small_width), round(y * height / small_height)


def _main_bounds(seen: NDArray[np.bool_]) -> Rect | None:
    """Bounds of the connected parts that make up what is seen, without specks."""
    cv2 = import_cv2()
    count, _, stats, _ = cv2.connectedComponentsWithStats(seen.astype(np.uint8), connectivity=8)
    if count < 2:
        return None
    stats = stats[1:]
    areas = stats[:, cv2.CC_STAT_AREA]
    stats = stats[areas >= max(6, 0.08 * areas.max())]
    if not len(stats):
        return None
    left, top = stats[:, cv2.CC_STAT_LEFT], stats[:, cv2.CC_STAT_TOP]
    right, bottom = left + stats[:, cv2.CC_STAT_WIDTH], top + stats[:, cv2.CC_STAT_HEIGHT]
    return Rect(int(left.min()), int(top.min()), int(right.max()), int(bottom.max()))


def _joined(boxes: list[Rect]) -> list[Rect]:
    """The boxes with those that meet made one."""
    result: list[Rect] = []
    for box in boxes:
        while (other := next((one for one in result if one.meets(box)), None)) is not None:
            result.remove(other)
            box = box.joined(other)
        result.append(box)
    return result


def _ramp(box: Rect, margin: int, height: int, width: int) -> Floats:
    """[H W]: 1 inside, falling to 0 at the margin."""
    columns, rows = np.arange(width), np.arange(height)
    across = np.maximum(box.left - columns, columns - (box.right - 1)).clip(0)
    down = np.maximum(box.top - rows, rows - (box.bottom - 1)).clip(0)
    far = np.maximum(across[None], down[:, None])
    return np.clip(1 - far / (margin + 1), 0, 1).astype(np.float32)
