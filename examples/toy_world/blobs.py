"""From pixels to coloured blobs and background figures; the oracle's eyes.

Knows nothing of how clips are drawn: only that things are saturated and the background is grey.
Legend: B videos, F frames, N = B * F pictures, M blobs, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from scipy import ndimage

HUES = ("red", "yellow", "green", "cyan", "blue", "magenta")
# Upper ends of the hue ranges in degrees; red goes on from the last one through zero.
_HUE_ENDS = np.array([28.0, 90.0, 154.0, 209.0, 267.0, 330.0], np.float32)

# In levels of 0..255: what counts as coloured at all, and how coloured a full object is.
_COLOURED, _FULL = 60.0, 160.0
_SMALLEST_AREA = 0.012


@dataclass(frozen=True)
class Blobs:
    """Connected regions of one hue, one row each; lengths and places relative to the frame."""

    picture: np.ndarray
    """[M] which of the N pictures."""
    hue: np.ndarray
    """[M] index into HUES."""
    area: np.ndarray
    """[M] share of the frame, edge pixels counted by how coloured they are."""
    centre: np.ndarray
    """[M 2] x, y."""
    aspect: np.ndarray
    """[M] log of width over height, from the second moments."""
    form: np.ndarray
    """[M 4] moments that tell shapes apart, free of place and size."""
    box: np.ndarray
    """[M 4] x1, y1, x2, y2."""
    strength: np.ndarray
    """[M] typical max minus min of R, G, B inside, in levels."""

    def between(self, first: int, last: int) -> Blobs:
        """The blobs of pictures first .. last - 1, which are numbered from zero again."""
        rows = slice(*np.searchsorted(self.picture, [first, last]))
        parts = {one.name: getattr(self, one.name)[rows] for one in fields(self)}
        return Blobs(**{**parts, "picture": parts["picture"] - first})


@dataclass(frozen=True)
class Backdrop:
    """What is behind the objects, one row for each of the N pictures, in levels of 0..255."""

    share: np.ndarray
    """[N] share of the frame that is background."""
    tint: np.ndarray
    """[N] how far the mean is from grey: max minus min of R, G, B."""
    level: np.ndarray
    """[N] mean brightness."""
    roughness: np.ndarray
    """[N] deviation (RMS) from a plane of brightness."""
    speckle: np.ndarray
    """[N] mean of max minus min of R, G, B over pixels."""
    edge: np.ndarray
    """[N] sharpness of outlines: share of an object's colour gained within two pixels."""

    def between(self, first: int, last: int) -> Backdrop:
        """The rows of pictures first .. last - 1."""
        return Backdrop(**{one.name: getattr(self, one.name)[first:last] for one in fields(self)})


def find_blobs(pictures: np.ndarray) -> tuple[Blobs, Backdrop]:
    """Segment pictures by saturation and hue.

    Args:
        pictures: [N H W 3] float32 in 0..255.
    """
    high, low = pictures.max(-1), pictures.min(-1)
    chroma = high - low
    coloured = chroma > _COLOURED
    where = np.nonzero(coloured)
    hue = _hue_class(pictures[where], high[where], chroma[where])
    masks = np.zeros((len(HUES), *chroma.shape), bool)
    masks[(hue, *where)] = True
    in_plane = np.zeros((3, 3, 3, 3), int)
    in_plane[1, 1, 1, :] = in_plane[1, 1, :, 1] = 1
    labels, count = ndimage.label(masks, in_plane)
    names = labels[(hue, *where)] - 1
    blobs = _in_order(_measure(names, count, where, hue, chroma[where], chroma.shape))
    return blobs, _backdrop(pictures, chroma, blobs)


def _in_order(blobs: Blobs) -> Blobs:
    order = np.argsort(blobs.picture, kind="stable")
    return Blobs(**{one.name: getattr(blobs, one.name)[order] for one in fields(blobs)})


def _hue_class(rgb: np.ndarray, high: np.ndarray, chroma: np.ndarray) -> np.ndarray:
    red, green, blue = rgb[:, 0], rgb[:, 1], rgb[:, 2]
    degrees = np.where(
        high == red,
        ((green - blue) / chroma) % 6,
        np.where(high == green, (blue - red) / chroma + 2, (red - green) / chroma + 4),
    )
    return np.searchsorted(_HUE_ENDS, 60 * degrees) % len(HUES)


def _measure(
    names: np.ndarray,
    count: int,
    where: tuple[np.ndarray, ...],
    hue: np.ndarray,
    chroma: np.ndarray,
    extent: tuple[int, ...],
) -> Blobs:
    """Weighted moments of every label, small ones dropped."""
    _, height, width = extent
    weight = np.minimum(1, chroma / _FULL).astype(np.float64)
    area = np.bincount(names, weight, count) / (height * width)
    keep = np.nonzero(area >= _SMALLEST_AREA)[0]
    rank = np.full(count + 1, -1)
    rank[keep] = np.arange(len(keep))
    inside = rank[names] >= 0
    names, weight, chroma, hue = rank[names][inside], weight[inside], chroma[inside], hue[inside]
    picture, row, column = (axis[inside] for axis in where)

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(names, values, len(keep))

    mass = total(weight)
    x, y = (column + 0.5) / width, (row + 0.5) / height
    centre = np.stack([total(weight * x), total(weight * y)], 1) / mass[:, None]
    x, y = x - centre[names, 0], y - centre[names, 1]
    spread_x = total(weight * x * x) / mass + 0.08 / width**2
    spread_y = total(weight * y * y) / mass + 0.08 / height**2
    u, v = x / np.sqrt(spread_x)[names], y / np.sqrt(spread_y)[names]
    form = [total(weight * m) / mass for m in (v**3, u * u * v, u**4 + v**4, u * u * v * v)]
    first = np.zeros(len(keep), int)
    first[names] = np.arange(len(names))
    return Blobs(
        picture=picture[first],
        hue=hue[first],
        area=area[keep],
        centre=centre,
        aspect=0.5 * np.log(spread_x / spread_y),
        form=np.stack(form, 1),
        box=_boxes(names, len(keep), row, column, (height, width)),
        strength=total(weight * chroma * chroma) / total(weight * chroma),
    )


def _boxes(
    names: np.ndarray, count: int, row: np.ndarray, column: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    low, high = np.full((count, 2), np.inf), np.full((count, 2), -np.inf)
    place = np.stack([column, row], 1)
    np.minimum.at(low, names, place)
    np.maximum.at(high, names, place + 1)
    return np.concatenate([low, high], 1) / np.array([*size[::-1], *size[::-1]])


def _backdrop(pictures: np.ndarray, chroma: np.ndarray, blobs: Blobs) -> Backdrop:
    number, height, width = chroma.shape
    around = np.ones((1, 5, 5), bool)
    free = ~ndimage.binary_dilation(chroma > _COLOURED, around)
    free = free.reshape(number, -1).astype(np.float32)
    pixels = np.maximum(free.sum(1), 1)
    mean = np.einsum("np,npc->nc", free, pictures.reshape(number, -1, 3)) / pixels[:, None]
    grey = pictures.mean(-1).reshape(number, -1)
    x = np.tile((np.arange(width) + 0.5) / width - 0.5, height)
    y = np.repeat((np.arange(height) + 0.5) / height - 0.5, width)
    basis = np.stack([np.ones_like(x), x, y], 1)
    products = (basis[:, :, None] * basis[:, None, :]).reshape(-1, 9)
    gram = (free @ products).reshape(number, 3, 3) + 1e-3 * np.eye(3)
    level = mean.mean(1)
    centred = (grey - level[:, None]) * free
    target = centred @ basis
    plane = np.linalg.solve(gram, target[:, :, None])[:, :, 0]
    residual = (centred**2).sum(1) - (plane * target).sum(1)
    return Backdrop(
        share=free.mean(1),
        tint=mean.max(1) - mean.min(1),
        level=level,
        roughness=np.sqrt(np.maximum(residual, 0) / pixels),
        speckle=(chroma.reshape(number, -1) * free).sum(1) / pixels,
        edge=_edge(chroma, blobs),
    )


def _edge(chroma: np.ndarray, blobs: Blobs) -> np.ndarray:
    """[N] how much of its colour an outline gains per two pixels, where it gains any."""
    gain_x = np.abs(chroma[:, 1:-1, 2:] - chroma[:, 1:-1, :-2])
    gain_y = np.abs(chroma[:, 2:, 1:-1] - chroma[:, :-2, 1:-1])
    gain = np.maximum(gain_x, gain_y).reshape(len(chroma), -1)
    gain = gain * (gain > 0.2 * _FULL)
    mean = (gain**2).sum(1) / np.maximum(gain.sum(1), 1)
    count = np.bincount(blobs.picture, minlength=len(chroma))
    strength = np.bincount(blobs.picture, blobs.strength, len(chroma)) / np.maximum(count, 1)
    return np.where(count > 0, mean / np.maximum(strength, 1), 0)
