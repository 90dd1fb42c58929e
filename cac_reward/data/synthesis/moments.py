"""Faults of time in one place: freeze, time jump."""

from __future__ import annotations

import numpy as np

from cac_reward.data.synthesis.blending import Canvas, membrane
from cac_reward.data.synthesis.motion import Floats
from cac_reward.data.synthesis.targets import Target, bounds

_LEAST_JUMP = 4
"""Frames."""


def freeze(canvas: Canvas, target: Target, random: np.random.Generator) -> bool:
    """The thing stops dead while the rest goes on."""
    held = target.start
    for frame in range(target.start + 1, target.stop):
        _show_moment(canvas, target, frame, held)
    return True


def time_jump(canvas: Canvas, target: Target, random: np.random.Generator) -> bool:
    """The thing is suddenly ahead of its time, goes on from there and falls back at the end."""
    most = target.last - target.stop
    if most < _LEAST_JUMP:
        return False
    ahead = int(random.integers(max(_LEAST_JUMP, most // 2), most + 1))
    for frame in range(target.start, target.stop):
        _show_moment(canvas, target, frame, frame + ahead)
    return True


def _show_moment(canvas: Canvas, target: Target, frame: int, moment: int) -> None:
    """Show the thing as it is at another moment, where the background has it in this frame."""
    scene = canvas.scene
    then = scene.carried(target.matte(moment, grow=2), moment, frame)
    # Both where it is shown and where it truly is.
    alpha: Floats = np.maximum(target.matte(frame, grow=2), then)
    alpha = alpha * (alpha > 0.02)
    rect = bounds(alpha > 0)
    assert rect is not None
    rect = rect.grown(scene.margin, *scene.size)
    content = scene.from_moment(moment, frame)[rect.slices]
    known = (alpha[rect.slices] == 0).astype(np.float32)
    join = membrane(canvas.part(frame, rect) - content, known)
    canvas.blend(frame, rect, content + join, alpha[rect.slices])
