"""A LoRA as files: what diffusers reads, what evaluation loads, what a checkpoint holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from diffusion_rl.generators.base import LORA_FILE, SECOND_LORA_FILE, AbstractVideoGenerator
from diffusion_rl.lora import (
    MAGNITUDE,
    TRAINED,
    LoraSettings,
    adapter_shapes,
    attach_lora,
    check_same_model,
    lora_state,
    saved_adapter,
    set_lora_state,
    shapes_to_attach,
    tuner_layers,
)
from diffusion_rl.whole_files import write_whole

# diffusers reads the adapter's configuration from this entry of the file's metadata.
METADATA_KEY = "lora_adapter_metadata"
PREFIX = "transformer."


def lora_bytes(transformer: nn.Module, adapter: str = TRAINED) -> bytes:
    """An adapter as a safetensors file that a pipeline's `load_lora_weights` reads.

    Names are diffusers' own (`transformer.blocks.0...lora_A.weight`), never PEFT's
    `base_model.model.`, which the Wan loader does not know; alpha travels in the metadata.
    """
    if not tuner_layers(transformer):
        raise ValueError("generator must carry a LoRA to save, got none; call attach_lora first")
    configs: Any = transformer.peft_config
    config = configs[adapter]
    settings = LoraSettings(
        rank=config.r,
        alpha=config.lora_alpha,
        dora=config.use_dora,
        targets=tuple(config.target_modules),
    )
    return pack_lora(lora_state(transformer, adapter), settings)


def pack_lora(state: Mapping[str, Tensor], settings: LoraSettings) -> bytes:
    """Weights by the names of `lora_state` as the file that `lora_bytes` describes."""
    metadata = {
        "r": settings.rank,
        "lora_alpha": settings.common_alpha,
        "target_modules": sorted(settings.targets or ()),
        "use_dora": settings.dora,
    }
    packed = json.dumps({PREFIX + key: value for key, value in metadata.items()}, sort_keys=True)
    named = {PREFIX + name: value for name, value in state.items()}
    return save(named, metadata={"format": "pt", METADATA_KEY: packed})


def lora_contents(generator: AbstractVideoGenerator, adapter: str = TRAINED) -> dict[str, bytes]:
    """An adapter as files by name: one, or one for each of two transformers that learn."""
    whole = generator.transformer
    return {
        name: lora_bytes(whole.get_submodule(place), adapter)
        for name, place in generator.lora_files.items()
    }


def set_lora_contents(
    generator: AbstractVideoGenerator, contents: Mapping[str, bytes], source: str
) -> None:
    """Put files from `lora_contents` into the trained adapter, attaching it if there is none.

    Nothing is touched unless everything fits.

    Raises:
        ValueError: not safetensors files, not those that the generator has, or the LoRA of
            another model.
    """
    if set(contents) != set(generator.lora_files):
        raise ValueError(
            f"{source} must hold {' and '.join(generator.lora_files)}, got "
            f"{' and '.join(sorted(contents))}; let the same transformers learn as when it was "
            "made (generator.options.learns)"
        )
    parts = []
    for name, place in generator.lora_files.items():
        part, where = generator.transformer.get_submodule(place), f"{source}/{name}"
        state, settings = parse_lora(contents[name], where)
        shapes = adapter_shapes(part) if tuner_layers(part) else shapes_to_attach(part, settings)
        check_same_model(shapes, state, where)
        parts.append((part, state, settings, where))
    for part, state, settings, where in parts:
        if not tuner_layers(part):
            attach_lora(part, settings)
        set_lora_state(part, state, source=where)


def save_lora(generator: AbstractVideoGenerator, folder: str | Path) -> Path:
    """Write the adapter (its average, where kept) for diffusers, `load_lora` and `evaluate`.

    Returns:
        The folder.
    """
    folder = Path(folder)
    for name, content in lora_contents(generator, saved_adapter(generator.transformer)).items():
        write_whole(folder / name, content)
    return folder


def load_lora(generator: AbstractVideoGenerator, folder: str | Path) -> None:
    """Attach the adapter saved in a folder, or overwrite the one attached.

    Raises:
        FileNotFoundError: no LoRA in the folder.
        ValueError: not a safetensors file, or the LoRA of another model.
    """
    folder = Path(folder)
    found = [name for name in (LORA_FILE, SECOND_LORA_FILE) if (folder / name).is_file()]
    if not found:
        expected = " and a ".join(generator.lora_files)
        raise FileNotFoundError(f"lora must be a folder with a {expected}, got {folder}")
    contents = {name: (folder / name).read_bytes() for name in found}
    set_lora_contents(generator, contents, f"lora {folder}")


def parse_lora(content: bytes, source: str) -> tuple[dict[str, Tensor], LoraSettings]:
    """Weights by the names of `lora_state`, and the settings they were made with."""
    try:
        state = load(content)
        # The metadata is read by hand: safetensors gives it for files only, not for bytes.
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"lora must be a safetensors file, got {source}: {error}") from error
    wrong = [name for name in state if not name.startswith(PREFIX)]
    if wrong or not state:
        raise ValueError(
            f"lora must have weights named {PREFIX}*, got {wrong[0] if wrong else 'none'} in "
            f"{source}; write it with save_lora or diffusers' save_lora_weights"
        )
    state = {name.removeprefix(PREFIX): value.float() for name, value in state.items()}
    packed = header.get("__metadata__", {}).get(METADATA_KEY, "{}")
    return state, _settings_of(state, json.loads(packed), source)


def _settings_of(state: dict[str, Tensor], metadata: dict, source: str) -> LoraSettings:
    """Rank, alpha and targets, from the metadata or else from the shapes of the weights."""
    ranks = {value.shape[0] for name, value in state.items() if name.endswith("lora_A.weight")}
    if len(ranks) != 1:
        raise ValueError(f"lora must have one rank, got {sorted(ranks) or 'none'} in {source}")
    rank = ranks.pop()
    modules = sorted({name.split(".lora_")[0] for name in state})
    return LoraSettings(
        rank=rank,
        alpha=float(metadata.get(PREFIX + "lora_alpha", rank)),
        rank_stabilized=bool(metadata.get(PREFIX + "use_rslora", False)),
        dora=any(f".{MAGNITUDE}." in f"{name}." for name in state),
        targets=tuple(metadata.get(PREFIX + "target_modules", modules)),
    )
