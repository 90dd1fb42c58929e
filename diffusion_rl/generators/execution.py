"""Put a pipeline's parts where and how the settings say, by diffusers' own features.

It comes before a LoRA is attached: what waits off the device are the base weights alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ContextParallelConfig
from diffusers.hooks import apply_group_offloading
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from diffusion_rl import processes
from diffusion_rl.generators.settings import (
    ContextParallelSettings,
    ExecutionSettings,
)

# Diffusers' name for the hook.
OFFLOAD_HOOK = "group_offloading"
MATRICES = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def transformers_of(pipeline: Any) -> list[Any]:
    """The pipeline's transformer, and its second one if it has two."""
    found = (getattr(pipeline, name, None) for name in ("transformer", "transformer_2"))
    return [part for part in found if part is not None]


def place(
    pipeline: Any, settings: ExecutionSettings, device: torch.device, text_encoders: Sequence[str]
) -> None:
    """Move the pipeline to its device and switch on what the settings ask for.

    Args:
        pipeline: as loaded, without adapters.
        settings: what to switch on.
        device: where to compute.
        text_encoders: names of the pipeline's parts that count as such.

    Raises:
        ValueError: the family, the machine or the number of processes cannot do what is asked.
    """
    for transformer in transformers_of(pipeline):
        prepare_transformer(transformer, settings, device)
    place_text_encoders(pipeline, settings, device, text_encoders)
    if settings.offload and "vae" in settings.offload.parts:
        offload(pipeline.vae, device, "leaf")
    else:
        pipeline.vae.to(device)
    if settings.vae_tiling:
        pipeline.vae.enable_tiling()
    if settings.vae_slicing:
        pipeline.vae.enable_slicing()


def place_text_encoders(
    pipeline: Any, settings: ExecutionSettings, device: torch.device, names: Sequence[str]
) -> None:
    """Move the text encoders that are loaded to the device, or have them visit it."""
    for name in names:
        encoder = getattr(pipeline, name)
        if encoder is None:
            continue
        if settings.offload and "text_encoder" in settings.offload.parts:
            offload(encoder, device, "leaf")
        else:
            encoder.to(device)


def prepare_transformer(
    transformer: Any, settings: ExecutionSettings, device: torch.device
) -> None:
    """Everything that is asked of one transformer."""
    offloads = settings.offload is not None and "transformer" in settings.offload.parts
    if settings.offload is not None and offloads:
        offload(transformer, device, settings.offload.level, settings.offload.blocks_per_group)
    else:
        transformer.to(device)
    if settings.gradient_checkpointing:
        transformer.enable_gradient_checkpointing(recompute_whole if offloads else None)
    if settings.attention is not None:
        set_attention(transformer, settings.attention)
    if settings.context_parallel is not None:
        share_tokens(transformer, settings.context_parallel)
    if settings.compile_blocks is not None:
        compile_blocks(transformer, settings.compile_blocks)


def offload(part: nn.Module, device: torch.device, level: str, blocks_per_group: int = 1) -> None:
    """Let a part's weights wait in the computer's memory; a forward pass fetches its groups.

    Only matrices move. Autograd keeps views of those, which hold on to the copy that was used; of a
    norm's weight or a buffer it keeps the tensor itself, which by then would lie elsewhere. They
    are named one by one, so that a LoRA attached later to the group's modules is no part of it.

    No streams: diffusers fetches ahead in the order of the forward pass, while blocks are computed
    again from the last to the first, so what is fetched ahead there would stay.
    """
    blocks = {"num_blocks_per_group": blocks_per_group} if level == "block" else {}
    apply_group_offloading(part, onload_device=device, offload_type=f"{level}_level", **blocks)
    layers = [module for module in part.modules() if isinstance(module, MATRICES)]
    matrices = {id(layer.weight) for layer in layers}
    for module in part.modules():
        hooks = getattr(module, "_diffusers_hook", None)
        hook = hooks and hooks.get_hook(OFFLOAD_HOOK)
        if hook:
            group = hook.group
            group.onload_()
            held = [one for inside in group.modules for one in inside.parameters()]
            held = [one for one in [*held, *group.parameters] if id(one) in matrices]
            group.parameters = list(dict.fromkeys(held))
            group.modules, group.buffers = [], []
            group.offload_()


def recompute_whole(module: nn.Module, *inputs: Any) -> Any:
    """Gradient checkpointing that reaches the end of a block also when computing it again.

    It would stop early, before the hook that sends the block's weights away.
    """
    with set_checkpoint_early_stop(False):
        return checkpoint(module.__call__, *inputs, use_reentrant=False)


def set_attention(transformer: Any, backend: str) -> None:
    """Compute attention by this backend and no other.

    Raises:
        ValueError: the family's attention cannot be switched, or the backend is not there.
    """
    processors = [getattr(part, "processor", None) for part in transformer.modules()]
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        raise ValueError(
            f"execution.attention must be left out for {type(transformer).__name__}, got "
            f"{backend}; diffusers cannot switch its attention"
        )
    try:
        transformer.set_attention_backend(backend)
    except (RuntimeError, ImportError) as error:
        raise ValueError(
            f"execution.attention must be a backend that is installed, got {backend}: {error}"
        ) from error


def compile_blocks(transformer: Any, backend: str) -> None:
    """Compile the blocks that the transformer repeats, when they first run.

    Raises:
        ValueError: diffusers names no such blocks, or there is no such backend.
    """
    if not getattr(transformer, "_repeated_blocks", None):
        raise ValueError(
            f"execution.compile_blocks must be left out for {type(transformer).__name__}, got "
            f"{backend}; diffusers names no repeated blocks of it"
        )
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise ValueError(
            f"execution.compile_blocks must be one of {', '.join(known)}, got {backend}"
        )
    transformer.compile_repeated_blocks(backend=backend)


def share_tokens(transformer: Any, settings: ContextParallelSettings) -> None:
    """Share out the tokens of a video over the processes, or over those of each team.

    Raises:
        ValueError: the family has no plan for it, or the processes do not divide into such teams.
    """
    if getattr(transformer, "_cp_plan", None) is None:
        raise ValueError(
            f"execution.context_parallel must be left out for {type(transformer).__name__}, got "
            f"ring={settings.ring}, ulysses={settings.ulysses}; diffusers has no plan for it"
        )
    if "encoder_attention_mask" in transformer._cp_plan.get("", {}):
        raise ValueError(
            f"execution.context_parallel must be left out for {type(transformer).__name__}, got "
            f"ring={settings.ring}, ulysses={settings.ulysses}; diffusers lays the mask of its "
            "text over all heads, of which a process then has a part"
        )
    if processes.count() % settings.size:
        raise ValueError(
            "execution.context_parallel must divide the processes that run, got ring="
            f"{settings.ring} x ulysses={settings.ulysses} and {processes.count()}; start a "
            "multiple of them with accelerate launch"
        )
    names = ("teams", "ring", "ulysses")
    shape = (processes.count() // settings.size, settings.ring, settings.ulysses)
    mesh = init_device_mesh(transformer.device.type, shape, mesh_dim_names=names)
    config = ContextParallelConfig(
        ring_degree=settings.ring, ulysses_degree=settings.ulysses, mesh=mesh[names[1:]]
    )
    transformer.enable_parallelism(config=config)
