"""The thing that a fault befalls: a moving region, cut out and followed through a clip.

Axes: F frames, H W pixels of a frame, h w pixels of the small frames that flow is computed on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cac_reward.data.synthesis.motion import Floats, Motion, Pixels, import_cv2

_CUT_MARGIN = 6
"""Small pixels around a region in which its true outline is looked for."""
_LEAST_CONTRAST = 18.0
"""Levels of 255."""
_BINS = 20
"""Of each colour."""


@dataclass(frozen=True, order=True)
class Rect:
    """Pixels [left, right) x [top, bottom) of a frame."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def centre(self) -> tuple[float, float]:
        """x, y."""
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns."""
        return slice(self.top, self.bottom), slice(self.left, self.right)

    def grown(self, pixels: int, height: int, width: int) -> Rect:
        """Larger by some pixels on each side, cut at the edges of the frame."""
        return self.padded(pixels).cut(height, width)

    def padded(self, pixels: int) -> Rect:
        """Larger by some pixels on each side."""
        left, top = self.left - pixels, self.top - pixels
        return Rect(left, top, self.right + pixels, self.bottom + pixels)

    def cut(self, height: int, width: int) -> Rect:
        """What of it is in the frame."""
        right, bottom = min(width, self.right), min(height, self.bottom)
        return Rect(max(0, self.left), max(0, self.top), right, bottom)

    def moved(self, x: int, y: int) -> Rect:
        return Rect(self.left + x, self.top + y, self.right + x, self.bottom + y)

    def is_inside(self, height: int, width: int) -> bool:
        return 0 <= self.left and 0 <= self.top and self.right <= width and self.bottom <= height

    def meets(self, other: Rect) -> bool:
        return (
            max(self.left, other.left) < min(self.right, other.right)
            and max(self.top, other.top) < min(self.bottom, other.bottom)
        )  # fmt: skip

    def joined(self, other: Rect) -> Rect:
        """The smallest that holds both."""
        return Rect(
            min(self.left, other.left),
            min(self.top, other.top),
            max(self.right, other.right),
            max(self.bottom, other.bottom),
        )


def bounds(mask: NDArray[np.bool_]) -> Rect | None:
    """The smallest rectangle around what is set in [H W]; None where nothing is."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    return Rect(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


@dataclass(frozen=True, eq=False)
class Scene:
    """A clip with its motion."""

    frames: Pixels
    """[F H W 3]."""
    fps: float
    motion: Motion

    @property
    def size(self) -> tuple[int, int]:
        """H, W."""
        return self.frames.shape[1], self.frames.shape[2]

    @property
    def margin(self) -> int:
        """Pixels over which an edit may fade out around its boxes."""
        return max(4, round(0.03 * min(self.size)))

    @property
    def pixel(self) -> float:
        """Pixels of a frame for one small pixel."""
        return self.size[1] / self.motion.size[1]

    def from_moment(self, source: int, target: int) -> Floats:
        """[H W 3] of one frame, moved as the background moves until another one."""
        return self.carried(self.frames[source].astype(np.float32), source, target)

    def carried(self, picture: Floats, source: int, target: int) -> Floats:
        """[H W ...] of one frame, moved as the background moves until another one."""
        cv2 = import_cv2()
        path = self.motion.background_path(source, target)
        ratio = np.array([self.size[1], self.size[0]]) / self.motion.size[::-1]
        move = path[:2].copy()
        move[:, 2] *= ratio
        move[:, :2] *= ratio[:, None] / ratio[None]
        if np.allclose(move, np.eye(3)[:2], atol=1e-3):
            return picture
        return cv2.warpAffine(
            picture,
            move,
            self.size[::-1],
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        )


@dataclass(frozen=True, eq=False)
class Target:
    """A region and where it is in each frame of a stretch."""

    scene: Scene
    start: int
    """First frame of the fault."""
    stop: int
    """Frame behind its last."""
    masks: Floats
    """[K h w] in [0, 1]; of the frames from `start`, and some behind `stop`."""
    _mattes: dict[tuple[int, int], Floats] = field(default_factory=dict, repr=False)

    @property
    def last(self) -> int:
        """Frame behind the last that it is followed to."""
        return self.start + len(self.masks)

    def matte(self, frame: int, grow: int = 0) -> Floats:
        """[H W] in [0, 1]: how much of each pixel is the thing's.

        Args:
            frame: from `start` up to `last`.
            grow: Small pixels to add around it.
        """
        key = (frame, grow)
        if key not in self._mattes:
            cv2 = import_cv2()
            mask = self.masks[frame - self.start]
            if grow:
                mask = cv2.dilate(mask, _disc(grow))
            height, width = self.scene.size
            large = cv2.resize(mask, (width, height), interpolation=cv2.INTER_LINEAR)
            # Half a small pixel hides the stairs of the small mask.
            large = cv2.GaussianBlur(large, (0, 0), max(0.8, 0.6 * self.scene.pixel))
            self._mattes[key] = _steepen(large)
        return self._mattes[key]

    @property
    def is_whole(self) -> bool:
        """Whether the frame's edges cut nothing of it off while the fault lasts."""
        height, width = self.scene.size
        return all(
            self.rect(frame).padded(2).is_inside(height, width)
            for frame in (self.start, (self.start + self.stop) // 2, self.stop - 1)
        )

    def rect(self, frame: int) -> Rect:
        """Bounds of the thing in a frame."""
        found = bounds(self.matte(frame) >= 0.5)
        assert found is not None, "follow ends where the thing is lost"
        return found


def follow(
    scene: Scene, region: NDArray[np.bool_], start: int, stop: int, last: int
) -> Target | None:
    """Cut a moving region out of the first frame of a stretch and follow it by the flow.

    Args:
        scene: The clip.
        region: [h w] that moves.
        start: First frame of the fault.
        stop: Frame behind its last.
        last: Frame up to which to follow, at least `stop`.

    Returns:
        None where the thing cannot be told from the rest, leaves the frame, or is lost before
        `stop`; where it is lost later, the target ends there.
    """
    mask = _cut_out(scene.motion, region, start)
    if mask is None:
        return None
    masks = [mask]
    for frame in range(start, last - 1):
        following = _move(masks[-1], scene.motion, frame)
        ratio = following.sum() / mask.sum()
        if not 0.5 < ratio < 2 or not (following >= 0.6).any():
            break
        masks.append(following)
    if start + len(masks) < stop:
        return None
    return Target(scene, start, stop, np.stack(masks))


def _cut_out(motion: Motion, region: NDArray[np.bool_], frame: int) -> Floats | None:
    """[h w] of the thing in one frame: what moves there now, with the outline that its colours
    give it."""
    cv2 = import_cv2()
    speed = motion.residual[max(0, frame - 1) : frame + 2].mean(axis=0)
    near = cv2.dilate(region.astype(np.uint8), _disc(2)) > 0
    moving = near & (speed > 0.4 * np.quantile(speed[near], 0.9))
    moving = cv2.morphologyEx(moving.astype(np.uint8), cv2.MORPH_OPEN, _disc(1))
    moving = cv2.morphologyEx(moving, cv2.MORPH_CLOSE, _disc(3))
    mask = _largest_part(moving)
    if mask is None or mask.sum() < 12:
        return None
    mask = _refined(motion.small[frame], mask)
    if _contrast(motion.small[frame], mask) < _LEAST_CONTRAST:
        return None
    return cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 0.7)


def _contrast(picture: Pixels, mask: NDArray[np.bool_]) -> float:
    """How well a thing can be seen, in levels of 255: its own texture and its distance in colour
    from what is around it."""
    cv2 = import_cv2()
    ring = (cv2.dilate(mask.astype(np.uint8), _disc(4)) > 0) & ~mask
    if not mask.any() or not ring.any():
        return 0.0
    inside, outside = picture[mask].astype(np.float32), picture[ring].astype(np.float32)
    apart = np.abs(inside.mean(axis=0) - outside.mean(axis=0)).max()
    return float(max(apart, inside.std(axis=0).max()))


def _refined(picture: Pixels, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Flow spreads over the edges of things: leave out what has the colours of the surroundings."""
    cv2 = import_cv2()
    rect = bounds(mask)
    assert rect is not None
    rect = rect.grown(_CUT_MARGIN, *mask.shape)
    part, coarse = np.ascontiguousarray(picture[rect.slices]), mask[rect.slices]
    around = (cv2.dilate(coarse.astype(np.uint8), _disc(_CUT_MARGIN)) > 0) & ~coarse
    near = cv2.dilate(coarse.astype(np.uint8), _disc(1)) > 0
    own = (_unlike(part, coarse, around) & near).astype(np.float32)
    smooth = ((cv2.GaussianBlur(own, (0, 0), 1.2) > 0.45) & near).astype(np.uint8)
    smooth = cv2.morphologyEx(smooth, cv2.MORPH_CLOSE, _disc(2))
    largest = _largest_part(smooth)
    if largest is None or largest.sum() < 0.25 * coarse.sum():
        return mask
    # Holes are shadows and folds of the thing, not windows in it.
    outlines, _ = cv2.findContours(
        largest.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
    )
    whole = cv2.drawContours(np.zeros(coarse.shape, np.uint8), outlines, -1, 1, cv2.FILLED)
    refined = np.zeros_like(mask)
    refined[rect.slices] = whole > 0
    return refined


def _largest_part(mask: Pixels) -> NDArray[np.bool_] | None:
    """The largest connected part of [h w]; None where nothing is set."""
    cv2 = import_cv2()
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
    if count < 2:
        return None
    return labels == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())


def _unlike(
    picture: Pixels, inside: NDArray[np.bool_], around: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Which pixels have a colour that is more frequent inside than around."""
    cv2 = import_cv2()
    counts = []
    for place in (inside, around):
        histogram = cv2.calcHist(
            [picture], [0, 1, 2], place.astype(np.uint8), [_BINS] * 3, [0, 256] * 3
        )
        for axis in range(3):
            histogram = histogram + 0.5 * (
                np.roll(histogram, 1, axis) + np.roll(histogram, -1, axis)
            )
        counts.append(histogram / max(1.0, histogram.sum()))
    bins = (picture.astype(np.int32) * _BINS) // 256
    index = tuple(bins[..., axis] for axis in range(3))
    return counts[0][index] > 1.2 * counts[1][index]


def _move(mask: Floats, motion: Motion, frame: int) -> Floats:
    """[h w] in the next frame: each pixel comes from where the thing's own flow says."""
    cv2 = import_cv2()
    weight = cv2.GaussianBlur(mask, (0, 0), 3) + 1e-4
    own = cv2.GaussianBlur(motion.flow[frame] * mask[..., None], (0, 0), 3) / weight[..., None]
    height, width = mask.shape
    columns = np.arange(width, dtype=np.float32)[None] - own[..., 0]
    rows = np.arange(height, dtype=np.float32)[:, None] - own[..., 1]
    moved = cv2.remap(mask, columns, rows, cv2.INTER_LINEAR)
    # Moving by parts of a pixel blurs a little each time; the outline is to stay.
    return np.clip((moved - 0.5) * 1.15 + 0.5, 0, 1) * (weight > 0.01)


def _steepen(matte: Floats) -> Floats:
    """The same outline, a little harder, exactly 0 and 1 away from it."""
    inside = np.clip((matte - 0.15) / 0.7, 0, 1)
    return inside * inside * (3 - 2 * inside)


def _disc(radius: int) -> Pixels:
    cv2 = import_cv2()
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1,) * 2)
