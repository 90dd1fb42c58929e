"""A pipeline with the LoRA added to its weights: nothing but diffusers is needed to run it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from diffusion_rl.exports.parts import LoraPart
from diffusion_rl.generators.families import FAMILIES, check_pipeline_class
from diffusion_rl.generators.pipeline import DTYPES
from diffusion_rl.lora import (
    attach_lora,
    check_same_model,
    set_lora_state,
    shapes_to_attach,
    tuner_layers,
)
from diffusion_rl.weight_files import forget_source


def write_merged(
    parts: Sequence[LoraPart], family: str, source: str | Path, folder: Path, *, dtype: str
) -> Path:
    """Write the whole pipeline of `source` with the LoRA's update added to its weights.

    Args:
        parts: of the LoRA.
        family: of the pipeline.
        source: the pipeline's folder.
        folder: written in one step; must be missing or empty.
        dtype: of transformers and text encoders, `float32`, `bfloat16` or `float16`; the
            autoencoder stays in float32. The sum is taken in float32 and rounded once.

    Raises:
        ValueError: the LoRA belongs to another model, or an option is wrong.
        FileExistsError: there is something in the folder.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"output must be a new or an empty folder, got {folder}")
    name = FAMILIES[family].pipeline
    check_pipeline_class(source, name)
    pipeline = getattr(diffusers, name).from_pretrained(
        source, dtype={"default": DTYPES[dtype], "vae": torch.float32}, local_files_only=True
    )
    for part in parts:
        transformer = getattr(pipeline, part.component, None)
        if transformer is None:
            raise ValueError(
                f"lora must fit the pipeline, got one of a {part.component}, which {source} has not"
            )
        merge_lora(transformer, part)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    forget_source(partial)
    os.replace(partial, folder)
    return folder


def merge_lora(transformer: nn.Module, part: LoraPart) -> None:
    """Add a LoRA's update to a transformer's weights, and leave no adapter behind.

    Raises:
        ValueError: the LoRA belongs to another model, or an update is not finite.
    """
    shapes = shapes_to_attach(transformer, part.settings)
    check_same_model(shapes, dict(part.state), f"lora of the {part.component}")
    attach_lora(transformer, part.settings)
    set_lora_state(transformer, dict(part.state))
    layers = set(tuner_layers(transformer))
    for name, layer in list(transformer.named_modules()):
        if layer in layers:
            base: Any = layer.get_base_layer()
            dtype = base.weight.dtype
            base.float()
            layer.merge(safe_merge=True)
            transformer.set_submodule(name, base.to(dtype))
    del transformer.peft_config
