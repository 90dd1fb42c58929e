"""Which of an update's videos a process, or a team of them, draws and learns from.

An update's videos are numbered the same way on any number of processes, and split over its
optimiser steps by that number. A share is an even part of each of those steps, so that no process
waits; a group may lie on several of them.

Axes: B videos of a share, N of the update.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_rl import processes


class Share(NamedTuple):
    """Some videos of an update, and how they go through the transformer."""

    rows: Tensor
    """[B] long, ascending: their places among all."""
    total: int
    """N."""
    parts: list[slice]
    """Of the B, those of one pass; rollout and replay must use the same ones, since a matrix
    product's last bits may depend on the batch it is in."""


def chunks(count: int, size: int) -> list[slice]:
    """Slices of at most `size` that cover `count`."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def whole(total: int, size: int) -> Share:
    """Everything, `size` in a pass."""
    return Share(torch.arange(total), total, chunks(total, size))


def own_share(total: int, size: int, steps: int = 1) -> Share:
    """The share of this process and its team.

    Args:
        total: N, at least the number of teams.
        size: most videos in a pass.
        steps: optimiser steps that the videos are split over.

    Raises:
        ValueError: there are fewer videos than teams.
    """
    number, rank = processes.team_count(), processes.team()
    if total < number:
        raise ValueError(
            f"rollout.prompts_per_update * videos_per_prompt must be at least the {number} "
            f"processes, got {total} videos; raise them or start fewer processes"
        )
    ranges = step_ranges(total, size, steps)
    if any(len(one) < number for one in ranges):
        ranges = [range(total)]
    rows = [
        row
        for one in ranges
        for row in one[len(one) * rank // number : len(one) * (rank + 1) // number]
    ]
    places = torch.tensor(rows)
    found = chunks_of_steps(places, total, size, steps)
    return Share(places, total, [part for parts in found for part in parts])


def step_ranges(total: int, size: int, steps: int) -> list[range]:
    """The videos of each optimiser step: whole chunks, as evenly as they go; none is empty."""
    parts = chunks(total, size)
    count = min(steps, len(parts))
    edges = [parts[step * len(parts) // count].start for step in range(count)] + [total]
    return [range(first, last) for first, last in zip(edges[:-1], edges[1:], strict=True)]


def chunks_of_steps(rows: Tensor, total: int, size: int, steps: int) -> list[list[slice]]:
    """For each optimiser step, the passes that the videos at `rows` make of it.

    Args:
        rows: [B] long, ascending.
        total: N.
        size: most videos in a pass.
        steps: optimiser steps wanted.
    """
    found = []
    for one in step_ranges(total, size, steps):
        edges = torch.searchsorted(rows, torch.tensor([one.start, one.stop])).tolist()
        own = chunks(edges[1] - edges[0], size)
        found.append([slice(edges[0] + part.start, edges[0] + part.stop) for part in own])
    return found
