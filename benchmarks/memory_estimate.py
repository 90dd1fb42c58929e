"""What fine-tuning needs on the device, by part: counted on shapes, no GPU and no weights needed.

    python -m benchmarks.memory_estimate --checkpointing --tiling
    python -m benchmarks.memory_estimate --frames 81 --height 480 --width 832 --rank 64

Prints the parts and the three peaks in gigabytes (10^9 bytes); docs/performance.md says what is not
counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.generators import SHAPES, build_generator, random_embeddings
from diffusion_rl.generators.settings import ExecutionSettings
from diffusion_rl.generators.wan import WanGenerator
from diffusion_rl.lora import LoraSettings, attach_lora
from diffusion_rl.memory import MemoryEstimate, estimate_memory
from diffusion_rl.rollout import RolloutSettings


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=SHAPES, default="wan2.1-1.3b")
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--height", type=int, default=240)
    parser.add_argument("--width", type=int, default=416)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--rank", type=int, default=64, help="of the LoRA")
    parser.add_argument("--prompts", type=int, default=1, help="groups in an update")
    parser.add_argument("--group", type=int, default=8, help="videos of a prompt")
    parser.add_argument("--micro-batch", type=int, default=1, help="videos in one pass")
    parser.add_argument("--guidance", type=float, default=4.5)
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again")
    parser.add_argument("--tiling", action="store_true", help="decode in tiles")
    return parser


def rollout_settings(given: argparse.Namespace) -> RolloutSettings:
    """What is drawn and learnt."""
    return RolloutSettings(
        prompts_per_update=given.prompts,
        videos_per_prompt=given.group,
        micro_batch=given.micro_batch,
        guidance_scale=given.guidance,
        num_inference_steps=20,
    )


def build_learner(
    given: argparse.Namespace, device: str, execution: ExecutionSettings
) -> WanGenerator:
    """The generator of the options, with random weights and a LoRA that learns."""
    generator = build_generator(
        given.model,
        height=given.height,
        width=given.width,
        num_frames=given.frames,
        dtype=given.dtype,
        device=device,
        execution=execution,
    )
    attach_lora(generator.transformer, LoraSettings(rank=given.rank, alpha=given.rank))
    return generator


def estimate(given: argparse.Namespace) -> MemoryEstimate:
    """Count what the options need."""
    execution = ExecutionSettings(
        gradient_checkpointing=given.checkpointing, vae_tiling=given.tiling
    )
    generator = build_learner(given, "meta", execution)
    embeddings = random_embeddings(given.model, generator)
    width = 4 if given.dtype == "float32" else 2
    return estimate_memory(
        generator,
        embeddings,
        rollout_settings(given),
        text_encoder=width * SHAPES[given.model].text_encoder_parameters,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    found = estimate(build_parser().parse_args(arguments))
    for name, gigabytes in found.rows().items():
        print(f"{name:15} {gigabytes:9.4f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
