"""Faults of shape and surface: deform, melt, texture flicker, recolour, blur, identity."""

from __future__ import annotations

import numpy as np

from cac_reward.data.synthesis.blending import Canvas
from cac_reward.data.synthesis.motion import Floats, import_cv2
from cac_reward.data.synthesis.targets import Rect, Target, bounds


def deform(canvas: Canvas, target: Target, random: np.random.Generator) -> bool:
    """The thing swirls, bulges or bends like rubber, and comes back."""
    kind = str(random.choice(["swirl", "bulge", "wave"]))
    sign = float(random.choice([-1, 1]))
    waves, phase = float(random.uniform(1.0, 2.0)), float(random.uniform(0, 2 * np.pi))
    count = target.stop - target.start
    for frame in range(target.start, target.stop):
        rect, reach = _reach(target, frame, down=0.0)
        columns, rows = _grid(rect)
        centre, size = target.rect(frame).centre, _size(target.rect(frame))
        x, y = columns - centre[0], rows - centre[1]
        # Quickly there, then swaying: a shape that only jumps could be a cut.
        step = (frame - target.start + 1) / count
        strength = min(1.0, 4 * step) * (0.75 + 0.25 * np.cos(4 * np.pi * step)) * sign
        if kind == "swirl":
            angle = 1.3 * strength * reach
            away_x = x * np.cos(angle) - y * np.sin(angle) - x
            away_y = x * np.sin(angle) + y * np.cos(angle) - y
        elif kind == "bulge":
            away_x, away_y = -0.45 * strength * reach * x, -0.45 * strength * reach * y
        else:
            away_x = 0.22 * size * strength * reach * np.sin(2 * np.pi * waves * y / size + phase)
            away_y = 0.10 * size * strength * reach * np.sin(2 * np.pi * waves * x / size)
        _warp(canvas, frame, rect, away_x, away_y, reach)
    return True


def melt(canvas: Canvas, target: Target, random: np.random.Generator) -> bool:
    """The thing runs down in drips of uneven length, more and more."""
    drips = random.uniform(0.35, 1.0, 7).astype(np.float32)
    cv2 = import_cv2()
    count = target.stop - target.start
    for frame in range(target.start, target.stop):
        rect, reach = _reach(target, frame, down=0.35)
        own = target.rect(frame)
        profile = cv2.resize(drips[None], (rect.width, 1), interpolation=cv2.INTER_CUBIC)
        run = 0.6 * own.height * ((frame - target.start + 1) / count) ** 0.8
        away_y = -run * profile * reach
        columns, _ = _grid(rect)
        # What runs also narrows.
        away_x = 0.25 * (run / own.height) * (columns - own.centre[0]) * reach
        _warp(canvas, frame, rect, away_x, away_y, reach)
    return True


def texture_flicker(canvas: Canvas, target: Target, random: np.random.Generator) -> bool:
    """The surface boils: its detail is shaken, smoothed and overdrawn anew in each frame."""
    cv2 = import_cv2()
    size = _size(target.rect(target.start))
    cell = max(1.5, 0.045 * size)
    for frame in range(target.start, target.stop):
        rect, alpha = _covered(target, frame)
        columns, rows = _grid(rect)
        coarse = (max(2, round(rect.width / cell)), max(2, round(rect.height / cell)))
        noise = random.standard_normal((coarse[1], coarse[0], 3)).astype(np.float32)
        noise = cv2.resize(noise, (rect.width, rect.height), interpolation=cv2.INTER_CUBIC)
        shake = 0.9 * cell
        part = cv2.remap(
            canvas.part(frame, rect),
            columns - rect.left + shake * noise[..., 0],
            rows - rect.top + shake * noise[..., 1],
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REFLECT,
        )
        smooth = cv2.GaussianBlur(part, (0, 0), cell)
        gain = float(random.choice([0.3, 0.9, 1.7]))
        boiled = smooth + gain * (part - smooth) + 9 * noise[..., 2:]
        canvas.blend(frame, rect, boiled, alpha)
    return True


def recolour(canvas: Canvas, target: Target, random: np.random.Generator) -> bool:
    """The thing has another hue; light and shadow stay."""
    cv2 = import_cv2()
    turn = float(random.uniform(0.4, 1.6)) * np.pi
    tint = float(random.uniform(0, 2 * np.pi))
    for frame in range(target.start, target.stop):
        rect, alpha = _covered(target, frame)
        lab = cv2.cvtColor(canvas.part(frame, rect) / 255, cv2.COLOR_RGB2LAB)
        a, b = lab[..., 1].copy(), lab[..., 2].copy()
        # Grey things have no hue to turn: they are tinted. Dark ones need light to show it.
        lab[..., 1] = 1.1 * (a * np.cos(turn) - b * np.sin(turn)) + 26 * np.cos(tint)
        lab[..., 2] = 1.1 * (a * np.sin(turn) + b * np.cos(turn)) + 26 * np.sin(tint)
        lab[..., 0] = 12 + 0.88 * lab[..., 0]
        content = 255 * np.clip(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB), 0, 1)
        canvas.blend(frame, rect, content, alpha)
    return True


def blur(canvas: Canvas, target: Target, random: np.random.Generator) -> bool:
    """The thing is out of focus, and nothing else at its distance."""
    cv2 = import_cv2()
    width = float(random.uniform(0.12, 0.2)) * _size(target.rect(target.start))
    for frame in range(target.start, target.stop):
        rect, alpha = _covered(target, frame, grow=1)
        smooth = cv2.GaussianBlur(canvas.part(frame, rect), (0, 0), max(1.5, width))
        canvas.blend(frame, rect, smooth, alpha)
    return True


def identity(canvas: Canvas, target: Target, random: np.random.Generator) -> bool:
    """The thing has the looks of something else, from another place and moment of the clip."""
    cv2 = import_cv2()
    scene = canvas.scene
    source = _stranger(target, random)
    if source is None:
        return False
    place, moment = source
    for frame in range(target.start, target.stop):
        rect, alpha = _covered(target, frame)
        shown = min(len(scene.frames) - 1, moment + frame - target.start)
        other = scene.frames[shown][place.slices].astype(np.float32)
        other = cv2.resize(other, (rect.width, rect.height), interpolation=cv2.INTER_LINEAR)
        own = canvas.part(frame, rect)
        broad = 0.35 * _size(rect)
        # Its light and shadow go on over the new surface.
        shade = cv2.GaussianBlur(own.mean(axis=2), (0, 0), broad)
        inside = float((shade * alpha).sum() / alpha.sum())
        canvas.blend(frame, rect, other + 0.6 * (shade - inside)[..., None], alpha)
    return True


def _stranger(target: Target, random: np.random.Generator) -> tuple[Rect, int] | None:
    """A place and a moment that look most unlike the target."""
    scene = target.scene
    own = target.rect(target.start)
    height, width = scene.size
    small = scene.motion.small
    pixel = scene.pixel
    count = target.stop - target.start
    latest = max(1, len(small) - count)
    inside = small[target.start][target.masks[0] > 0.5].astype(np.float32)
    best: tuple[float, Rect, int] | None = None
    for _ in range(32):
        left = int(random.integers(0, max(1, width - own.width)))
        top = int(random.integers(0, max(1, height - own.height)))
        place = Rect(left, top, min(width, left + own.width), min(height, top + own.height))
        moment = int(random.integers(0, latest))
        if place.meets(own):
            continue
        part = small[
            moment,
            int(place.top / pixel) : max(1, int(place.bottom / pixel)),
            int(place.left / pixel) : max(1, int(place.right / pixel)),
        ].reshape(-1, 3)
        if not len(part):
            continue
        apart = np.abs(part.mean(axis=0) - inside.mean(axis=0)).max()
        value = float(apart + 1.5 * part.std(axis=0).max())
        if best is None or value > best[0]:
            best = (value, place, moment)
    return None if best is None else best[1:]


def _covered(target: Target, frame: int, grow: int = 0) -> tuple[Rect, Floats]:
    """Where the thing is, with some room around, and its matte there."""
    matte = target.matte(frame, grow)
    rect = bounds(matte > 0)
    assert rect is not None
    rect = rect.grown(2, *target.scene.size)
    return rect, matte[rect.slices]


def _reach(target: Target, frame: int, down: float) -> tuple[Rect, Floats]:
    """How much a warp moves each pixel: 1 in the thing, fading smoothly to exactly 0 around it.

    Args:
        target: The thing.
        frame: Index.
        down: Share of its height by which the reach is drawn downwards.
    """
    cv2 = import_cv2()
    scene = target.scene
    own = target.rect(frame)
    soft = 0.10 * _size(own) + 2
    room = round(3 * soft) + round(down * own.height) + 2
    rect = own.grown(room, *scene.size)
    matte = target.matte(frame)[rect.slices]
    longer = round(down * own.height)
    if longer:
        kernel = np.zeros((2 * longer + 1, 1), np.uint8)
        kernel[: longer + 1] = 1
        matte = cv2.dilate(matte, kernel)
    matte = cv2.GaussianBlur(matte, (0, 0), soft)
    reach = np.clip((matte - 0.08) / 0.72, 0, 1)
    return rect, reach * reach * (3 - 2 * reach)


def _warp(
    canvas: Canvas, frame: int, rect: Rect, away_x: Floats, away_y: Floats, reach: Floats
) -> None:
    """Show each pixel of a part from some pixels away."""
    cv2 = import_cv2()
    columns, rows = _grid(rect)
    whole = canvas.frame(frame).astype(np.float32)
    content = cv2.remap(
        whole,
        np.broadcast_to(columns + away_x, reach.shape).astype(np.float32),
        np.broadcast_to(rows + away_y, reach.shape).astype(np.float32),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT,
    )
    canvas.blend(frame, rect, content, (reach > 0).astype(np.float32))


def _grid(rect: Rect) -> tuple[Floats, Floats]:
    """Column and row of each pixel of a part, in the frame."""
    rows, columns = np.mgrid[rect.top : rect.bottom, rect.left : rect.right].astype(np.float32)
    return columns, rows


def _size(rect: Rect) -> float:
    """Geometric mean of width and height."""
    return float(np.sqrt(rect.width * rect.height))
