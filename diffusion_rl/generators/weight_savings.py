"""What to change where memory runs out over a pipeline's weights: loading, moving, encoding.

Sizes are read from the headers of the weights' files, so that nothing need be loaded for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open

from diffusion_rl.generators.settings import OFFLOADED_PARTS, ExecutionSettings
from diffusion_rl.memory_errors import Saving

WHOLE, HALF = 4, 2
"""Bytes of a number."""


def count_numbers(folder: str | Path, part: str) -> int:
    """Numbers in a part's weights; of transformer and transformer_2, say, together.

    Args:
        folder: of a pipeline in diffusers' format.
        part: one of OFFLOADED_PARTS.

    Returns:
        0 where the folder has no such part, or not as safetensors.
    """
    total = 0
    for path in sorted(Path(folder).glob(f"{part}*/*.safetensors")):
        if "." in path.stem:  # A variant (model.fp16), which is not what is loaded.
            continue
        with safe_open(path, framework="pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
        total += sum(math.prod(shape) for shape in shapes)
    return total


def precision_savings(folder: str | Path, dtype: str, parts: Sequence[str]) -> list[Saving]:
    """What half precision would save, where it is not asked for already.

    Args:
        folder: of a pipeline.
        dtype: as in `generator.dtype`.
        parts: of OFFLOADED_PARTS, that are loaded; the autoencoder stays in float32.
    """
    if dtype != "float32":
        return []
    numbers = sum(count_numbers(folder, part) for part in parts if part != "vae")
    return _worth([Saving("generator.dtype=bfloat16", numbers * (WHOLE - HALF))])


def placing_savings(
    folder: str | Path, dtype: str, execution: ExecutionSettings, parts: Sequence[str]
) -> list[Saving]:
    """What half precision, or waiting in the computer's memory, would save on a GPU.

    Args:
        folder: of a pipeline.
        dtype: as in `generator.dtype`.
        execution: as in `generator.execution`.
        parts: of OFFLOADED_PARTS, that are loaded.
    """
    waiting = execution.offload.parts if execution.offload else ()
    width = WHOLE if dtype == "float32" else HALF
    sizes = {
        part: count_numbers(folder, part) * (WHOLE if part == "vae" else width)
        for part in parts
        if part not in waiting
    }

    def offload(names: Sequence[str]) -> Saving:
        named = ",".join(one for one in OFFLOADED_PARTS if one in (*waiting, *names))
        setting = f"generator.execution.offload.parts=[{named}]"
        if "transformer" in names:  # As the settings ask for.
            setting += " generator.execution.gradient_checkpointing=true, where a LoRA learns,"
        return Saving(setting, sum(sizes[name] for name in names))

    found = precision_savings(folder, dtype, parts)
    idle = [name for name in sizes if name != "transformer"]
    if idle:
        found.append(offload(idle))
    if "transformer" in sizes and not (execution.compile_blocks or execution.context_parallel):
        found.append(offload(list(sizes)))
    return _worth(found)


def _worth(found: Sequence[Saving]) -> list[Saving]:
    """Those that save anything."""
    return [one for one in found if one.bytes > 0]
