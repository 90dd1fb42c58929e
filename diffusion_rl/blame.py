"""A judge's blame on the positions of a latent: what it is there, as weights, and elsewhere.

Axes: B videos, F frames; of the latent T frames, H, W; of a blame map Y and X, which may be any.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion_rl.shapes import check_shape

EVEN = 1e-9
"""Blame whose values differ by less than this share of the largest is even: it points nowhere."""


class LatentGrid(NamedTuple):
    """What the positions of a latent show."""

    frame_groups: Sequence[range]
    """T ranges: the frames of the video that each latent frame stands for; empty for one that is
    cut off before decoding."""
    height: int
    """Latent positions from top to bottom, each showing an equal part of the frame."""
    width: int
    """Latent positions from left to right."""


def pool_blame(blame: Tensor, grid: LatentGrid) -> Tensor:
    """Average blame over what each latent position shows, whatever the map's resolution.

    A pixel that lies on the edge between two positions counts for each with the part that it has in
    it, so that a map and the same map drawn larger give the same.

    Args:
        blame: [B F Y X] at least 0.
        grid: Of the latents.

    Returns:
        [B T H W] float64; 0 for latent frames that show none of the video.

    Raises:
        ValueError: The map has other frames than the grid, or a value below 0 or NaN.
    """
    axes = check_shape("blame", blame, "B F Y X")
    groups = grid.frame_groups
    shown = [frame for group in groups for frame in group]
    if shown != list(range(axes["F"])):
        raise ValueError(
            f"blame must have the {len(shown)} frames that the latent frames show, each once, got "
            f"{axes['F']}"
        )
    if not bool((blame >= 0).all()):
        raise ValueError(f"blame must be at least 0, got {blame.min().item()}")
    time = torch.zeros(len(groups), axes["F"], dtype=torch.float64)
    for row, group in enumerate(groups):
        time[row, list(group)] = 1 / max(1, len(group))
    rows, columns = _overlaps(grid.height, axes["Y"]), _overlaps(grid.width, axes["X"])
    of_frames = rows @ blame.detach().cpu().double() @ columns.T
    return torch.einsum("tf,bfhw->bthw", time, of_frames)


def blame_weights(pooled: Tensor, grid: LatentGrid) -> Tensor:
    """Blame [B T H W] as weights of mean 1; all 1 where there is none or it is even.

    Latent frames that show nothing of the video have no part in the evenness.
    """
    shown = pooled[:, _shown_frames(grid)].flatten(1)
    low, high = shown.min(dim=1).values, shown.max(dim=1).values
    even = (high - low <= EVEN * high).view(-1, 1, 1, 1)
    mean = pooled.mean(dim=(1, 2, 3), keepdim=True)
    return torch.where(even, 1.0, pooled / mean.where(~even, 1.0))


def move_at_random(
    weights: Tensor, grid: LatentGrid, seeds: Sequence[int], rows: Tensor | None = None
) -> Tensor:
    """Shift each video's weights [B T H W] by a random way in time and space, round the edges.

    The region keeps its shape, its size and how it is concentrated, and loses only its place.
    Latent frames that show nothing stay out of it. Where the weights are of some videos only, they
    are those at `rows` [B] of the seeds.
    """
    moved, shown = weights.clone(), _shown_frames(grid)
    places = range(len(seeds)) if rows is None else rows.tolist()
    for row, place in enumerate(places):
        # The third word keeps apart from the noise that the rollout draws of the same seed.
        earlier = list(seeds[:place]).count(seeds[place])
        words = np.random.SeedSequence((seeds[place], earlier, 1)).generate_state(3)
        own = weights[row, shown]
        ways = tuple(int(word) % size for word, size in zip(words, own.shape, strict=True))
        moved[row, shown] = own.roll(ways, dims=(0, 1, 2))
    return moved


def _shown_frames(grid: LatentGrid) -> list[int]:
    """Latent frames that show something."""
    return [place for place, group in enumerate(grid.frame_groups) if len(group)]


def _overlaps(cells: int, pixels: int) -> Tensor:
    """[cells pixels] float64 part of each cell of a side that each pixel covers."""
    # In units of 1 / (cells * pixels) of the side all edges are whole numbers.
    first, pixel = torch.arange(cells)[:, None] * pixels, torch.arange(pixels)[None] * cells
    last = torch.minimum(first + pixels, pixel + cells)
    return (last - torch.maximum(first, pixel)).clamp_min(0).double() / pixels
