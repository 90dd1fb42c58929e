"""The table of generator families: a new one is a file in this folder and a row here."""

from __future__ import annotations

import difflib
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Family:
    """What is known of a family before anything is loaded."""

    loader: str
    """Where it is loaded from, as module:name."""
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
        transformer="WanTransformer3DModel",
        lora_targets=_WAN,
    ),
    "wan2.2": Family(
        loader="diffusion_rl.generators.wan22:Wan22Generator.from_pretrained",
        transformer="WanTransformer3DModel",
        lora_targets=_WAN,
        options=("learns", "guidance_scale_2"),
    ),
    "cogvideox": Family(
        loader="diffusion_rl.generators.cogvideox:CogVideoXGenerator.from_pretrained",
        transformer="CogVideoXTransformer3DModel",
        lora_targets=(*_ATTENTION, "ff.net.0.proj", "ff.net.2"),
    ),
    "ltx": Family(
        loader="diffusion_rl.generators.ltx:LtxGenerator.from_pretrained",
        transformer="LTXVideoTransformer3DModel",
        lora_targets=(*_ATTENTION, "ff.net.0.proj", "ff.net.2"),
        options=("decode_timestep", "decode_noise_scale"),
    ),
    "hunyuan1.5": Family(
        loader="diffusion_rl.generators.hunyuan15:HunyuanVideo15Generator.from_pretrained",
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
