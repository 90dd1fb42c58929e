"""What the toy world's pictures are made of: backgrounds, shapes and colours."""

from __future__ import annotations

import numpy as np


def background(random: np.random.Generator, size: int) -> np.ndarray:
    """[H W 3] plain or graded grey, in 0..255."""
    low, high = np.sort(random.uniform(15, 95, 2))
    if random.random() < 0.5:
        high = low
    angle = random.uniform(0, 2 * np.pi)
    axis = (np.arange(size) + 0.5) / size - 0.5
    ramp = 0.5 + (axis[None, :] * np.cos(angle) + axis[:, None] * np.sin(angle)) / 1.42
    return np.repeat((low + (high - low) * ramp)[:, :, None], 3, axis=2)


def turn_hue(rgb: np.ndarray, degrees: float) -> np.ndarray:
    """Turn colours [F 3] about the grey axis; lightness and saturation keep."""
    if degrees == 0:
        return rgb
    angle = np.deg2rad(degrees)
    grey = np.full((3, 3), 1 / 3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    turn = np.cos(angle) * np.eye(3) + (1 - np.cos(angle)) * grey + np.sin(angle) * cross
    return np.clip(rgb @ turn.T, 0, 255)


def distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to a shape of radius 1 around the origin; negative inside."""
    if shape == "circle":
        return np.sqrt(x * x + y * y) - 1
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.88
    if shape == "triangle":
        side = np.maximum(0.894 * np.abs(x) - 0.447 * (y + 1), -np.inf)
        return np.maximum(side, y - 0.9)
    wide = np.maximum(np.abs(x) - 1.05, np.abs(y) - 0.36)
    tall = np.maximum(np.abs(y) - 1.05, np.abs(x) - 0.36)
    return np.minimum(wide, tall)
