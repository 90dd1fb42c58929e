"""Why grounded credit helps or does not: where the blame lies, and what it makes of a gradient.

    python -m benchmarks.credit_gradients --updates 20 --steps 0.01 0.04

At the untrained generator, draws and judges the videos of some updates once and computes their
gradients with every credit. Beside `uniform`, `grounded` and `random`, the last two also balanced,
`true places` is grounded with the oracle's own windows and boxes in place of the judge's: what a
perfect judge of places would give. Four measurements:

- places: how much of the judge's focus lies where the oracle's does, 1 - total variation of both
  sets of weights, against the same of the focus moved at random; and how much of what the row
  learns from lies at the oracle's faults whatever the credit;
- agreement: the mean cosine of two updates' gradients (see `benchmarks.gradient_agreement`);
- direction: the mean cosine of an update's gradient with that of other updates whose advantages
  are of the oracle's verdicts alone, uniform. The latter are noisy and the same for all credits, so
  that cosines are small and their ratios are what counts: videos needed to know the direction
  equally well go with one over the ratio's square;
- effect: the share of held-out videos that break, by the oracle, once the weights are moved against
  the mean gradient of all updates until the policy's divergence from the untrained one is that of
  --steps: how much each direction mends at the same price. The held-out videos are the same for
  all, so that differences are paired.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import credit as runs
from benchmarks.gradient_agreement import JudgedUpdate, gradient_of, judge_update
from cac_reward.frames import blame_map
from cac_reward.report import Box, Finding, TimeWindow
from diffusion_rl.algorithms import algorithm
from diffusion_rl.blame import LatentGrid, blame_weights, move_at_random, pool_blame
from diffusion_rl.configuration import build, to_tree
from diffusion_rl.credit import Credit, CreditSettings
from diffusion_rl.divergences import velocity_kl
from diffusion_rl.finetune import measure_base, place
from diffusion_rl.launch import Run, prepare
from diffusion_rl.noising import noise_videos
from diffusion_rl.policies import trained_parameters
from diffusion_rl.rollout import predict_in_chunks, rollout
from diffusion_rl.shares import chunks
from examples.toy_world import oracle
from examples.toy_world.annotated_clips import snap

TRUE = "true places"
BALANCED = ", balanced"
REFERENCE = "reference"
UNTRAINED = "untrained"
JUDGE = "cac"
"""The reward that has blame."""
DRAWS = 2_000
"""Of the bootstrap."""
PER_PROMPT = 2
"""Held-out videos of each training prompt."""
HELD_OUT_SEED = 1 << 30
"""Of the first; training draws none there."""
LEVELS = 6
"""Noise levels at which each video's error is measured."""
ROUNDS = 4
"""Of scaling a step to its divergence, which is nearly a square of its length."""


def true_blame(run: Run, update: JudgedUpdate) -> Tensor:
    """[B F H W] positive where the oracle sees a fault, and 0 elsewhere."""
    videos = update.batch.trajectory.videos
    texts = [run.prompts[index] for index in update.batch.trajectory.prompt_index.tolist()]
    size = (videos.shape[1], *videos.shape[3:])
    fps = run.generator.fps
    maps = []
    for report in oracle.judge_videos(videos, texts, fps):
        findings = [
            Finding(
                one.type,
                TimeWindow(*one.window),
                tuple(Box(time, *snap(box, videos.shape[-1])) for time, box in one.boxes),
            )
            for one in report.findings
        ]
        maps.append(blame_map(findings, *size, fps, 1.0))
    return torch.stack(maps)


def credits_of(run: Run, update: JudgedUpdate, truth: Tensor, mix: float) -> dict[str, Credit]:
    """The same videos and advantages with every credit, and the oracle's own advantages."""
    settings = run.settings.finetune_settings()

    def laid(judged: JudgedUpdate, name: str, balanced: bool = False) -> Credit:
        share = None if name == "uniform" else mix
        focus = CreditSettings(name=name, mix=share, balanced=balanced)
        said = (run.rewards, judged.judged, judged.guarded, judged.batch)
        return place(judged.advantages, run.generator, *said, replace(settings, credit=focus))

    own = {name: laid(update, name) for name in ("uniform", "grounded", "random")}
    judgements = dict(update.judged.judgements)
    judgements[JUDGE] = replace(judgements[JUDGE], blame=truth)
    known = replace(update, judged=replace(update.judged, judgements=judgements))
    row, options = algorithm(settings.algorithm.name), settings.algorithm.advantage_options
    score = judgements[runs.ORACLE["name"]].score
    advantages = row.advantages(score, update.batch.group, **options)
    own |= {name + BALANCED: laid(update, name, balanced=True) for name in ("grounded", "random")}
    true = {TRUE: laid(known, "grounded"), TRUE + BALANCED: laid(known, "grounded", balanced=True)}
    return {**own, **true, REFERENCE: Credit(advantages)}


def shared_focus(run: Run, update: JudgedUpdate, truth: Tensor) -> list[tuple[float, float, float]]:
    """Of each video with blame by both: overlap, overlap when moved, and area of the truth."""
    blame = update.judged.judgements[JUDGE].blame
    if blame is None:
        return []
    grid = LatentGrid(run.generator.frame_groups, *run.generator.latent_shape[2:])
    judge, true = (blame_weights(pool_blame(one, grid), grid) for one in (blame, truth))
    moved = move_at_random(judge, grid, update.batch.seeds)
    found = []
    for own, other, random in zip(judge, true, moved, strict=True):
        # All ones where nothing is blamed.
        if (own != 1).any() and (other != 1).any():
            shares = [torch.minimum(one, other).mean().item() for one in (own, random)]
            found.append((*shares, (other > 0).double().mean().item()))
    return found


def direction(gradients: Tensor, reference: Tensor) -> Tensor:
    """[U U] cosines of every update's gradient [U P] with every reference [U P].

    NaN where one is zero, as in an update in which all videos of a prompt are alike.
    """
    unit = [one / one.norm(dim=1, keepdim=True) for one in (gradients, reference)]
    return (unit[0] @ unit[1].T).double()


def room(run: Run, update: JudgedUpdate, truth: Tensor) -> list[tuple[float, float, float]]:
    """Of each broken video: how much of the latent is at fault, how much of the squared error that
    noised videos teach by lies there, and the share of the latent that all of it is worth."""
    generator, trajectory = run.generator, update.batch.trajectory
    grid = LatentGrid(generator.frame_groups, *generator.latent_shape[2:])
    weights = blame_weights(pool_blame(truth, grid), grid)
    source, errors = torch.Generator().manual_seed(0), torch.zeros(())
    parts = chunks(len(weights), run.settings.rollout.micro_batch)
    for _ in range(LEVELS):
        noised = noise_videos(generator, trajectory, source)
        with torch.no_grad():
            own = predict_in_chunks(generator, *noised, trajectory.embeddings, 1.0, parts)
        target = noised.latent - trajectory.final_latent
        errors = errors + ((own - target / noised.sigma.view(-1, 1, 1, 1, 1)) ** 2).mean(dim=1)
    found = []
    for error, weight in zip(errors.double(), weights, strict=True):
        if (weight != 1).any():
            faulty, share = weight > 0, error / error.sum()
            even = 1 / (share.square().sum() * share.numel())
            found.append((faulty.double().mean().item(), share[faulty].sum().item(), even.item()))
    return found


def velocities(run: Run, update: JudgedUpdate) -> Tensor:
    """[B C T H W] of a micro batch of the update's videos, noised alike at every call."""
    generator, trajectory = run.generator, update.batch.trajectory
    noised = noise_videos(generator, trajectory, torch.Generator().manual_seed(0))
    rows = torch.arange(min(len(trajectory.final_latent), run.settings.rollout.micro_batch))
    with torch.no_grad():
        return generator.predict(
            noised.latent[rows], noised.sigma[rows], trajectory.embeddings[rows], 1.0
        )


def step_against(run: Run, gradient: Tensor, divergence: float, update: JudgedUpdate) -> None:
    """Move the untrained adapter against a gradient [P] until it differs by a mean square."""
    parameters = trained_parameters(run.generator.transformer)
    start = [one.detach().clone() for one in parameters]
    before, length = velocities(run, update), 1.0
    parts = (gradient / gradient.norm()).split([one.numel() for one in parameters])
    for _ in range(ROUNDS):
        with torch.no_grad():
            for one, origin, part in zip(parameters, start, parts, strict=True):
                one.copy_(origin - length * part.view_as(origin))
        found = velocity_kl(velocities(run, update), before).item()
        length *= math.sqrt(divergence / found)


def broken_after(
    run: Run, gradients: Mapping[str, Tensor], divergence: float, update: JudgedUpdate, prompts: int
) -> dict[str, Tensor]:
    """By credit, [N] whether held-out videos break after a step against its mean gradient."""
    parameters = trained_parameters(run.generator.transformer)
    start = [one.detach().clone() for one in parameters]
    index = torch.arange(min(prompts, len(run.prompts))).repeat_interleave(PER_PROMPT)
    seeds = range(HELD_OUT_SEED, HELD_OUT_SEED + len(index))
    texts = [run.prompts[place] for place in index.tolist()]
    broken = {}
    for name, own in {UNTRAINED: None, **gradients}.items():
        if own is not None:
            step_against(run, own, divergence, update)
        drawn = rollout(run.generator, run.embeddings, index, seeds, run.settings.rollout)
        reports = oracle.judge_videos(drawn.videos, texts, run.generator.fps)
        broken[name] = torch.tensor([report.broken for report in reports]).double()
        with torch.no_grad():
            for one, origin in zip(parameters, start, strict=True):
                one.copy_(origin)
    return broken


def show_effect(broken: Mapping[str, Tensor], divergence: float) -> None:
    """Print the rates after steps of one divergence, and their paired differences."""
    print(f"| credit, divergence {divergence:g} | broken | less than uniform |\n|---|---|---|")
    for name, own in broken.items():
        less = broken["uniform"] - own
        half = 1.96 * float(less.std()) / math.sqrt(len(less))
        print(f"| {name} | {own.mean():.3f} | {less.mean():+.3f} +- {half:.3f} |")
    print(flush=True)


def mean_of_pairs(cosines: np.ndarray, updates: Sequence[int]) -> float:
    """Mean over known pairs of two different updates; one drawn twice is no pair with itself.

    Example:
        >>> mean_of_pairs(np.array([[1.0, 0.5], [0.25, 1.0]]), [0, 1])
        0.375
    """
    chosen = np.asarray(updates)
    own = cosines[np.ix_(chosen, chosen)]
    pairs = (chosen[:, None] != chosen[None, :]) & ~np.isnan(own)
    return float(own[pairs].mean()) if pairs.any() else math.nan


def compare(cosines: Mapping[str, np.ndarray], against: str) -> dict[str, list[float]]:
    """By credit, the mean of pairs and its ratio to another's, each with its 95% bootstrap."""
    count = len(cosines[against])
    random = np.random.default_rng(0)
    draws = [random.integers(count, size=count) for _ in range(DRAWS)]
    figures = {}
    base = mean_of_pairs(cosines[against], range(count))
    for name, own in cosines.items():
        mean = mean_of_pairs(own, range(count))
        drawn = [(mean_of_pairs(own, d), mean_of_pairs(cosines[against], d)) for d in draws]
        spread = np.nanquantile([one for one, _ in drawn], (0.025, 0.975))
        ratios = np.nanquantile([one / other for one, other in drawn], (0.025, 0.975))
        figures[name] = [mean, *map(float, spread), mean / base, *map(float, ratios)]
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print two tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--row", choices=runs.ROWS, default=runs.ROW)
    parser.add_argument("--updates", type=int, default=20, help="at least 3 (20)")
    parser.add_argument("--mix", type=float, default=1.0)
    parser.add_argument("--output", type=Path, default=Path("runs/credit_gradients"))
    parser.add_argument("--steps", nargs="*", type=float, default=[], metavar="DIVERGENCE")
    parser.add_argument("--prompts", type=int, default=256, help="of the held-out videos (256)")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the row's config"
    )
    options = parser.parse_args(arguments)
    if options.updates < 3:
        parser.error(f"--updates must be at least 3, got {options.updates}")
    own = argparse.Namespace(**vars(options), clip="video", keep=None)
    run = prepare(build(to_tree(runs.run_settings(own, "grounded", seed=0))))
    measure_base(run.generator, run.embeddings, run.settings.finetune_settings(), run.state)
    gradients: dict[str, list[Tensor]] = {}
    places: list[tuple[float, float, float]] = []
    rooms: list[tuple[float, float, float]] = []
    broken: list[bool] = []
    for step in range(1, options.updates + 1):
        update = judge_update(run, step)
        truth = true_blame(run, update)
        broken += (update.judged.judgements[runs.ORACLE["name"]].score < 1).tolist()
        places += shared_focus(run, update, truth)
        rooms += room(run, update, truth)
        for name, credit in credits_of(run, update, truth, options.mix).items():
            gradients.setdefault(name, []).append(gradient_of(run, update, credit))
        print(f"update {step}/{options.updates}", flush=True)
    show(gradients, places, broken)
    at_fault, error, even = np.mean(rooms, axis=0) if rooms else (math.nan,) * 3
    print(
        f"of the {len(rooms)} with a fault that has a place, {at_fault:.3f} of the latent is at "
        f"fault and holds {error:.3f} of the squared error, which is worth {even:.3f} of it\n"
    )
    means = {name: torch.stack(own).mean(dim=0) for name, own in gradients.items()}
    for divergence in options.steps:
        show_effect(broken_after(run, means, divergence, update, options.prompts), divergence)


def show(
    gradients: Mapping[str, Sequence[Tensor]],
    places: Sequence[tuple[float, float, float]],
    broken: Sequence[bool],
) -> None:
    """Print what was measured."""
    stacked = {name: torch.stack(list(own)) for name, own in gradients.items()}
    reference = stacked.pop(REFERENCE)
    overlap, moved, area = np.mean(places, axis=0) if places else (math.nan,) * 3
    print(
        f"\n{len(broken)} videos, {100 * np.mean(broken):.1f}% broken by the oracle; of the "
        f"{len(places)} that both blame somewhere, focus in common {overlap:.3f}, moved at random "
        f"{moved:.3f}; the oracle's faults cover {area:.3f} of the latent\n"
    )
    for title, others in (("agreement", stacked), ("direction", dict.fromkeys(stacked, reference))):
        cosines = {name: direction(own, others[name]).numpy() for name, own in stacked.items()}
        print(f"| credit | {title} | against uniform |\n|---|---|---|")
        for name, (mean, low, high, *ratio) in compare(cosines, "uniform").items():
            print(
                f"| {name} | {mean:.4f} ({low:.4f} to {high:.4f}) "
                f"| {ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f}) |"
            )
        print()


if __name__ == "__main__":
    main()
