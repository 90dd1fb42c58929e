"""`best-of-n`: draw several videos of each prompt and keep the best by the rewards."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from diffusion_rl.best_of_n import (
    SCORES_FILE,
    BestOfNSettings,
    best_of_n,
    read_scores,
    write_summary,
)
from diffusion_rl.commands.base import Subparsers, add_noise_level, with_local_path
from diffusion_rl.configuration import RunSettings, load_config, to_tree
from diffusion_rl.evaluation_parts import fingerprint
from diffusion_rl.generators.base import AbstractVideoGenerator
from diffusion_rl.launch import build_generator
from diffusion_rl.prompts import read_prompts
from diffusion_rl.rewards import build_rewards
from diffusion_rl.run_folder import differences, may_change
from diffusion_rl.sampling import check_noise_level, sample_videos
from diffusion_rl.whole_files import write_whole

ASKED_FILE = "asked.json"
"""Beside the scores: what they depend on."""


def add_parser(commands: Subparsers, shared: argparse.ArgumentParser) -> None:
    """Describe the command's options."""
    best = commands.add_parser(
        "best-of-n", parents=[shared], help="keep the best of n videos of each prompt"
    )
    best.add_argument("config", help="a YAML like those in configs/rl, or a run's config.yaml")
    best.add_argument("overrides", nargs="*", metavar="key=value")
    best.add_argument("--n", type=int, default=8, help="videos of each prompt, at least 1")
    best.add_argument("--prompts", required=True, help="a text file, one prompt a line")
    best.add_argument("--lora", help="folder of a LoRA; without it the base generator")
    best.add_argument("--transformer", help="folder of a full fine-tuning, instead of a LoRA")
    add_noise_level(best)
    best.add_argument("--output", default="best_of_n", help="folder of videos and scores")
    best.add_argument("--seed", type=int, default=0, help="of the first video")
    best.add_argument("--format", choices=["mp4", "webp"], default="mp4")
    best.set_defaults(command=best_of_n_command)


def claim_scores(folder: Path, asked: Mapping[str, Any]) -> None:
    """Note what the scores of a folder are of, or refuse if those there are of something else.

    What may change between the parts of a run (`run_folder.may_change`) may change here.

    Raises:
        ValueError: names every difference and the way out.
    """
    noted, now = folder / ASKED_FILE, json.loads(json.dumps(asked))
    if read_scores(folder / SCORES_FILE):
        earlier = json.loads(noted.read_text(encoding="utf-8")) if noted.is_file() else {}
        found = [
            f"{path}={before}, now {after}"
            for path, before, after in differences(earlier, now)
            if not may_change(path, before, after)
        ]
        if found:
            raise ValueError(
                f"output must be a new folder or hold scores of the same settings, got {folder} "
                f"made with {'; '.join(found)}; choose another output"
            )
    write_whole(noted, json.dumps(now, indent=1))


def asked_of(options: argparse.Namespace, settings: RunSettings) -> dict[str, Any]:
    """What the scores depend on besides prompts and seeds."""
    tree, weights = to_tree(settings), options.lora or options.transformer
    asked = {name: tree[name] for name in ("generator", "rollout", "rewards")}
    noise = {"noise_level": options.noise_level} if options.noise_level else {}
    return {**asked, **noise, "weights": fingerprint(weights) if weights else None}


def best_of_n_command(options: argparse.Namespace) -> int:
    """`best-of-n`: videos, scores.jsonl and best_of_n.json; goes on where it was stopped."""
    settings = with_local_path(load_config(options.config, options.overrides), options.local_path)
    check_noise_level(options.noise_level, settings.rollout)
    prompts = read_prompts(options.prompts, settings.prompt_column)
    with ExitStack() as undo:
        rewards = build_rewards(settings.rewards, undo)
        generator = build_generator(
            settings.generator, lora=options.lora, transformer=options.transformer
        )
        wanted = BestOfNSettings(
            n=options.n,
            seed=options.seed,
            missing_limit=settings.missing_limit,
            fps=generator.fps,
            output=options.output,
            format=options.format,
        )
        claim_scores(Path(options.output), asked_of(options, settings))
        sample = sampler_of(generator, settings, options.noise_level)
        found = best_of_n(sample, rewards, prompts, wanted)
        records = list(tqdm(found, total=len(prompts), desc="best-of-n"))
    path = write_summary(options.output, records)
    print(f"videos: {Path(options.output)}   scores: {path}")
    return 0


def sampler_of(
    generator: AbstractVideoGenerator, settings: RunSettings, noise_level: float
) -> Callable[[Sequence[str], Sequence[int]], Tensor]:
    """(prompts, seeds) -> videos, drawn as the settings say."""
    return partial(
        sample_videos,
        generator,
        num_inference_steps=settings.rollout.num_inference_steps,
        guidance_scale=settings.rollout.guidance_scale,
        micro_batch=settings.rollout.micro_batch,
        noise_level=noise_level,
    )
