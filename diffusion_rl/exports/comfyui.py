"""A LoRA under the names of ComfyUI's own models.

ComfyUI finds a layer's LoRA by the layer's name in its own model: `<name>.lora_down.weight` [r in],
`<name>.lora_up.weight` [out r] and `<name>.alpha` (0-d), applied as alpha / r * up @ down. Its
models are those of the papers, not diffusers', so the names differ (`comfy/lora.py`,
`comfy/weight_adapter/lora.py` and `comfy/ldm/*/model.py` of ComfyUI, read as of January 2026;
`comfy/ldm/cogvideo/model.py`, which came later that year, read in November).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from diffusion_rl.exports.parts import LoraPart
from diffusion_rl.whole_files import write_whole

ONE_FILE = "lora_comfyui.safetensors"
TWO_FILES = {
    "transformer": "lora_comfyui_high_noise.safetensors",
    "transformer_2": "lora_comfyui_low_noise.safetensors",
}
FUSED = 3
"""Layers that ComfyUI keeps as one where it fuses them: query, key and value, in this order."""

_WAN = (
    (r"blocks\.(\d+)\.attn1\.to_([qkv])", r"blocks.\1.self_attn.\2"),
    (r"blocks\.(\d+)\.attn1\.to_out\.0", r"blocks.\1.self_attn.o"),
    (r"blocks\.(\d+)\.attn2\.to_([qkv])", r"blocks.\1.cross_attn.\2"),
    (r"blocks\.(\d+)\.attn2\.to_out\.0", r"blocks.\1.cross_attn.o"),
    (r"blocks\.(\d+)\.ffn\.net\.0\.proj", r"blocks.\1.ffn.0"),
    (r"blocks\.(\d+)\.ffn\.net\.2", r"blocks.\1.ffn.2"),
    (r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"proj_out", "head.head"),
)
_LTX = (
    (r"(transformer_blocks\.\d+\.attn[12]\.to_(?:[qkv]|out\.0))", r"\1"),
    (r"(transformer_blocks\.\d+\.ff\.net\.(?:0\.proj|2))", r"\1"),
    (r"(caption_projection\.linear_[12])", r"\1"),
    (r"proj_in", "patchify_proj"),
    (r"time_embed\.(.+)", r"adaln_single.\1"),
    (r"(proj_out)", r"\1"),
)
# "#" stands between a fused layer and the part of it that this one is.
_HUNYUAN = (
    (r"transformer_blocks\.(\d+)\.attn\.to_([qkv])", r"double_blocks.\1.img_attn.qkv#\2"),
    (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
    (r"transformer_blocks\.(\d+)\.attn\.add_([qkv])_proj", r"double_blocks.\1.txt_attn.qkv#\2"),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"double_blocks.\1.img_mlp.0"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"double_blocks.\1.img_mlp.2"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj", r"double_blocks.\1.txt_mlp.0"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.2", r"double_blocks.\1.txt_mlp.2"),
    (
        r"context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.attn\.to_([qkv])",
        r"txt_in.individual_token_refiner.blocks.\1.self_attn.qkv#\2",
    ),
    (
        r"context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.attn\.to_out\.0",
        r"txt_in.individual_token_refiner.blocks.\1.self_attn.proj",
    ),
    (
        r"context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.ff\.net\.0\.proj",
        r"txt_in.individual_token_refiner.blocks.\1.mlp.0",
    ),
    (
        r"context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.ff\.net\.2",
        r"txt_in.individual_token_refiner.blocks.\1.mlp.2",
    ),
)
_COGVIDEOX = (
    (r"transformer_blocks\.(\d+)\.attn1\.to_([qkv])", r"blocks.\1.\2"),
    (r"transformer_blocks\.(\d+)\.attn1\.to_out\.0", r"blocks.\1.attn_out"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"blocks.\1.ff_proj"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"blocks.\1.ff_out"),
    (r"transformer_blocks\.(\d+)\.(norm[12]\.linear)", r"blocks.\1.\2"),
    (r"time_embedding\.(linear_[12])", r"time_embedding_\1"),
    (r"(patch_embed\.(?:text_)?proj|norm_out\.linear|proj_out)", r"\1"),
)
NAMES: Mapping[str, Sequence[tuple[str, str]]] = {
    "wan": _WAN,
    "wan2.2": _WAN,
    "ltx": _LTX,
    "hunyuan1.5": _HUNYUAN,
    "cogvideox": _COGVIDEOX,
}
"""By family: diffusers' name of a layer (whole, as a pattern) and ComfyUI's."""


def write_comfyui(parts: Sequence[LoraPart], family: str, folder: Path) -> list[Path]:
    """Write a LoRA for ComfyUI's LoRA loaders: one file, or one for each of two models.

    Raises:
        ValueError: ComfyUI's model has none of a layer that is adapted, or the LoRA is a DoRA.
    """
    contents = {part.component: comfyui_state(part, family) for part in parts}
    names = TWO_FILES if len(parts) > 1 or "transformer_2" in contents else None
    return [
        write_whole(
            folder / (names[component] if names else ONE_FILE),
            save(state, metadata={"format": "pt"}),
        )
        for component, state in contents.items()
    ]


def comfyui_state(part: LoraPart, family: str) -> dict[str, Tensor]:
    """One transformer's LoRA by ComfyUI's names.

    Where ComfyUI has one layer for query, key and value, the three LoRAs of rank r become one of
    rank 3 r whose second matrix is block-diagonal, and alpha becomes 3 alpha: the same update,
    from the same numbers.

    Raises:
        ValueError: see `write_comfyui`.
    """
    if part.settings.dora:
        raise ValueError(
            "format comfyui must be given a plain LoRA, got a DoRA; use --format merged"
        )
    found: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    for module in dict.fromkeys(name.split(".lora_")[0] for name in part.state):
        place, _, piece = comfyui_name(module, family).partition("#")
        down, up = (part.state[f"{module}.lora_{half}.weight"] for half in "AB")
        found.setdefault(place, {})["qkv".find(piece) if piece else -1] = (down, up)
    state = {}
    for place, pieces in found.items():
        name = f"diffusion_model.{place}"
        down, up = pieces[-1] if -1 in pieces else _fuse(pieces)
        state[f"{name}.lora_down.weight"] = down.contiguous()
        state[f"{name}.lora_up.weight"] = up.contiguous()
        state[f"{name}.alpha"] = torch.tensor(part.settings.common_alpha * len(pieces))
    return state


def comfyui_name(module: str, family: str) -> str:
    """ComfyUI's name of a layer; `#q`, `#k` or `#v` at its end where it is a third of that layer.

    Raises:
        ValueError: the model has no such layer there.
    """
    for pattern, name in NAMES[family]:
        found = re.fullmatch(pattern, module)
        if found:
            return found.expand(name)
    raise ValueError(
        f"lora must adapt layers that ComfyUI's model has, got {module!r} of family {family}; "
        "train with the family's own targets, or use --format merged"
    )


def _fuse(pieces: Mapping[int, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Down [n r, in] and up [3 out, n r] of the n pieces there are."""
    order = sorted(pieces)
    out, rank = pieces[order[0]][1].shape
    up = torch.zeros(FUSED * out, rank * len(order))
    for column, index in enumerate(order):
        up[index * out : (index + 1) * out, column * rank : (column + 1) * rank] = pieces[index][1]
    return torch.cat([pieces[index][0] for index in order]), up
