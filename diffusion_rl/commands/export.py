"""`export`: a LoRA for diffusers, ComfyUI or PEFT, or a pipeline with the LoRA in its weights."""

from __future__ import annotations

import argparse

from diffusion_rl.commands.base import Subparsers
from diffusion_rl.exports.formats import FORMATS, export_lora
from diffusion_rl.generators.pipeline import DTYPES


def add_parser(commands: Subparsers, shared: argparse.ArgumentParser) -> None:
    """Describe the command's options."""
    export = commands.add_parser(
        "export", help="write a LoRA for diffusers, ComfyUI or PEFT, or merged into its pipeline"
    )
    export.add_argument("--lora", required=True, help="folder of the LoRA")
    export.add_argument("--format", required=True, choices=FORMATS)
    export.add_argument("--output", required=True, help="folder to write to")
    export.add_argument(
        "--base",
        help="a YAML like those in configs/rl or a pipeline's folder; default: the config.yaml "
        "beside the LoRA",
    )
    export.add_argument(
        "--dtype", choices=sorted(DTYPES), help="of merged weights; default: that of the YAML"
    )
    export.add_argument("--traceback", action="store_true", help="show where an error came from")
    export.set_defaults(command=export_command, overrides=[])


def export_command(options: argparse.Namespace) -> int:
    """`export`: write the files and say where they are."""
    written = export_lora(
        options.lora, options.output, options.format, base=options.base, dtype=options.dtype
    )
    for path in written:
        print(f"{options.format}: {path}")
    return 0
