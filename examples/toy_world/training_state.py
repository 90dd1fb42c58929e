"""Resumable training runs for the toy checkpoints: clips by seed, progress, atomic state files."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from examples.toy_world.world import Clip, WorldSettings, render_clip

logger = logging.getLogger(__name__)

# Seed ranges that never meet: training below, everything that is measured above.
EVALUATION_SEED = 1_000_000_000


def training_seed(stage: int, index: int) -> int:
    """The world seed of one training clip; stages draw from ranges of their own."""
    seed = stage * 100_000_000 + index
    if not 0 <= seed < EVALUATION_SEED:
        raise ValueError(f"training seeds must stay below {EVALUATION_SEED}, got {seed}")
    return seed


def clips_to_tensor(clips: list[Clip]) -> Tensor:
    """Stack clips into [B C F H W] floats in [-1, 1], the layout of diffusers' video VAEs."""
    stacked = np.stack([clip.frames for clip in clips])
    return torch.from_numpy(stacked).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def frames_to_tensor(frames: np.ndarray) -> Tensor:
    """[F H W 3] uint8 to [F 3 H W] floats in [0, 1]."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255


def render_batch(
    stage: int, first: int, count: int, settings: WorldSettings = WorldSettings()
) -> list[Clip]:
    """The training clips first .. first + count - 1 of one stage."""
    return [render_clip(training_seed(stage, first + i), settings) for i in range(count)]


def warmup_cosine(step: int, total: int, warmup: int, floor: float = 0.02) -> float:
    """Learning-rate factor: linear warm-up, then a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))


def set_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Scale every group's base rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_rate"] * factor


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compile each block in place where a C++ compiler is installed; a third less time on a CPU."""
    if shutil.which("g++") is None:
        logger.warning("no C++ compiler (g++) found; training runs uncompiled, and slower")
        return
    for block in blocks:
        block.compile()


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state file so that a kill at any moment leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load_state(path: Path) -> dict[str, Any] | None:
    """Read a state file, or None where the stage has not begun."""
    return torch.load(path, weights_only=True) if path.exists() else None
