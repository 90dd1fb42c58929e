"""Whether videos break less if they are drawn with the noise that rows of recorded steps learn by.

    python -m benchmarks.samplers --loras runs/algorithms/grpo_0/lora runs/algorithms/awm_0/lora

The base of the toy world and every LoRA draw the same held-out prompts and starting noise by the
plain sampler and with coefficients-preserving steps: three of them, as toy_grpo.yaml explores, and
all but the last. Prints what the oracle says of each, and how many more break than of the plain
sampler's videos, with a 95% interval over prompts and seeds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.algorithms import PROMPTS, RECORDED
from diffusion_rl.configuration import load_config
from diffusion_rl.generators.base import AbstractVideoGenerator
from diffusion_rl.guards import motion, sharpness
from diffusion_rl.launch import build_generator
from diffusion_rl.prompts import read_prompts
from diffusion_rl.rollout import rollout
from diffusion_rl.transitions import cps
from examples.toy_world import oracle

LEARNT_BY = 3
"""Steps with noise of an update of toy_grpo.yaml."""
HEADER = (
    "| weights | steps with noise | noise level | broken | more than plain | prompts followed "
    "| motion | sharpness |\n|---|---|---|---|---|---|---|---|"
)
"""Of the table."""


def places_of(steps: int, of: int) -> list[int]:
    """So many places spread evenly over the first `of` steps.

    Example:
        >>> places_of(3, 7)
        [0, 3, 6]
    """
    return sorted({round(place) for place in np.linspace(0, of - 1, steps)})


def measure(
    generator: AbstractVideoGenerator, prompts: Sequence[str], steps: int, noise_level: float
) -> np.ndarray:
    """What the oracle says of each video, [N 4]: broken, prompt followed, motion, sharpness."""
    settings = replace(load_config(RECORDED).rollout, noise_level=noise_level)
    distinct = list(dict.fromkeys(prompts))
    index = torch.tensor([distinct.index(prompt) for prompt in prompts])
    videos = rollout(
        *(generator, generator.encode_prompts(distinct), index, range(len(prompts)), settings),
        transition=cps,
        stochastic=places_of(steps, settings.num_eligible),
        keep=False,
    ).videos
    reports = oracle.judge_videos(videos, prompts, generator.fps)
    said = [[report.broken, bool(report.prompt_followed)] for report in reports]
    moved, sharp = motion(videos).double().numpy(), sharpness(videos).double().numpy()
    return np.column_stack([np.array(said, dtype=float), moved, sharp])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each way to draw, for the base and every LoRA."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--loras", nargs="+", type=Path, default=[], metavar="FOLDER")
    parser.add_argument("--videos-per-prompt", type=int, default=8)
    parser.add_argument("--noise-levels", nargs="+", type=float, default=[0.3, 0.7])
    options = parser.parse_args(arguments)
    if options.videos_per_prompt < 1:
        parser.error(f"--videos-per-prompt must be at least 1, got {options.videos_per_prompt}")
    for folder in options.loras:
        if not folder.is_dir():
            parser.error(f"--loras must be folders of LoRAs, got {folder}")
    prompts = [one for one in read_prompts(PROMPTS) for _ in range(options.videos_per_prompt)]
    settings = load_config(RECORDED)
    all_steps = settings.rollout.num_eligible
    ways = [(n, level) for n in (LEARNT_BY, all_steps) for level in options.noise_levels]
    print(HEADER, flush=True)
    base: np.ndarray | None = None
    for folder in [None, *options.loras]:
        generator = build_generator(settings.generator, lora=folder)
        plain = measure(generator, prompts, 0, options.noise_levels[0])
        base = plain if base is None else base
        for steps, level in [(0, math.nan), *ways]:
            own = measure(generator, prompts, steps, level) if steps else plain
            more = own[:, 0] - plain[:, 0]
            half = 1.96 * more.std(ddof=1) / math.sqrt(len(more)) if len(more) > 1 else math.nan
            cells = [
                *(str(folder or "base"), str(steps or "none"), f"{level:g}" if steps else ""),
                f"{100 * own[:, 0].mean():.1f}%",
                f"{100 * more.mean():+.1f} +- {100 * half:.1f}" if steps else "",
                f"{100 * own[:, 1].mean():.1f}%",
                *(f"{100 * own[:, at].mean() / base[:, at].mean():.0f}%" for at in (2, 3)),
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
