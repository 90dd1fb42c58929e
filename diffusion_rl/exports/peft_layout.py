"""A LoRA as PEFT's own folder: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peft import LoraConfig
from safetensors.torch import save

from diffusion_rl.exports.parts import LoraPart
from diffusion_rl.whole_files import write_whole

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."


def write_peft(parts: Sequence[LoraPart], base_id: str | None, folder: Path) -> list[Path]:
    """Write folders that `PeftModel.from_pretrained(transformer, folder)` reads.

    Args:
        parts: of the LoRA; of two, each goes into a folder of its component's name.
        base_id: hub id of the pipeline, noted in the configuration; None where there is none.
        folder: made if missing.

    Returns:
        One folder for each part.
    """
    folders = []
    for part in parts:
        place = folder / part.component if len(parts) > 1 else folder
        config = LoraConfig(
            r=part.settings.rank,
            lora_alpha=part.settings.common_alpha,  # type: ignore[arg-type]  # A float is right too.
            target_modules=list(part.settings.targets or ()),
            use_dora=part.settings.dora,
            base_model_name_or_path=base_id,
            inference_mode=True,
        )
        place.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(str(place))
        state = {PREFIX + name: value.contiguous() for name, value in part.state.items()}
        write_whole(place / WEIGHTS, save(state, metadata={"format": "pt"}))
        folders.append(place)
    return folders
