"""How well two updates of a row agree on where to go: what a row's pace is made of.

    python -m benchmarks.gradient_agreement --rows grpo awm nft --updates 10 --implied

At the untrained generator every row draws, judges and computes the gradient of several updates, of
other prompts and noise each, and takes no step. Two gradients of pure noise have cosine 0; if an
update's gradient is a common part and noise, the mean cosine c of pairs says what share of its
square is common, and averaging n updates would raise that share to n c / (1 + (n - 1) c). Updates
of two rows agree by sqrt(c d) if what is common to either is the same direction.

With --implied rows that replay recorded steps are measured a second time, with the outcome of every
step replaced by the one that its finished video stands for (`rollout.outcome`). Another table says
of each step how much of the noise that it drew the finished video tells of, as the square of a
correlation, and what an implied outcome must be multiplied by to fit the drawn one best.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from benchmarks.algorithms import ROWS, run_settings
from diffusion_rl.collect import Batch, collect, update_source
from diffusion_rl.configuration import build, to_tree
from diffusion_rl.credit import Credit
from diffusion_rl.finetune import compare, judge, measure_base, place
from diffusion_rl.guards import GuardReport
from diffusion_rl.launch import Run, prepare
from diffusion_rl.outcomes import implied_outcomes, with_outcomes
from diffusion_rl.policies import trained_parameters
from diffusion_rl.reward_contract import JudgedBatch
from diffusion_rl.rewards import ask_rewards
from diffusion_rl.rollout import Trajectory
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


class Trace(NamedTuple):
    """What a finished video tells of the noise that a step drew."""

    squares: float
    """Sum of the drawn noise's."""
    implied_squares: float
    """Sum of what is implied of it."""
    products: float
    """Sum of one times the other."""


def trace_of(trajectory: Trajectory, implied: Tensor) -> Mapping[int, Trace]:
    """The traces of recorded steps, by their places; those of several updates may be added up."""
    drawn = (trajectory.next_latents - trajectory.means).double()
    implied = (implied - trajectory.means).double()
    sums = (
        (one * other).flatten(1).sum(1).tolist()
        for one, other in ((drawn, drawn), (implied, implied), (drawn, implied))
    )
    return dict(zip(trajectory.steps[:, 0].tolist(), map(Trace, *sums), strict=True))


def with_implied(run: Run, update: JudgedUpdate) -> JudgedUpdate:
    """The update with implied outcomes in place of those that were drawn."""
    trajectory, rollout = update.batch.trajectory, run.settings.rollout
    implied = implied_outcomes(trajectory, rollout)
    trajectory = with_outcomes(run.generator, trajectory, implied, rollout)
    return replace(update, batch=update.batch._replace(trajectory=trajectory))


def own_credit(run: Run, update: JudgedUpdate) -> Credit:
    """As the run itself would lay the advantages."""
    said = (run.rewards, update.judged, update.guarded, update.batch)
    return place(update.advantages, run.generator, *said, run.settings.finetune_settings())


def agreement(
    gradients: Sequence[Tensor], others: Sequence[Tensor] | None = None
) -> tuple[float, float, float]:
    """Mean cosine of gradients of different updates, and a 95% bootstrap interval over updates.

    Args:
        gradients: one for each update.
        others: of another row, for the same updates; None compares the gradients with each other.

    Example:
        >>> one, other = torch.tensor([1.0, 1.0]), torch.tensor([1.0, -1.0])
        >>> agreement([one, one, other])[0]
        0.3333333...
    """
    unit, against = (
        torch.stack([one / one.norm() for one in them]).double()
        for them in (gradients, gradients if others is None else others)
    )
    cosines = (unit @ against.T).numpy()
    pairs = [*itertools.permutations(range(len(gradients)), 2)]
    mean = float(np.mean([cosines[pair] for pair in pairs]))
    random = np.random.default_rng(0)
    drawn = []
    for _ in range(DRAWS):
        chosen = random.integers(len(gradients), size=len(gradients))
        # An update drawn twice is no pair: its cosine with itself would be 1.
        other = [cosines[chosen[a], chosen[b]] for a, b in pairs if chosen[a] != chosen[b]]
        drawn.append(np.mean(other) if other else mean)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return mean, float(low), float(high)


def write_tables(gradients: Mapping[str, Sequence[Tensor]]) -> str:
    """How rows agree with themselves, and with each other."""
    own = {row: agreement(found) for row, found in gradients.items()}
    lines = ["| row | updates | cosine of pairs | 95% interval |", "|---|---|---|---|"]
    for row, (mean, low, high) in own.items():
        lines.append(f"| {row} | {len(gradients[row])} | {mean:.3f} | {low:.3f} to {high:.3f} |")
    if len(own) > 1:
        lines += ["", "| rows | cosine | 95% interval | if their direction is the same |"]
        lines += ["|---|---|---|---|"]
    for one, other in itertools.combinations(own, 2):
        mean, low, high = agreement(gradients[one], gradients[other])
        same = math.sqrt(max(own[one][0], 0) * max(own[other][0], 0))
        lines.append(f"| {one}; {other} | {mean:.3f} | {low:.3f} to {high:.3f} | {same:.3f} |")
    return "\n".join(lines)


def write_traces(row: str, traces: Mapping[int, Sequence[Trace]]) -> str:
    """What finished videos tell of each step's noise."""
    lines = [f"| {row}: step | updates | of its noise in the video | factor |", "|---|---|---|---|"]
    for at in sorted(traces):
        squares, implied, products = np.sum(traces[at], axis=0)
        told, factor = products**2 / (squares * implied), products / implied
        lines.append(f"| {at} | {len(traces[at])} | {told:.4f} | {factor:.2f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--updates", type=int, default=6, help="gradients of each row, at least 3")
    parser.add_argument("--implied", action="store_true", help="outcomes too, where replayed")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="of every row's config"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/gradient_agreement"))
    options = parser.parse_args(arguments)
    if options.updates < 3:
        parser.error(f"--updates must be at least 3, got {options.updates}")
    changes = OmegaConf.from_dotlist(options.set)
    found: dict[str, list[Tensor]] = {}
    traces: dict[str, dict[int, list[Trace]]] = {}
    for row in options.rows:
        tree = {**to_tree(run_settings(options, row, seed=0)), "evaluation": None}
        tree["output"] = str(options.output / row)
        own = OmegaConf.merge(OmegaConf.create(tree), changes)
        run = prepare(build(OmegaConf.to_container(own)))
        measure_base(run.generator, run.embeddings, run.settings.finetune_settings(), run.state)
        for step in range(1, options.updates + 1):
            update = judge_update(run, step)
            found.setdefault(row, []).append(gradient_of(run, update, own_credit(run, update)))
            if not options.implied or not len(update.batch.trajectory.steps):
                continue
            implied = with_implied(run, update)
            trace = trace_of(update.batch.trajectory, implied.batch.trajectory.next_latents)
            for at, of_step in trace.items():
                traces.setdefault(row, {}).setdefault(at, []).append(of_step)
            own_gradient = gradient_of(run, implied, own_credit(run, implied))
            found.setdefault(f"{row}, implied", []).append(own_gradient)
    print(write_tables(found))
    for row, of_row in traces.items():
        print(f"\n{write_traces(row, of_row)}")


if __name__ == "__main__":
    main()
