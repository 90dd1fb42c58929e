"""What to change when memory ran out: the settings that save most, by the shapes at hand.

Axes: B videos, latents [B C T H W].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from diffusion_rl.full_policies import REFERENCE, FullPolicies
from diffusion_rl.generators.base import AbstractVideoGenerator
from diffusion_rl.lora import tuner_layers
from diffusion_rl.optimizers import STATE_BYTES
from diffusion_rl.policies import full_policies, policies_of
from diffusion_rl.processes import team_size
from diffusion_rl.progress import FinetuneSettings

GIGABYTE = 1e9
NAMED = 3
"""Settings that the message names."""
SMALLER = 3 / 4
"""Of height and width: the next smaller size that is worth a try."""
PHRASES = ("out of memory", "can't allocate memory", "not enough memory")
"""What torch says of it where it has no error of its own."""


class Saving(NamedTuple):
    """A setting that would need less memory."""

    setting: str
    """As in a config, with what it would be."""
    bytes: float
    """About what it saves."""


class OutOfMemoryError(RuntimeError):
    """Memory ran out; the message says what to change."""


@contextmanager
def explain_out_of_memory(
    generator: AbstractVideoGenerator, settings: FinetuneSettings, *, learning: bool
) -> Iterator[None]:
    """Say what to change if memory runs out in here, on a GPU or on the CPU.

    Args:
        generator: whose shapes are asked.
        settings: of the run.
        learning: whether passes with gradient are made, or videos are drawn and decoded.

    Raises:
        OutOfMemoryError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        said = str(error).lower()
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and not any(phrase in said for phrase in PHRASES):
            raise
        found = sorted(savings(generator, settings, learning=learning), key=lambda one: -one.bytes)
        advice = "; ".join(
            f"{one.setting} saves about {one.bytes / GIGABYTE:.2g} GB" for one in found[:NAMED]
        )
        doing = "the update" if learning else "drawing videos"
        raise OutOfMemoryError(f"memory ran out in {doing} ({error}); {advice}") from error


def savings(
    generator: AbstractVideoGenerator, settings: FinetuneSettings, *, learning: bool
) -> list[Saving]:
    """Every setting that would help, with about what it saves; unsorted.

    Of the update what passes with gradient keep for their backward pass, and what belongs to the
    weights that learn; of drawing what a pass and the decoder hold at once.
    """
    drawn = settings.rollout.prompts_per_update * settings.rollout.videos_per_prompt
    if not learning:
        name, batch = "rollout.micro_batch", min(settings.rollout.micro_batch, drawn)
        needed = drawing_bytes(generator, batch)
        found = _smaller_passes(generator, name, batch, needed)
        if (tiled := drawing_bytes(generator, batch, tiled=True)) < needed:
            found.append(Saving("generator.execution.vae_tiling=true", needed - tiled))
        return found
    batch = min(settings.rollout.learning_micro_batch, drawn)
    guided = settings.rollout.learning_guidance != 1
    kept = kept_for_backward(generator, batch * (2 if guided else 1))
    found = _smaller_passes(generator, "rollout.update_micro_batch", batch, kept)
    blocks = max((len(p) for p in _parts(generator, nn.ModuleList)), default=0)
    if blocks > 1 and not any(getattr(p, "gradient_checkpointing", False) for p in _all(generator)):
        # What enters each block stays, and one block at a time is whole.
        share = 1 - 1 / blocks - blocks / max(1, len(list(_linears(generator))))
        if share > 0:
            found.append(Saving("generator.execution.gradient_checkpointing=true", kept * share))
    # Of weights that are split over processes, this one's part.
    learning_here = policies_of(generator.transformer)
    learners = [parameter.numel() for parameter in learning_here.parameters()]
    if settings.optimizer.name in ("adamw", "muon") and not learning_here.split:
        saved = STATE_BYTES[settings.optimizer.name] - STATE_BYTES["adamw_8bit"]
        found.append(Saving("optimizer.name=adamw_8bit", saved * sum(learners)))
    if (policies := full_policies(generator.transformer)) is not None:
        copies = [copy for kind in policies.copies.values() for copy in kind.values()]
        if not policies.on_cpu:
            found.append(Saving("full.copies=cpu", sum(map(_size, copies))))
        masters = sum(_size(one) for one in _masters(policies))
        state = STATE_BYTES.get(settings.optimizer.name, 0) + 4
        whole = sum(map(_size, policies.copies[REFERENCE].values())) * (not policies.on_cpu)
        saved = masters + state * sum(learners) + whole
        found.append(Saving("lora instead of full", saved))
    return found


def kept_for_backward(generator: AbstractVideoGenerator, batch: int) -> float:
    """About the bytes that a pass with gradient keeps: what enters and leaves each linear layer.

    Of a LoRA beside weights of half precision also what enters it, in float32. Within a factor of
    two of what was counted for Wan's transformer.
    """
    widths = sum(
        (layer.in_features + layer.out_features) * layer.weight.dtype.itemsize
        for layer in _linears(generator)
    )
    for layer in tuner_layers(generator.transformer):
        base: Any = layer.get_base_layer()
        if base.weight.dtype.itemsize < torch.float32.itemsize:
            widths += base.in_features * torch.float32.itemsize
    # Where two transformers learn a video passes through one of them at a time.
    return batch * _tokens(generator) * widths / len(_all(generator))


def drawing_bytes(generator: AbstractVideoGenerator, batch: int, *, tiled: bool = False) -> float:
    """About the bytes at once of drawing: the widest layer of a pass, or the decoder's last.

    Args:
        generator: whose shapes are asked.
        batch: videos of a pass.
        tiled: as if the decoder worked tile by tile, where it can.
    """
    widest = max(
        (one.in_features + one.out_features) * one.weight.dtype.itemsize
        for one in _linears(generator)
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
    return batch * max(_tokens(generator) * widest, 4.0 * pixels * channels)


def _smaller_passes(
    generator: AbstractVideoGenerator, name: str, batch: int, needed: float
) -> list[Saving]:
    """Fewer videos in a pass, smaller ones, shorter ones."""
    found = []
    if batch > 1:
        found.append(Saving(f"{name}={batch // 2}", needed * (1 - (batch // 2) / batch)))
    size = (round(generator.height * SMALLER), round(generator.width * SMALLER))
    found.append(
        Saving(
            f"generator.height and width near {size[0]} and {size[1]}", needed * (1 - SMALLER**2)
        )
    )
    latent_frames = generator.latent_shape[1]
    if latent_frames > 1:
        fewer = (latent_frames + 1) // 2
        frames = max((group.stop for group in generator.frame_groups[:fewer]), default=1)
        found.append(Saving(f"generator.num_frames={frames}", needed * (1 - fewer / latent_frames)))
    return found


def _tokens(generator: AbstractVideoGenerator) -> float:
    """Tokens of a video that pass here: latent positions by the patch's size, by the team's."""
    config: Any = getattr(_all(generator)[0], "config", None)
    patch = getattr(config, "patch_size", None) or 1
    if isinstance(patch, int):
        patch = (getattr(config, "patch_size_t", None) or 1, patch, patch)
    return math.prod(generator.latent_shape[1:]) / math.prod(patch) / team_size()


def _all(generator: AbstractVideoGenerator) -> list[nn.Module]:
    """The transformers that learn."""
    whole = generator.transformer
    return list(whole.values()) if isinstance(whole, nn.ModuleDict) else [whole]


def _parts(generator: AbstractVideoGenerator, kind: Any) -> Iterator[Any]:
    return (part for part in generator.transformer.modules() if isinstance(part, kind))


def _linears(generator: AbstractVideoGenerator) -> Iterator[nn.Linear]:
    """The transformer's own linear layers."""
    for name, part in generator.transformer.named_modules():
        if isinstance(part, nn.Linear) and "lora_" not in name:
            yield part


def _masters(policies: FullPolicies) -> list[nn.Parameter]:
    """The float32 masters of weights of half precision."""
    return [one for name, one in policies.trained.items() if one is not policies.parts[name]]


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
