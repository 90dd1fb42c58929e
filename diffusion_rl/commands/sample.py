"""`sample`: one video for each prompt, by the base generator or by what a run made of it."""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from diffusion_rl.commands.base import Subparsers, add_noise_level, with_local_path
from diffusion_rl.configuration import load_config
from diffusion_rl.launch import build_generator
from diffusion_rl.prompts import read_prompts
from diffusion_rl.sampling import check_noise_level, sample_videos
from diffusion_rl.tracking import write_video


def add_parser(commands: Subparsers, shared: argparse.ArgumentParser) -> None:
    """Describe the command's options."""
    sampling = commands.add_parser("sample", parents=[shared], help="write videos of prompts")
    sampling.add_argument("config", help="a YAML like those in configs/rl, or a run's config.yaml")
    sampling.add_argument("overrides", nargs="*", metavar="key=value")
    sampling.add_argument(
        "--prompts", required=True, help="a text file with one prompt a line, .jsonl, .parquet"
    )
    sampling.add_argument("--lora", help="folder of a LoRA; without it the base generator")
    sampling.add_argument("--transformer", help="folder of a full fine-tuning, instead of a LoRA")
    add_noise_level(sampling)
    sampling.add_argument("--output", default="samples", help="folder of the videos")
    sampling.add_argument("--seed", type=int, default=0, help="of the first video")
    sampling.add_argument("--format", choices=["mp4", "webp"], default="mp4")
    sampling.add_argument("--scale", type=int, default=1, help="enlarge pixel for pixel")
    sampling.set_defaults(command=sample_command)


def sample_command(options: argparse.Namespace) -> int:
    """`sample`: one video for each prompt, by the base generator or by what a run made of it."""
    settings = with_local_path(load_config(options.config, options.overrides), options.local_path)
    check_noise_level(options.noise_level, settings.rollout)
    prompts = read_prompts(options.prompts, settings.prompt_column)
    generator = build_generator(
        settings.generator, lora=options.lora, transformer=options.transformer
    )
    for index, prompt in enumerate(tqdm(prompts, desc="sample")):
        video = sample_videos(
            generator,
            [prompt],
            [options.seed + index],
            num_inference_steps=settings.rollout.num_inference_steps,
            guidance_scale=settings.rollout.guidance_scale,
            noise_level=options.noise_level,
        )[0]
        path = Path(options.output) / f"{index:04d}.{options.format}"
        write_video(path, video, generator.fps, scale=options.scale)
    print(f"videos: {options.output}")
    return 0
