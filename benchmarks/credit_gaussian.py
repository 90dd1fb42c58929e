"""What knowing a fault's place is worth where the place is known exactly.

    python -m benchmarks.credit_gaussian --seeds 0 1 2 3 4

The generator draws independent Gaussian pixels (tests/toy_gaussian.py), a red value below DARK is a
fault, one pixel is one latent position, and the judge's blame is the faulty pixels. Prints the
videos that each credit needs to halve the share of faulty videos, and their ratio to uniform's.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from torch import Tensor

from benchmarks.credit import compare
from diffusion_rl.credit import CreditSettings
from diffusion_rl.finetune import FinetuneSettings, begin, finetune
from diffusion_rl.lora import attach_lora
from diffusion_rl.optimizers import OptimizerSettings
from diffusion_rl.rewards import Reward, RewardFunction
from diffusion_rl.rollout import RolloutSettings
from diffusion_rl.row_settings import GrpoSettings
from diffusion_rl.sampling import sample_videos
from tests.toy_gaussian import LORA, ToyGenerator

DARK = 0.29
STEPS = 4
PROMPT = "plain"
HELD_OUT = 256


def judge(videos: Tensor, prompts: Sequence[str], *, fps: float) -> dict[str, Tensor]:
    """1 for a video without a fault; blame is its faulty pixels."""
    dark = videos[:, :, 0] < DARK
    return {"score": 1.0 - dark.flatten(1).any(dim=1).float(), "blame": dark.float()}


def judge_of_times(videos: Tensor, prompts: Sequence[str], *, fps: float) -> dict[str, Tensor]:
    """The same, but blame is the whole of each faulty frame."""
    answer = judge(videos, prompts, fps=fps)
    frames = answer["blame"].amax((2, 3), keepdim=True)
    return {**answer, "blame": frames.expand_as(answer["blame"])}


ARMS: dict[str, tuple[CreditSettings, RewardFunction]] = {
    "uniform": (CreditSettings(), judge),
    "grounded": (CreditSettings(name="grounded"), judge),
    "grounded, mix 0.5": (CreditSettings(name="grounded", mix=0.5), judge),
    "grounded, clip position": (CreditSettings(name="grounded", clip="position"), judge),
    "grounded, times only": (CreditSettings(name="grounded"), judge_of_times),
    "grounded, balanced": (CreditSettings(name="grounded", balanced=True), judge),
    "random": (CreditSettings(name="random"), judge),
    "random, balanced": (CreditSettings(name="random", balanced=True), judge),
}


def faulty_share(generator: ToyGenerator) -> float:
    """Of videos whose noise training never sees."""
    prompts = [PROMPT] * HELD_OUT
    videos = sample_videos(generator, prompts, range(HELD_OUT), num_inference_steps=STEPS)
    return 1 - judge(videos, prompts, fps=generator.fps)["score"].mean().item()


def videos_to_halve(
    credit: CreditSettings, reward: RewardFunction, seed: int, updates: int
) -> float:
    """Training videos until half of the faults are gone; infinity if `updates` do not do it."""
    settings = FinetuneSettings(
        algorithm=GrpoSettings(clip_range=0.02),
        credit=credit,
        rollout=RolloutSettings(
            num_inference_steps=STEPS, stochastic_steps=2, prompts_per_update=2, videos_per_prompt=8
        ),
        optimizer=OptimizerSettings(learning_rate=1e-2),
        updates=updates,
        seed=seed,
    )
    generator = ToyGenerator()
    attach_lora(generator.transformer, LORA, seed=seed)
    before = faulty_share(generator)
    state = begin(generator, settings)
    for report in finetune(generator, [Reward("dark", reward)], [PROMPT], settings, state):
        if faulty_share(generator) <= before / 2:
            return 16.0 * report.step
    return math.inf


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every arm and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--updates", type=int, default=48)
    options = parser.parse_args(arguments)
    needed: dict[str, dict[int, float]] = {}
    print("| credit | videos to halve, by seed | against uniform |\n|---|---|---|")
    for arm, (credit, reward) in ARMS.items():
        needed[arm] = {
            seed: videos_to_halve(credit, reward, seed, options.updates) for seed in options.seeds
        }
        ratio = compare(needed, arm)
        said = ""
        if ratio is not None:
            interval = f"({ratio['low']:.2f} to {ratio['high']:.2f})"
            said = f"{ratio['ratio']:.2f} {interval}, {ratio['seeds']:.0f} seeds"
        counts = (f"{n:.0f}" if math.isfinite(n) else "never" for n in needed[arm].values())
        print(f"| {arm} | {', '.join(counts)} | {said} |", flush=True)


if __name__ == "__main__":
    main()
