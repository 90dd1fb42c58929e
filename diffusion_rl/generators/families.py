"""The table of generator families: a new one is a file in this folder and a row here."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Family:
    """What is known of a family before anything is loaded."""

    loader: str
    """Where it is loaded from, as module:name."""
    pipeline: str
    """Class name of its pipeline in diffusers."""
    transformer: str
    """Class name of its transformer in diffusers."""
    lora_targets: tuple[str, ...]
    """Ends of the names of its attention and feed-forward layers, which a LoRA adapts unless
    other targets are named."""
    options: tuple[str, ...] = ()
    """What `generator.options` may hold: arguments that this family alone takes."""


_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_WAN = (*_ATTENTION, "ffn.net.0.proj", "ffn.net.2")

FAMILIES: dict[str, Family] = {
    "wan": Family(
        loader="diffusion_rl.generators.wan:WanGenerator.from_pretrained",
        pipeline="WanPipeline",
        transformer="WanTransformer3DModel",
        lora_targets=_WAN,
    ),
    "wan2.2": Family(
        loader="diffusion_rl.generators.wan22:Wan22Generator.from_pretrained",
        pipeline="WanPipeline",
        transformer="WanTransformer3DModel",
        lora_targets=_WAN,
        options=("learns", "guidance_scale_2"),
    ),
    "cogvideox": Family(
        loader="diffusion_rl.generators.cogvideox:CogVideoXGenerator.from_pretrained",
        pipeline="CogVideoXPipeline",
        transformer="CogVideoXTransformer3DModel",
        lora_targets=(*_ATTENTION, "ff.net.0.proj", "ff.net.2"),
    ),
    "ltx": Family(
        loader="diffusion_rl.generators.ltx:LtxGenerator.from_pretrained",
        pipeline="LTXPipeline",
        transformer="LTXVideoTransformer3DModel",
        lora_targets=(*_ATTENTION, "ff.net.0.proj", "ff.net.2"),
        options=("decode_timestep", "decode_noise_scale"),
    ),
    "hunyuan1.5": Family(
        loader="diffusion_rl.generators.hunyuan15:HunyuanVideo15Generator.from_pretrained",
        pipeline="HunyuanVideo15Pipeline",
        transformer="HunyuanVideo15Transformer3DModel",
        lora_targets=(
            *_ATTENTION,
            *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
            *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
        ),
    ),
}
"""By name; docs/generators.md describes each."""


def check_options(family: str, options: dict[str, object]) -> None:
    """Refuse options that the family does not take.

    Raises:
        ValueError: names the first one, and those there are.
    """
    known = FAMILIES[family].options
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"options.{name} must be one that family {family} takes "
                f"({', '.join(known) or 'it takes none'}), got another name{hint}"
            )


def check_pipeline_class(folder: str | Path, wanted: str) -> None:
    """Refuse a pipeline's folder of another class than the family's.

    Args:
        folder: with a model_index.json.
        wanted: class name of the pipeline that is going to be loaded.

    Raises:
        ValueError: names the families that load it, if there are any.
    """
    index = json.loads((Path(folder) / "model_index.json").read_text(encoding="utf-8"))
    found = index.get("_class_name")
    if found == wanted:
        return
    # Not loaded all the same: diffusers would, and leave out or make up what differs.
    others = [name for name, family in FAMILIES.items() if family.pipeline == found]
    remedy = "no family loads that; docs/generators.md tells how to add one"
    if others:
        remedy = f"use generator.family={' or '.join(others)}"
    raise ValueError(f"generator.path must be a {wanted}, got a {found} in {folder}; {remedy}")


def default_targets(transformer: str) -> tuple[str, ...]:
    """Attention and feed-forward layers of a transformer class of the table.

    Raises:
        ValueError: no family has it.
    """
    for family in FAMILIES.values():
        if family.transformer == transformer:
            return family.lora_targets
    raise ValueError(
        f"targets must be given for a transformer of no known family, got none for {transformer}"
    )
