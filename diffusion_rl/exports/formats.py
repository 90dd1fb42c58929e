"""The formats of `export`, and what each needs to know of the base."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from diffusion_rl.configuration import CONFIG_FILE, load_config
from diffusion_rl.exports.comfyui import write_comfyui
from diffusion_rl.exports.parts import LoraPart, read_lora
from diffusion_rl.exports.peft_layout import write_peft
from diffusion_rl.generators.families import FAMILIES
from diffusion_rl.generators.pipeline import find_folder
from diffusion_rl.lora_files import pack_lora
from diffusion_rl.weight_files import COMPONENTS
from diffusion_rl.whole_files import write_whole

FORMATS = ("diffusers", "comfyui", "peft", "merged")


@dataclass(frozen=True, kw_only=True)
class Base:
    """The generator that a LoRA belongs to."""

    family: str
    """One of FAMILIES."""
    path: str
    """A pipeline's folder or a hub id."""
    local_path: str | None = None
    """A folder to read instead of asking the hub for `path`."""
    revision: str | None = None
    """Of the hub model."""
    dtype: str = "float32"
    """What merged weights are rounded to unless another is asked for."""

    @property
    def hub_id(self) -> str | None:
        """`path`, unless it is a folder, whose name is nobody else's business."""
        return None if Path(self.path).exists() or self.path[:1] in "/.~" else self.path


def find_base(lora: str | Path, base: str | Path | None) -> Base | None:
    """The base that a YAML or a pipeline's folder names, or the config.yaml beside the LoRA.

    Returns:
        None where nothing was named and there is no such file.

    Raises:
        FileNotFoundError: the file or folder named is not there.
        ValueError: a pipeline of no known family, or a YAML that does not fit.
    """
    if base is not None and Path(base).is_dir():
        index = Path(base) / "model_index.json"
        if not index.is_file():
            raise FileNotFoundError(
                f"--base must be a YAML or a pipeline's folder with a model_index.json, got {base}"
            )
        found = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
        for name, family in FAMILIES.items():
            if family.pipeline == found:
                return Base(family=name, path=str(base))
        known = ", ".join(sorted({family.pipeline for family in FAMILIES.values()}))
        raise ValueError(f"--base must be a pipeline of {known}, got a {found} in {base}")
    config = Path(base) if base is not None else Path(lora).parent / CONFIG_FILE
    if base is None and not config.is_file():
        return None
    own = load_config(config).generator
    return Base(
        family=own.family,
        path=own.path,
        local_path=own.local_path,
        revision=own.revision,
        dtype=own.dtype,
    )


def export_lora(
    lora: str | Path,
    output: str | Path,
    format: str,
    *,
    base: str | Path | None = None,
    dtype: str | None = None,
) -> list[Path]:
    """Write a saved LoRA for another program.

    Args:
        lora: folder that `save_lora` wrote.
        output: folder to write to.
        format: one of FORMATS.
        base: see `find_base`; `comfyui` and `merged` need it, `peft` notes a hub id from it.
        dtype: of the merged weights; None is the base's.

    Returns:
        The files, or for `peft` and `merged` the folders, that a loader is to be given.

    Raises:
        FileNotFoundError: no LoRA in the folder, or no base that is needed.
        ValueError: the LoRA does not fit, or the format cannot hold it.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format}")
    if dtype is not None and format != "merged":
        raise ValueError(
            f"dtype must be left out but for format merged, got {dtype}; the others hold the "
            "adapter's own float32"
        )
    parts, folder = read_lora(lora), Path(output)
    found = find_base(lora, base)
    if format == "diffusers":
        return write_diffusers(parts, folder)
    if format == "peft":
        return write_peft(parts, found.hub_id if found else None, folder)
    if found is None:
        raise FileNotFoundError(
            f"base must be known for format {format}, got no {CONFIG_FILE} beside {lora}; name a "
            "YAML or a pipeline's folder with --base"
        )
    if format == "comfyui":
        return write_comfyui(parts, found.family, folder)
    # Inside the function: the other formats need no diffusers, which is slow to load.
    from diffusion_rl.exports.merged import write_merged

    source = find_folder(found.path, found.local_path, found.revision)
    return [write_merged(parts, found.family, source, folder, dtype=dtype or found.dtype)]


def write_diffusers(parts: list[LoraPart], folder: Path) -> list[Path]:
    """Write the file or files that a pipeline's `load_lora_weights` reads."""
    names = {component: name for name, component in COMPONENTS.items()}
    return [
        write_whole(folder / names[part.component], pack_lora(part.state, part.settings))
        for part in parts
    ]
