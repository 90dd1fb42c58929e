"""A saved LoRA read back for export: what it adapts, and with what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from diffusion_rl.generators.base import LORA_FILE
from diffusion_rl.lora import LoraSettings
from diffusion_rl.lora_files import parse_lora
from diffusion_rl.weight_files import COMPONENTS


@dataclass(frozen=True)
class LoraPart:
    """The LoRA of one transformer."""

    component: str
    """Name of the transformer in its pipeline: `transformer` or `transformer_2`."""
    state: Mapping[str, Tensor]
    """Weights in float32 by diffusers' names, without the component's."""
    settings: LoraSettings
    """Rank, alpha and targets."""


def read_lora(folder: str | Path) -> list[LoraPart]:
    """The one or two parts of a LoRA in a folder that `save_lora` wrote.

    Raises:
        FileNotFoundError: no LoRA in the folder.
        ValueError: not a safetensors file with a LoRA in it.
    """
    folder = Path(folder)
    parts = []
    for name, component in COMPONENTS.items():
        if (folder / name).is_file():
            path = folder / name
            parts.append(LoraPart(component, *parse_lora(path.read_bytes(), str(path))))
    if not parts and any((folder / name).is_dir() for name in COMPONENTS.values()):
        raise FileNotFoundError(
            f"lora must be a folder with a {LORA_FILE}, got {folder} with whole transformers; "
            "those are diffusers' own folders already: load them with from_pretrained and give "
            "them to the pipeline"
        )
    if not parts:
        raise FileNotFoundError(f"lora must be a folder with a {LORA_FILE}, got {folder}")
    return parts
