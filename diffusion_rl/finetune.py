"""The loop: draw videos, judge them, move the adapter; one StepReport for each update.

On several processes each draws, judges and replays its share of an update's videos; scores,
advantages and reports are of all of them, and so is the step.

Axes: B videos of this process, N of the update.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from diffusion_rl.advantages import (
    advantages_apart,
    missing_share,
    separate_advantages,
    tied_share,
)
from diffusion_rl.algorithms import algorithm
from diffusion_rl.blame import LatentGrid
from diffusion_rl.collect import Batch, collect, update_source
from diffusion_rl.credit import (
    Credit,
    ScorePart,
    assign_credit,
    check_blame,
    focused_share,
)
from diffusion_rl.drawing import Draws
from diffusion_rl.generators.base import AbstractVideoGenerator, PromptEmbeddings
from diffusion_rl.guards import GuardReport, apply_guards, measure_reference
from diffusion_rl.held_out import HeldOut
from diffusion_rl.memory_errors import explain_out_of_memory
from diffusion_rl.optimizers import build_optimizer
from diffusion_rl.policies import (
    reference_policy,
    trained_parameters,
    update_average,
    update_old_policy,
)
from diffusion_rl.progress import FinetuneSettings, FinetuneState, StepReport
from diffusion_rl.prompt_sampling import add_groups
from diffusion_rl.rewards import (
    AskedRewards,
    JudgedBatch,
    Reward,
    add_up_rewards,
    gather_answers,
)
from diffusion_rl.rollout import Trajectory
from diffusion_rl.row_kinds import GroupSettings, OldPolicySettings
from diffusion_rl.self_check import self_check
from diffusion_rl.trends import REWARD, add_values, falling_beside, warn_of
from diffusion_rl.update_memory import update_savings
from diffusion_rl.updates import UpdateStatistics, update_policy

__all__ = ["FinetuneSettings", "FinetuneState", "StepReport", "begin", "finetune"]

logger = logging.getLogger(__name__)


def begin(generator: AbstractVideoGenerator, settings: FinetuneSettings) -> FinetuneState:
    """The state before the first update; what learns must be attached."""
    parameters = trained_parameters(generator.transformer)
    if not parameters:
        raise ValueError(
            "generator must carry a LoRA or weights that learn, got none; call attach_policies"
        )
    return FinetuneState(build_optimizer(parameters, settings.optimizer))


def finetune(
    generator: AbstractVideoGenerator,
    rewards: Sequence[Reward],
    prompts: Sequence[str],
    settings: FinetuneSettings,
    state: FinetuneState | None = None,
    embeddings: PromptEmbeddings | None = None,
    held_out: HeldOut | None = None,
) -> Iterator[StepReport]:
    """Yield one report for each update until `settings.updates` are done.

    Between two reports generator and state are whole: the caller may save, stop or go on.

    Args:
        generator: with what `attach_policies` adds (and the old policy, where the row uses it).
        rewards: at least one.
        prompts: at least one text.
        settings: everything else.
        state: where to go on from; None begins.
        embeddings: of the prompts, if they are known already; else they are encoded here, once.
        held_out: rewards that measure and never train.
    """
    if not prompts:
        raise ValueError("prompts must be at least one text, got none")
    state = begin(generator, settings) if state is None else state
    embeddings = generator.encode_prompts(prompts) if embeddings is None else embeddings
    look_at_base(generator, embeddings, settings, state)
    draws = Draws(generator, embeddings, rewards, prompts, settings, state)
    while state.step < settings.updates:  # Its videos are gone before the next ones are drawn.
        yield run_update(draws, generator, rewards, prompts, settings, state, held_out)


def run_update(
    draws: Draws,
    generator: AbstractVideoGenerator,
    rewards: Sequence[Reward],
    prompts: Sequence[str],
    settings: FinetuneSettings,
    state: FinetuneState,
    held_out: HeldOut | None,
) -> StepReport:
    """Draw, judge, compare, learn: one update; afterwards the state is that of the next."""
    started = time.monotonic()
    (batch, policy_step), asked = draws.take()
    collected = time.monotonic()
    judged, guarded = judge(rewards, asked, batch, settings, state)
    draws.send_next()
    judged_at = time.monotonic()
    score = judged.score - guarded.penalty
    advantages = compare(score, rewards, judged, guarded, batch, settings, state)
    credit = place(advantages, generator, rewards, judged, guarded, batch, settings)
    statistics = update(generator, batch.trajectory, score, credit, settings, state)
    ended = time.monotonic()
    state.step += 1
    measured = measure(generator, held_out, prompts, batch, settings, state)
    numbers = summarise(score, judged, guarded, batch, state)
    hacking = watch(numbers, measured, rewards, held_out, settings, state)
    groups = (score, batch.group, batch.prompt_index)
    state.prompts = add_groups(state.prompts, *groups, settings.prompt_sampling.memory)
    state.videos_generated += len(score)
    state.reward_calls += len(score) * len(rewards)
    state.seconds += ended - started
    return StepReport(
        step=state.step,
        **numbers,
        hacking=hacking,
        evaluation=measured,
        staleness=state.step - 1 - policy_step,
        advantage_size=advantages.abs().mean().item(),
        focused_share=focused_share(advantages, batch.gather(credit.moved)),
        focus_area=batch.gather(credit.areas).nanmean().item(),
        **asdict(statistics),
        collect_seconds=collected - started,
        judge_seconds=judged_at - collected,
        update_seconds=ended - judged_at,
        evaluation_seconds=time.monotonic() - ended if measured else 0.0,
        videos_generated=state.videos_generated,
        reward_calls=state.reward_calls,
        seconds=state.seconds,
    )


def measure(
    generator: AbstractVideoGenerator,
    held_out: HeldOut | None,
    prompts: Sequence[str],
    batch: Batch,
    settings: FinetuneSettings,
    state: FinetuneState,
) -> dict[str, float]:
    """Ask the evaluation rewards where they are due after update `state.step`; else nothing."""
    if held_out is None or not held_out.settings.due(state.step):
        return {}
    texts = [prompts[index] for index in batch.trajectory.prompt_index.tolist()]
    measured, drawn, calls = held_out.measure(
        generator, settings.rollout, settings.missing_limit, batch.trajectory, texts
    )
    state.videos_generated += drawn
    state.reward_calls += calls
    return measured


def summarise(
    score: Tensor, judged: JudgedBatch, guarded: GuardReport, batch: Batch, state: FinetuneState
) -> dict[str, Any]:
    """What rewards and guards said of an update, by the names of StepReport."""
    return {
        "reward": _mean(judged.score),
        "rewards": {name: _mean(one.score) for name, one in judged.judgements.items()},
        "penalty": guarded.penalty.mean().item(),
        "guards": {
            name: level / state.reference_levels[name] for name, level in guarded.levels.items()
        },
        "alarms": guarded.alarms,
        "score_std": score[~score.isnan()].std(correction=0).item(),
        "tied_share": tied_share(score, batch.group),
        "missing_share": missing_share(score),
        "unanswered": sum(one.unanswered for one in judged.judgements.values()),
    }


def watch(
    numbers: Mapping[str, Any],
    measured: Mapping[str, float],
    rewards: Sequence[Reward],
    held_out: HeldOut | None,
    settings: FinetuneSettings,
    state: FinetuneState,
) -> tuple[str, ...]:
    """Note the update's values, and warn of what falls while the reward rises.

    A series that the run no longer has, since its settings changed, is forgotten.
    """
    own = settings.hacking_alarm
    wanted = [reward.name for reward in rewards if reward.weight >= 0]  # Others ought to fall.
    values = {
        REWARD: numbers["reward"],
        **numbers["guards"],
        **{f"rewards/{name}": numbers["rewards"][name] for name in wanted},
        **{f"evaluation/{name}": value for name, value in measured.items()},
    }
    keep = own.window * (held_out.settings.every if held_out else 1)
    rare = [reward.name for reward in held_out.rewards] if held_out else []
    names = {*values, *(f"evaluation/{name}" for name in rare)}
    known = {name: past for name, past in state.series.items() if name in names}
    state.series = add_values(known, state.step, values, keep)
    falling = falling_beside(state.series, own)
    state.warned = warn_of(falling, state.warned, state.step, state.series, own)
    return falling


def look_at_base(
    generator: AbstractVideoGenerator,
    embeddings: PromptEmbeddings,
    settings: FinetuneSettings,
    state: FinetuneState,
) -> None:
    """Check that replay repeats what was drawn, and measure what the guards hold the policy to."""
    own = (settings.algorithm, settings.rollout, settings.credit.clip)
    # Replayed with gradient, as in an update.
    with explain_out_of_memory("the self-check", partial(update_savings, generator, settings)):
        check = self_check(generator, embeddings, *own)
    if check.videos:
        logger.info("self-check: ratio 1 within %.1e on replay", check.ratio_deviation)
    state.videos_generated += check.videos if state.step == 0 else 0
    if settings.guards and not state.reference_levels:
        measure_base(generator, embeddings, settings, state)


def measure_base(
    generator: AbstractVideoGenerator,
    embeddings: PromptEmbeddings,
    settings: FinetuneSettings,
    state: FinetuneState,
) -> None:
    """Measure the guards' reference levels on as many videos of the base as an update has.

    They are spread over as many prompts as two seeds each allow; of an odd number one more is
    drawn, so that there is one for each process.
    """
    count = (settings.rollout.prompts_per_update * settings.rollout.videos_per_prompt + 1) // 2
    spread = replace(settings.rollout, prompts_per_update=count, videos_per_prompt=2)
    with reference_policy(generator.transformer):
        batch = collect(generator, embeddings, replace(settings, rollout=spread), step=0)
    videos = batch.trajectory.videos
    state.reference_levels = measure_reference(
        settings.guards, videos, batch.own_group, batch.gather
    )
    state.videos_generated += len(batch.group)


def judge(
    rewards: Sequence[Reward],
    asked: AskedRewards | None,
    batch: Batch,
    settings: FinetuneSettings,
    state: FinetuneState,
) -> tuple[JudgedBatch, GuardReport]:
    """Wait for the rewards and ask the guards; scores and penalties are [N], of all.

    Raises:
        ValueError: Credit wants blame, and in a run's first update no weighted reward returns any.
    """
    trajectory = batch.trajectory
    places = (trajectory.videos, trajectory.rows, trajectory.total)
    said = gather_answers(asked, "judging videos", *places)
    judged = add_up_rewards(rewards, said, settings.missing_limit)
    if state.step == 0:
        check_blame([said[one.name].blame for one in rewards if one.weight], settings.credit)
    guarded = apply_guards(
        settings.guards,
        state.reference_levels,
        trajectory.videos,
        batch.own_group,
        state.running_levels,
        batch.gather,
    )
    state.running_levels = dict(guarded.running)
    return judged, guarded


def compare(
    score: Tensor,
    rewards: Sequence[Reward],
    judged: JudgedBatch,
    guarded: GuardReport,
    batch: Batch,
    settings: FinetuneSettings,
    state: FinetuneState,
) -> Tensor:
    """Advantages [N] the way the row forms them; 0 for videos not judged.

    The score is what the rewards sum up to without what the guards take off.
    """
    row, options = algorithm(settings.algorithm.name), settings.algorithm.advantage_options
    if row.uses_history:
        advantages, state.history = row.advantages(
            score, batch.prompt_index, state.history, **options
        )
        return cast(Tensor, advantages)
    own = settings.algorithm
    if isinstance(own, GroupSettings) and own.advantage_rewards == "separate":
        weights, parts = score_parts(rewards, judged, guarded)
        scores = torch.stack([part.score for part in parts])
        return separate_advantages(scores, weights, batch.group, **options)
    return cast(Tensor, row.advantages(score, batch.group, **options))


def score_parts(
    rewards: Sequence[Reward], judged: JudgedBatch, guarded: GuardReport
) -> tuple[list[float], list[ScorePart]]:
    """What the scores are the sum of, unweighted, beside its weights; the guards stand last."""
    weighted = [reward for reward in rewards if reward.weight]
    said = [judged.judgements[reward.name] for reward in weighted]
    parts = [*(ScorePart(one.score, one.blame) for one in said), ScorePart(-guarded.penalty)]
    return [*(reward.weight for reward in weighted), 1.0], parts


def place(
    advantages: Tensor,
    generator: AbstractVideoGenerator,
    rewards: Sequence[Reward],
    judged: JudgedBatch,
    guarded: GuardReport,
    batch: Batch,
    settings: FinetuneSettings,
) -> Credit:
    """Say where in this process's videos their advantages go, each reward weighed as in them."""
    rows = batch.trajectory.rows
    if settings.credit.name == "uniform":
        return Credit(advantages[rows], clip=settings.credit.clip)
    weights, parts = score_parts(rewards, judged, guarded)
    scores = torch.stack([part.score for part in parts])
    own = settings.algorithm
    if isinstance(own, GroupSettings) and own.advantage_rewards == "separate":
        options = {key: own.advantage_options[key] for key in ("std", "unbiased")}
        missing = scores.isnan().any(dim=0)
        scores = advantages_apart(scores, weights, batch.group, **options)
        scores = scores.masked_fill(missing, torch.nan)
    else:
        scores = scores * torch.tensor(weights)[:, None]
    parts = [part._replace(score=one) for part, one in zip(parts, scores, strict=True)]
    grid = LatentGrid(generator.frame_groups, *generator.latent_shape[2:])
    return assign_credit(advantages, parts, batch.group, grid, batch.seeds, settings.credit, rows)


def update(
    generator: AbstractVideoGenerator,
    trajectory: Trajectory,
    score: Tensor,
    credit: Credit,
    settings: FinetuneSettings,
    state: FinetuneState,
) -> UpdateStatistics:
    """Move the adapter, and the old policy after it; unjudged videos teach nothing."""
    judged = ~score.isnan()
    if not bool(judged.all()):
        trajectory, credit = trajectory.keep(judged), credit[judged[trajectory.rows]]
    rate = settings.optimizer.learning_rate_at(state.step + 1, settings.updates)
    for options in state.optimizer.param_groups:
        options["lr"] = rate
    with explain_out_of_memory("the update", partial(update_savings, generator, settings)):
        statistics = update_policy(
            generator,
            trajectory,
            credit,
            settings.algorithm,
            settings.rollout,
            state.optimizer,
            update_source(settings.seed, state.step + 1, purpose=1),
        )
    if isinstance(settings.algorithm, OldPolicySettings):
        decay = settings.algorithm.old_decay(state.step + 1)
        update_old_policy(generator.transformer, decay)
    update_average(generator.transformer, settings.optimizer.average_decay, state.step + 1)
    return statistics


def _mean(score: Tensor) -> float:
    """Over judged videos; NaN where there are none."""
    return score[~score.isnan()].mean().item()
