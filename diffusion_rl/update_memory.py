"""What an update's memory goes to, and the settings that save most when it ran out.

Axes: latents [B C T H W].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from diffusion_rl.full_policies import REFERENCE, FullPolicies, FullSettings
from diffusion_rl.generators.base import AbstractVideoGenerator
from diffusion_rl.lora import LoraSettings, tuner_layers
from diffusion_rl.memory_errors import Saving
from diffusion_rl.optimizers import STATE_BYTES
from diffusion_rl.out_of_memory import learners_of, linears_of, smaller_passes, tokens_of
from diffusion_rl.policies import full_policies, policies_of
from diffusion_rl.progress import FinetuneSettings


def update_savings(generator: AbstractVideoGenerator, settings: FinetuneSettings) -> list[Saving]:
    """Every setting that would help the update, with about what it saves; unsorted.

    Counted is what passes with gradient keep for their backward pass, and what belongs to the
    weights that learn.
    """
    drawn = settings.rollout.prompts_per_update * settings.rollout.videos_per_prompt
    batch = min(settings.rollout.learning_micro_batch, drawn)
    guided = settings.rollout.learning_guidance != 1
    kept = kept_for_backward(generator, batch * (2 if guided else 1))
    found = smaller_passes(generator, "rollout.update_micro_batch", batch, kept)
    blocks = max((len(p) for p in _parts(generator, nn.ModuleList)), default=0)
    if blocks > 1 and not any(
        getattr(p, "gradient_checkpointing", False) for p in learners_of(generator)
    ):
        # What enters each block stays, and one block at a time is whole.
        share = 1 - 1 / blocks - blocks / max(1, len(list(linears_of(generator))))
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


def attaching_savings(
    transformer: nn.Module, learner: LoraSettings | FullSettings, *, old_policy: bool, average: bool
) -> list[Saving]:
    """Every setting that would help to attach what learns, with about what it saves; unsorted.

    Of full fine-tuning all weights are counted, also where `targets` names a few; a LoRA's own
    numbers are few against the transformer's, so that nothing of it would help.

    Args:
        transformer: as it was loaded.
        learner: what was to be attached.
        old_policy: whether a slow copy belongs to it.
        average: whether a running average does.
    """
    if isinstance(learner, LoraSettings):
        return []
    here = [one.to_local() if isinstance(one, DTensor) else one for one in transformer.parameters()]
    sizes = [_size(one) for one in here]
    whole = sum(4 * one.numel() for one in here)
    masters = whole if sum(sizes) < whole else 0
    on_device = learner.copies == "device"
    copies = sum(sizes) + whole * (old_policy + average)
    found = [Saving("lora instead of full", masters + copies * on_device)]
    if on_device:
        found.append(Saving("full.copies=cpu", copies))
    if average and on_device:
        found.append(Saving("optimizer.average_decay=0", whole))
    return [one for one in found if one.bytes]


def kept_for_backward(generator: AbstractVideoGenerator, batch: int) -> float:
    """About the bytes that a pass with gradient keeps: what enters and leaves each linear layer.

    Of a LoRA beside weights of half precision also what enters it, in float32. Within a factor of
    two of what was counted for Wan's transformer.
    """
    widths = sum(
        (layer.in_features + layer.out_features) * layer.weight.dtype.itemsize
        for layer in linears_of(generator)
    )
    for layer in tuner_layers(generator.transformer):
        base: Any = layer.get_base_layer()
        if base.weight.dtype.itemsize < torch.float32.itemsize:
            widths += base.in_features * torch.float32.itemsize
    # Where two transformers learn a video passes through one of them at a time.
    return batch * tokens_of(generator) * widths / len(learners_of(generator))


def _parts(generator: AbstractVideoGenerator, kind: Any) -> Iterator[Any]:
    return (part for part in generator.transformer.modules() if isinstance(part, kind))


def _masters(policies: FullPolicies) -> list[nn.Parameter]:
    """The float32 masters of weights of half precision."""
    return [one for name, one in policies.trained.items() if one is not policies.parts[name]]


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
