"""What to change when memory ran out: the settings that save most, by the shapes at hand.

Here for drawing videos; `update_memory` knows it for the update. Axes: B videos, latents
[B C T H W].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import nn

from diffusion_rl.generators.base import AbstractVideoGenerator
from diffusion_rl.memory_errors import Saving
from diffusion_rl.processes import team_size

SMALLER = 3 / 4
"""Of height and width: the next smaller size that is worth a try."""


def drawing_savings(
    generator: AbstractVideoGenerator, micro_batch: int, videos: int
) -> list[Saving]:
    """Every setting that would help drawing, with about what it saves.

    Counted is what a pass and the decoder hold at once.

    Args:
        generator: whose shapes are asked.
        micro_batch: videos of a pass, at most.
        videos: that are drawn in all.
    """
    batch = min(micro_batch, videos)
    needed = drawing_bytes(generator, batch)
    found = smaller_passes(generator, "rollout.micro_batch", batch, needed)
    if (tiled := drawing_bytes(generator, batch, tiled=True)) < needed:
        found.append(Saving("generator.execution.vae_tiling=true", needed - tiled))
    return found


def drawing_bytes(generator: AbstractVideoGenerator, batch: int, *, tiled: bool = False) -> float:
    """About the bytes at once of drawing: the widest layer of a pass, or the decoder's last.

    Args:
        generator: whose shapes are asked.
        batch: videos of a pass.
        tiled: as if the decoder worked tile by tile, where it can.
    """
    widest = max(
        (one.in_features + one.out_features) * one.weight.dtype.itemsize
        for one in linears_of(generator)
    )
    vae: Any = getattr(getattr(generator, "pipeline", None), "vae", None)
    height, width = generator.height, generator.width
    if tiled or getattr(vae, "use_tiling", False):
        height = min(height, getattr(vae, "tile_sample_min_height", height))
        width = min(width, getattr(vae, "tile_sample_min_width", width))
    pixels = generator.num_frames * height * width
    channels = 3
    if vae is not None:
        last = [part for part in vae.decoder.modules() if isinstance(part, nn.Conv2d | nn.Conv3d)]
        channels += last[-1].in_channels
    return batch * max(tokens_of(generator) * widest, 4.0 * pixels * channels)


def smaller_passes(
    generator: AbstractVideoGenerator, name: str, batch: int, needed: float
) -> list[Saving]:
    """Fewer videos in a pass, smaller ones, shorter ones; of sizes that the generator takes."""
    found = []
    if batch > 1:
        found.append(Saving(f"{name}={batch // 2}", needed * (1 - (batch // 2) / batch)))
    step = getattr(generator, "pixel_factor", 1)
    height, width = (
        max(step, round(size * SMALLER) // step * step)
        for size in (generator.height, generator.width)
    )
    share = height * width / (generator.height * generator.width)
    if share < 1:
        setting = f"generator.height={height} generator.width={width}"
        found.append(Saving(setting, needed * (1 - share)))
    latent_frames, groups = generator.latent_shape[1], generator.frame_groups
    half = max(group.stop for group in groups[: (latent_frames + 1) // 2])
    step = getattr(generator, "frame_factor", 1)
    frames = 1 + max(0, half - 1) // step * step
    if frames < generator.num_frames:
        left = sum(group.stop <= frames for group in groups)
        saved = needed * (1 - left / latent_frames)
        found.append(Saving(f"generator.num_frames={frames}", saved))
    return found


def tokens_of(generator: AbstractVideoGenerator) -> float:
    """Tokens of a video that pass here: latent positions by the patch's size, by the team's."""
    config: Any = getattr(learners_of(generator)[0], "config", None)
    patch = getattr(config, "patch_size", None) or 1
    if isinstance(patch, int):
        patch = (getattr(config, "patch_size_t", None) or 1, patch, patch)
    return math.prod(generator.latent_shape[1:]) / math.prod(patch) / team_size()


def learners_of(generator: AbstractVideoGenerator) -> list[nn.Module]:
    """The transformers that learn."""
    whole = generator.transformer
    return list(whole.values()) if isinstance(whole, nn.ModuleDict) else [whole]


def linears_of(generator: AbstractVideoGenerator) -> Iterator[nn.Linear]:
    """The transformer's own linear layers."""
    for name, part in generator.transformer.named_modules():
        if isinstance(part, nn.Linear) and "lora_" not in name:
            yield part
