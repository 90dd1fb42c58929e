"""How well two updates of a row agree on where to go: what a row's pace is made of.

    python -m benchmarks.gradient_agreement --rows grpo awm nft --updates 6

At the untrained generator every row draws, judges and computes the gradient of several updates, of
other prompts and noise each, and takes no step. Two gradients of pure noise have cosine 0; if an
update's gradient is a common part and noise, the mean cosine c of pairs says what share of its
square is common, and averaging n updates would raise that share to n c / (1 + (n - 1) c).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.algorithms import ROWS, run_settings
from diffusion_rl.collect import Batch, collect, update_source
from diffusion_rl.configuration import build, to_tree
from diffusion_rl.credit import Credit
from diffusion_rl.finetune import compare, judge, measure_base, place
from diffusion_rl.guards import GuardReport
from diffusion_rl.launch import Run, prepare
from diffusion_rl.policies import trained_parameters
from diffusion_rl.reward_contract import JudgedBatch
from diffusion_rl.rewards import ask_rewards
from diffusion_rl.step_losses import StepInputs, optimizer_steps
from diffusion_rl.updates import accumulate

DRAWS = 2_000
"""Of the bootstrap."""


@dataclass(frozen=True)
class JudgedUpdate:
    """One update's videos and what was said of them."""

    step: int
    batch: Batch
    judged: JudgedBatch
    guarded: GuardReport
    advantages: Tensor
    """[N]"""


def judge_update(run: Run, step: int) -> JudgedUpdate:
    """Draw and judge the videos of update `step` with the weights as they are."""
    settings, state, generator = run.settings.finetune_settings(), run.state, run.generator
    batch = collect(generator, run.embeddings, settings, step=step)
    texts = [run.prompts[index] for index in batch.trajectory.prompt_index.tolist()]
    asked = ask_rewards(run.rewards, batch.trajectory.videos, texts, fps=generator.fps)
    judged, guarded = judge(run.rewards, asked, batch, settings, state)
    score = judged.score - guarded.penalty
    advantages = compare(score, run.rewards, judged, guarded, batch, settings, state)
    return JudgedUpdate(step, batch, judged, guarded, advantages)


def gradient_of(run: Run, update: JudgedUpdate, credit: Credit) -> Tensor:
    """The gradient of an update at the weights as they are, flat; no step is taken."""
    settings, generator, batch = run.settings.finetune_settings(), run.generator, update.batch
    known = ~(update.judged.score - update.guarded.penalty).isnan()
    trajectory, credit = batch.trajectory.keep(known), credit[known[batch.trajectory.rows]]
    parameters = trained_parameters(generator.transformer)
    own = (settings.algorithm, settings.rollout)
    source = update_source(settings.seed, update.step, purpose=1)
    for one in optimizer_steps(generator, trajectory, *own, source):
        accumulate(generator, StepInputs(trajectory, credit, *own, one))
    found = [torch.zeros_like(one) if one.grad is None else one.grad.clone() for one in parameters]
    for parameter in parameters:
        parameter.grad = None
    return torch.cat([one.flatten() for one in found])


def own_credit(run: Run, update: JudgedUpdate) -> Credit:
    """As the run itself would lay the advantages."""
    said = (run.rewards, update.judged, update.guarded, update.batch)
    return place(update.advantages, run.generator, *said, run.settings.finetune_settings())


def agreement(gradients: Sequence[Tensor]) -> tuple[float, float, float]:
    """Mean cosine of pairs, and a 95% bootstrap interval over the gradients.

    Example:
        >>> one, other = torch.tensor([1.0, 1.0]), torch.tensor([1.0, -1.0])
        >>> agreement([one, one, other])[0]
        0.3333333...
    """
    unit = torch.stack([one / one.norm() for one in gradients]).double()
    cosines = (unit @ unit.T).numpy()
    pairs = [*itertools.combinations(range(len(gradients)), 2)]
    mean = float(np.mean([cosines[pair] for pair in pairs]))
    random = np.random.default_rng(0)
    drawn = []
    for _ in range(DRAWS):
        chosen = random.integers(len(gradients), size=len(gradients))
        # A gradient drawn twice is no pair: its cosine with itself would be 1.
        other = [cosines[chosen[a], chosen[b]] for a, b in pairs if chosen[a] != chosen[b]]
        drawn.append(np.mean(other) if other else mean)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return mean, float(low), float(high)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--updates", type=int, default=6, help="gradients of each row, at least 3")
    parser.add_argument("--output", type=Path, default=Path("runs/gradient_agreement"))
    options = parser.parse_args(arguments)
    if options.updates < 3:
        parser.error(f"--updates must be at least 3, got {options.updates}")
    print("| row | updates | cosine of pairs | 95% interval |\n|---|---|---|---|")
    for row in options.rows:
        tree = {**to_tree(run_settings(options, row, seed=0)), "evaluation": None}
        run = prepare(build({**tree, "output": str(options.output / row)}))
        settings = run.settings.finetune_settings()
        measure_base(run.generator, run.embeddings, settings, run.state)
        updates = (judge_update(run, step) for step in range(1, options.updates + 1))
        gradients = [gradient_of(run, one, own_credit(run, one)) for one in updates]
        mean, low, high = agreement(gradients)
        print(f"| {row} | {len(gradients)} | {mean:.3f} | {low:.3f} to {high:.3f} |", flush=True)


if __name__ == "__main__":
    main()
