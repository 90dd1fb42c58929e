"""`evaluate`: base and tuned measured alike, a table, summary.json and report.html."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from diffusion_rl.before_after import (
    build_samplers,
    compare_sides,
    with_anomaly_rates,
    write_results,
)
from diffusion_rl.commands.base import Subparsers, measures_named, with_local_path
from diffusion_rl.configuration import load_config, read_prompts
from diffusion_rl.evaluation import (
    Measured,
    audit_judge,
    gather,
    measure_generator,
    statistic_measures,
)
from diffusion_rl.guards import STATISTICS
from diffusion_rl.launch import CONFIG_FILE, build_generator
from diffusion_rl.rewards import build_reward

AUDITED = 32
"""Clips of which `evaluate` shows the judge frozen and blurred copies."""
STILL = tuple(name for name in STATISTICS if name != "diversity")


def add_parser(commands: Subparsers, shared: argparse.ArgumentParser) -> None:
    """Describe the command's options."""
    evaluation = commands.add_parser(
        "evaluate", parents=[shared], help="compare what a run made with its base, same noise"
    )
    evaluation.add_argument("overrides", nargs="*", metavar="key=value")
    evaluation.add_argument(
        "--base",
        help="a YAML like those in configs/rl; default: the config.yaml beside what is given",
    )
    tuned = evaluation.add_mutually_exclusive_group(required=True)
    tuned.add_argument("--lora", help="folder of the LoRA")
    tuned.add_argument("--transformer", help="folder of a full fine-tuning, a run's `tuned`")
    evaluation.add_argument("--prompts", required=True, help="a text file of held-out prompts")
    evaluation.add_argument("--videos-per-prompt", type=int, default=4, help="at least 1")
    evaluation.add_argument("--seed", type=int, default=0, help="of the first video")
    evaluation.add_argument(
        "--measure",
        action="append",
        default=[],
        metavar="NAME=MODULE:CALLABLE",
        help="another reward callable to measure with, e.g. a judge that took no part in training",
    )
    evaluation.add_argument(
        "--clean",
        action="append",
        metavar="NAME",
        help="a measure that is P(clean), counted as broken below 0.5; default: the first reward",
    )
    evaluation.add_argument("--output", default="evaluation", help="folder of the report")
    evaluation.set_defaults(command=evaluate_command)


def evaluate_command(options: argparse.Namespace) -> int:
    """`evaluate`: base and tuned measured alike, a table, summary.json and report.html."""
    if options.videos_per_prompt < 1:
        raise ValueError(f"--videos-per-prompt must be at least 1, got {options.videos_per_prompt}")
    config = options.base or Path(options.lora or options.transformer).parent / CONFIG_FILE
    settings = with_local_path(load_config(config, options.overrides), options.local_path)
    prompts = [
        text for text in read_prompts(options.prompts) for _ in range(options.videos_per_prompt)
    ]
    seeds = range(options.seed, options.seed + len(prompts))
    rewards = [
        build_reward(reward) for reward in (*settings.rewards, *measures_named(options.measure))
    ]
    measures = {reward.name: reward.function for reward in rewards}
    clean = options.clean or [rewards[0].name]
    generator = build_generator(
        settings.generator, lora=options.lora, transformer=options.transformer
    )
    samplers = build_samplers(generator, prompts, settings.rollout)
    watched = statistic_measures(*(STATISTICS if options.videos_per_prompt > 1 else STILL))
    sides = {}
    for side, sample in samplers.items():
        with tqdm(total=len(prompts), desc=side) as bar:
            batches = measure_generator(
                sample, measures | watched, prompts, seeds, fps=generator.fps
            )
            sides[side] = with_anomaly_rates(gather(_counted(batches, bar)), clean)
    comparisons, summary = compare_sides(sides, clean)
    some = slice(0, AUDITED)
    audits = {
        name: audit_judge(
            measures[name], sides["base"].videos[some] / 255, prompts[some], fps=generator.fps
        )
        for name in clean
    }
    page = write_results(options.output, sides, comparisons, summary, audits, fps=generator.fps)
    for name, found in comparisons.items():
        low, high = found.difference.low, found.difference.high
        print(f"{name:28} {found.base:8.4f} -> {found.tuned:8.4f}   ({low:+.4f} to {high:+.4f})")
    print(f"report: {page}")
    return 0


def _counted(batches: Iterable[Measured], bar: tqdm) -> Iterator[Measured]:
    for batch in batches:
        yield batch
        bar.update(len(batch.prompts))
