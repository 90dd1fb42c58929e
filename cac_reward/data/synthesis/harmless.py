"""Edits that leave a clip without fault, so that no judge learns to find the editing instead.

They use the same cutting, blending and resampling as the faults.
"""

from __future__ import annotations

import numpy as np

from cac_reward.data.synthesis.blending import Canvas, membrane
from cac_reward.data.synthesis.motion import Floats, Pixels, import_cv2
from cac_reward.data.synthesis.targets import Rect, Target, bounds


def repaste(canvas: Canvas, target: Target, random: np.random.Generator) -> bool:
    """A moving thing is cut out, resampled and laid back where it was."""
    cv2 = import_cv2()
    off = random.uniform(0.15, 0.35, 2)
    for frame in range(target.start, target.stop):
        matte = target.matte(frame, grow=2)
        rect = bounds(matte > 0)
        assert rect is not None
        rect = rect.grown(canvas.scene.margin, *canvas.scene.size)
        part = canvas.part(frame, rect)
        size = (rect.width, rect.height)
        for x, y in (off, -off):
            move = np.array([[1, 0, x], [0, 1, y]])
            part = cv2.warpAffine(part, move, size, borderMode=cv2.BORDER_REFLECT)
        _join(canvas, frame, rect, part, matte[rect.slices])
    return True


def refill(canvas: Canvas, target: Target, random: np.random.Generator) -> bool:
    """A piece of still background comes from another moment."""
    cv2 = import_cv2()
    scene = canvas.scene
    place = _still_place(target, random)
    if place is None:
        return False
    alpha = np.zeros(scene.size, np.float32)
    centre = (round(place.centre[0]), round(place.centre[1]))
    cv2.ellipse(alpha, centre, (place.width // 2, place.height // 2), 0, 0, 360, 1.0, cv2.FILLED)
    alpha = cv2.GaussianBlur(alpha, (0, 0), 2)
    alpha[alpha < 0.02] = 0
    whole = bounds(alpha > 0)
    if whole is None:
        return False
    rect = whole.grown(scene.margin, *scene.size)
    moment = max(0, target.start - 2)
    for frame in range(target.start, target.stop):
        content = scene.from_moment(moment, frame)[rect.slices]
        _join(canvas, frame, rect, content, alpha[rect.slices])
    return True


def grade(frames: Pixels, random: np.random.Generator) -> Pixels:
    """[F H W 3] with another gamma, contrast and colour balance throughout."""
    gamma, contrast = float(random.uniform(0.8, 1.25)), float(random.uniform(0.88, 1.1))
    balance = random.uniform(0.94, 1.06, 3)
    level = (np.arange(256) / 255)[:, None] ** gamma
    table = ((level - 0.5) * contrast + 0.5) * balance
    table = np.clip(np.rint(255 * table), 0, 255).astype(np.uint8)
    cv2 = import_cv2()
    return np.stack([cv2.LUT(frame, table[None]) for frame in frames])


def grain(frames: Pixels, random: np.random.Generator) -> Pixels:
    """[F H W 3] with film grain throughout."""
    strength = float(random.uniform(2.0, 5.0))
    count, height, width = frames.shape[:3]
    # One field of noise, shown from another corner in each frame, looks like fresh grain.
    noise = random.standard_normal((height + 64, width + 64, 1)).astype(np.float32) * strength
    result = np.empty_like(frames)
    for frame in range(count):
        y, x = random.integers(0, 65, 2)
        shown = frames[frame] + noise[y : y + height, x : x + width]
        result[frame] = np.rint(shown).clip(0, 255).astype(np.uint8)
    return result


LOCAL = {"repaste": repaste, "refill": refill}
"""Edits of a region; `plant` has shown that nothing can be seen of them."""
GLOBAL = {"grade": grade, "grain": grain}
"""Edits of the whole clip."""


def _join(canvas: Canvas, frame: int, rect: Rect, content: Floats, alpha: Floats) -> None:
    known = (alpha == 0).astype(np.float32)
    join = membrane(canvas.part(frame, rect) - content, known)
    canvas.blend(frame, rect, content + join, alpha)


def _still_place(target: Target, random: np.random.Generator) -> Rect | None:
    """Where least moves, as large as the target."""
    scene = target.scene
    height, width = scene.size
    own = target.rect(target.start)
    speed = scene.motion.residual[max(0, target.start - 2) : target.stop].max(axis=0)
    best: tuple[float, Rect] | None = None
    for _ in range(24):
        left = int(random.integers(0, max(1, width - own.width)))
        top = int(random.integers(0, max(1, height - own.height)))
        place = Rect(left, top, min(width, left + own.width), min(height, top + own.height))
        if place.meets(own):
            continue
        part = speed[
            int(place.top / scene.pixel) : int(place.bottom / scene.pixel) + 1,
            int(place.left / scene.pixel) : int(place.right / scene.pixel) + 1,
        ]
        if best is None or part.max() < best[0]:
            best = (float(part.max()), place)
    return None if best is None else best[1]
