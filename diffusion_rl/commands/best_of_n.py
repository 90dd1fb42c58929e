"""`best-of-n`: draw several videos of each prompt and keep the best by the rewards."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from diffusion_rl.best_of_n import BestOfNSettings, best_of_n, write_summary
from diffusion_rl.commands.base import Subparsers, with_local_path
from diffusion_rl.configuration import RunSettings, load_config, to_tree
from diffusion_rl.evaluation_parts import fingerprint
from diffusion_rl.launch import build_generator
from diffusion_rl.prompts import read_prompts
from diffusion_rl.rewards import build_reward
from diffusion_rl.rollout import sample_videos


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
    best.add_argument("--output", default="best_of_n", help="folder of videos and scores")
    best.add_argument("--seed", type=int, default=0, help="of the first video")
    best.add_argument("--format", choices=["mp4", "webp"], default="mp4")
    best.set_defaults(command=best_of_n_command)


def identity_of(options: argparse.Namespace, settings: RunSettings) -> dict[str, Any]:
    """What the scores depend on, by the names of a config: others are not taken for them."""
    tree = to_tree(settings)
    tree["generator"].pop("device")
    weights = options.lora or options.transformer
    return {
        "n": options.n,
        "seed": options.seed,
        "weights": fingerprint(weights) if weights else "those of the base",
        **dict(_leaves({name: tree[name] for name in ("generator", "rollout", "rewards")})),
    }


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Path and value of everything in a tree that is neither a mapping nor a list."""
    if not isinstance(tree, dict | list):
        yield path, tree
        return
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in pairs:
        yield from _leaves(value, f"{path}.{key}" if path else str(key))


def best_of_n_command(options: argparse.Namespace) -> int:
    """`best-of-n`: videos, scores.jsonl and best_of_n.json; goes on where it was stopped."""
    settings = with_local_path(load_config(options.config, options.overrides), options.local_path)
    prompts = read_prompts(options.prompts, settings.prompt_column)
    rewards = [build_reward(reward) for reward in settings.rewards]
    generator = build_generator(
        settings.generator, lora=options.lora, transformer=options.transformer
    )
    rollout = settings.rollout

    def sample(texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return sample_videos(
            generator,
            texts,
            seeds,
            num_inference_steps=rollout.num_inference_steps,
            guidance_scale=rollout.guidance_scale,
            micro_batch=rollout.micro_batch,
        )

    wanted = BestOfNSettings(
        n=options.n,
        seed=options.seed,
        missing_limit=settings.missing_limit,
        fps=generator.fps,
        output=options.output,
        format=options.format,
    )
    try:
        found = best_of_n(sample, rewards, prompts, wanted, identity_of(options, settings))
        records = list(tqdm(found, total=len(prompts), desc="best-of-n"))
    finally:
        for reward in rewards:
            reward.close()
    path = write_summary(options.output, records)
    print(f"videos: {Path(options.output)}   scores: {path}")
    return 0
