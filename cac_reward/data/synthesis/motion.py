"""What moves in a clip: optical flow, the camera's part of it, and the regions that move by
themselves.

Axes: F frames, H W pixels of a frame, h w pixels of the small frames that flow is computed on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEAST_SIDE = 32
"""Pixels of the shorter side below which nothing can be told apart."""
LEAST_FRAMES = 8
"""Enough for a fault with something before and behind it."""

_SMALL_SIDE = 128
_GRID = 8
_CAMERA_ROUNDS = 3
_AFFINE, _CURVED = 1, 2
_LEAST_SPEED = 0.06
"""Small pixels per frame; below it is the noise of flow on compressed video."""

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]


def import_cv2() -> Any:
    """OpenCV.

    Raises:
        ImportError: With the extra that brings it.
    """
    try:
        import cv2
    except ImportError as error:
        raise ImportError(
            "synthesis needs opencv-python-headless; install it with: pip install "
            '"cac-reward[synthesis]"'
        ) from error
    return cv2


@contextmanager
def one_thread() -> Iterator[None]:
    """Let OpenCV use one thread: its flow depends on the number of them."""
    cv2 = import_cv2()
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


@dataclass(frozen=True, eq=False)
class Motion:
    """Optical flow of a clip on small frames."""

    small: Pixels
    """[F h w 3] the frames, made small."""
    flow: Floats
    """[F-1 h w 2] x and y, small pixels from each frame to the next."""
    residual: Floats
    """[F-1 h w] length of the flow that the camera does not explain."""
    camera: NDArray[np.float64]
    """[F 3 3] maps small coordinates of frame 0 to those of frame f, as the background moves."""

    @property
    def size(self) -> tuple[int, int]:
        """h, w."""
        return self.small.shape[1], self.small.shape[2]

    def background_path(self, source: int, target: int) -> NDArray[np.float64]:
        """[3 3] maps small coordinates of one frame to another's, as the background moves."""
        return self.camera[target] @ np.linalg.inv(self.camera[source])


def measure_motion(frames: Pixels) -> Motion:
    """Compute the flow of a clip and split it into the camera's and the rest.

    The camera's is fitted to a grid of the flow by least squares that give outliers less and less
    weight: quadratic in the place, as a plane seen aslant moves, to tell what moves by itself;
    affine, to carry the background from one moment to another.

    Args:
        frames: [F H W 3].

    Raises:
        ValueError: If the clip is too short or its frames are too small.
    """
    count, height, width = frames.shape[:3]
    if count < LEAST_FRAMES:
        raise ValueError(f"clip must have at least {LEAST_FRAMES} frames, got {count}")
    if min(height, width) < LEAST_SIDE:
        raise ValueError(f"frames must be at least {LEAST_SIDE} pixels wide and high, got "
                         f"{width}x{height}")  # fmt: skip
    cv2 = import_cv2()
    scale = min(1.0, max(_SMALL_SIDE / max(height, width), LEAST_SIDE / min(height, width)))
    size = (max(LEAST_SIDE, round(width * scale)), max(LEAST_SIDE, round(height * scale)))
    small = np.stack([cv2.resize(one, size, interpolation=cv2.INTER_AREA) for one in frames])
    grey = [cv2.cvtColor(one, cv2.COLOR_RGB2GRAY) for one in small]
    engine = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    # Its preset stops at a quarter of the small frame, where a walking figure is a smear.
    engine.setFinestScale(1)
    engine.setVariationalRefinementIterations(0)
    engine.setGradientDescentIterations(10)
    engine.setPatchStride(5)
    with one_thread():
        flow = np.stack(
            [engine.calc(*pair, None) for pair in zip(grey[:-1], grey[1:], strict=True)]
        )
    residual = _unexplained(flow, _fitted(flow, _CURVED))
    steps = _fitted(flow, _AFFINE)
    # Of whole frames; the fit is in shares of them.
    steps[:, :, :2] /= np.array(size)
    return Motion(small, flow, residual, _compose(steps))


def moving_regions(
    motion: Motion, start: int, stop: int, area: tuple[float, float]
) -> list[tuple[NDArray[np.bool_], float]]:
    """Connected areas that move by themselves between two frames.

    Args:
        motion: Of the clip.
        start: First frame.
        stop: Frame behind the last.
        area: Least and most share of the frame that an area may have.

    Returns:
        Masks [h w] with their mean speed beyond the camera's in small pixels per frame, found at
        several levels of speed; a mask that another level has found already is left out.
    """
    cv2 = import_cv2()
    energy = motion.residual[max(0, start - 1) : max(stop - 1, start + 1)].mean(axis=0)
    energy = cv2.GaussianBlur(energy, (0, 0), 1.5)
    noise = max(_LEAST_SPEED, 1.7 * float(np.median(energy)))
    pixels = energy.size
    regions: list[tuple[NDArray[np.bool_], float]] = []
    for level in (1.0, 1.6, 2.5, 4.0, 6.0):
        fast = (energy > noise * level).astype(np.uint8)
        fast = cv2.morphologyEx(fast, cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8))
        count, labels, stats, _ = cv2.connectedComponentsWithStats(fast, connectivity=4)
        for label in range(1, count):
            share = stats[label, cv2.CC_STAT_AREA] / pixels
            if not area[0] <= share <= area[1]:
                continue
            mask = labels == label
            overlaps = (np.logical_and(mask, one).sum() / mask.sum() for one, _ in regions)
            if all(overlap < 0.7 for overlap in overlaps):
                regions.append((mask, float(energy[mask].mean())))
    return regions


def _terms(places: NDArray[np.float64], degree: int) -> NDArray[np.float64]:
    """[... 3 or 6] of places [... 2] in shares of the frame."""
    x, y = places[..., 0], places[..., 1]
    terms = [x, y, np.ones_like(x)]
    if degree == _CURVED:
        terms += [x * x, x * y, y * y]
    return np.stack(terms, axis=-1)


def _fitted(flow: Floats, degree: int) -> NDArray[np.float64]:
    """[F-1 2 T] of the smooth flow that most of the frame follows; terms to (dx, dy)."""
    margin = _GRID // 2
    coarse = flow[:, margin::_GRID, margin::_GRID].astype(np.float64)
    rows, columns = np.mgrid[: coarse.shape[1], : coarse.shape[2]]
    places = (np.stack([columns, rows], axis=-1).reshape(-1, 2) * _GRID + margin) / np.array(
        [flow.shape[2], flow.shape[1]]
    )
    design = _terms(places, degree)
    observed = coarse.reshape(len(coarse), -1, 2)
    weights = np.ones(observed.shape[:2])
    for _ in range(_CAMERA_ROUNDS):
        weighted = weights[:, :, None] * design
        normal = weighted.transpose(0, 2, 1) @ design + 1e-6 * np.eye(design.shape[1])
        steps = np.linalg.solve(normal, weighted.transpose(0, 2, 1) @ observed)
        off = np.linalg.norm(observed - design @ steps, axis=-1)
        spread = np.median(off, axis=1, keepdims=True) + 0.05
        weights = 1 / (1 + (off / spread) ** 2) ** 2
    return np.ascontiguousarray(steps.transpose(0, 2, 1))


def _unexplained(flow: Floats, steps: NDArray[np.float64]) -> Floats:
    """[F-1 h w] length of what is left of the flow."""
    height, width = flow.shape[1:3]
    rows, columns = np.mgrid[:height, :width]
    places = np.stack([columns / width, rows / height], axis=-1)
    terms = _terms(places, _CURVED).astype(np.float32).reshape(height * width, -1)
    residual = np.empty(flow.shape[:3], np.float32)
    for index, step in enumerate(steps.astype(np.float32)):
        left = flow[index] - (terms @ step.T).reshape(height, width, 2)
        residual[index] = np.sqrt(left[..., 0] ** 2 + left[..., 1] ** 2)
    return residual


def _compose(steps: NDArray[np.float64]) -> NDArray[np.float64]:
    """[F 3 3] from frame 0 to each frame."""
    camera = [np.eye(3)]
    for step in steps:
        move = np.eye(3)
        move[:2] += step
        camera.append(move @ camera[-1])
    return np.stack(camera)
