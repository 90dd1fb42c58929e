"""Base against tuned on held-out prompts and noise, by the oracle and by the judge in full mode.

The oracle takes no part in training. Legend: N videos of an evaluation, F frames, C, H, W.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion_rl.comparison import (
    Comparison,
    Estimate,
    McNemar,
    compare_all,
    mcnemar,
    relative_reduction,
)
from diffusion_rl.configuration import RunSettings
from diffusion_rl.evaluation import (
    AuditRow,
    Measured,
    audit_judge,
    broken,
    gather,
    measure_generator,
    prompt_groups,
    statistic_measures,
)
from diffusion_rl.generators.base import AbstractVideoGenerator
from diffusion_rl.launch import Run
from diffusion_rl.policies import reference_policy, saved_policy
from diffusion_rl.prompts import read_prompts
from diffusion_rl.rewards import RewardFunction, build_reward
from diffusion_rl.rollout import RolloutSettings
from diffusion_rl.sampling import sample_videos
from examples.toy_world import oracle
from examples.toy_world.training_state import EVALUATION_SEED
from examples.toy_world.world import FAULTS

JUDGE, ALIGNMENT, ORACLE = "cac", "alignment", "oracle"
"""Names of the measures that give reports; the first two are names of rewards, too."""
SIDES = ("base", "tuned")
GUIDANCE = 3.0
"""Classifier-free guidance that the generator's card recommends."""
UNWORLDLY = "not of this world"
"""What the oracle calls a video that is no clip of the world at all."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How much is measured after training."""

    prompts: str = "examples/toy_world/prompts/evaluation.txt"
    """A text file; none of its prompts may be trained on."""
    videos_per_prompt: int = 8
    """Seeds of each prompt, at least 2: diversity compares them."""
    batch_size: int = 32
    """Videos drawn and judged together, at least 1."""
    audit_videos: int = 64
    """Base videos whose frozen and blurred copies the judge is asked about, at least 1."""
    oracle_clips: int = 300
    """Rendered clips that the oracle's own errors are measured on, at least 1."""

    def __post_init__(self) -> None:
        if self.videos_per_prompt < 2:
            raise ValueError(
                f"videos_per_prompt must be at least 2, got {self.videos_per_prompt}; "
                "diversity compares the seeds of a prompt"
            )
        for name in ("batch_size", "audit_videos", "oracle_clips"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Evaluation:
    """Everything measured after training."""

    base: Measured
    tuned: Measured
    fps: float
    """Frames per second of the videos."""
    audit: Sequence[AuditRow]
    """What the training reward says of spoilt copies of base videos."""
    oracle_errors: Mapping[str, Any]
    """See `oracle.error_rates`."""
    guided: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Side to what the oracle says of the same prompts and noise with classifier-free guidance:
    guidance by itself mends much of what the training mends without it."""

    @property
    def values(self) -> dict[str, dict[str, Tensor]]:
        """Side to measure to [N]."""
        return {side: outcomes(getattr(self, side)) for side in SIDES}

    @property
    def group(self) -> Tensor:
        """[N] number of each video's prompt."""
        return prompt_groups(self.base.prompts)

    def comparisons(self) -> dict[str, Comparison]:
        """Every measure before and after, paired, over whole prompts."""
        values = self.values
        return compare_all(values["base"], values["tuned"], self.group)

    def reduction(self) -> Estimate | None:
        """Relative reduction of the oracle's anomaly rate; None where the base has no faults."""
        base, tuned = (self.values[side]["anomaly_rate_oracle"] for side in SIDES)
        if not base.mean() > 0:
            return None
        return relative_reduction(base, tuned, group=self.group)

    def tests(self) -> dict[str, McNemar]:
        """McNemar's test of the anomaly rates by the oracle and by the judge."""
        return {
            name: mcnemar(*(self.values[side][f"anomaly_rate_{name}"] for side in SIDES))
            for name in ("oracle", "judge")
        }


def evaluation_prompts(settings: EvaluationSettings, training: Sequence[str]) -> list[str]:
    """Read the held-out prompts.

    Raises:
        ValueError: One of them is trained on, or stands in the file twice.
    """
    prompts = read_prompts(settings.prompts)
    known = set(training)
    seen = [prompt for prompt in prompts if prompt in known]
    if seen:
        raise ValueError(
            f"evaluation prompts must not be trained on, got {seen[0]!r} in {settings.prompts} "
            "and among the training prompts; take it out of one of them"
        )
    if len(set(prompts)) != len(prompts):
        raise ValueError(
            f"evaluation prompts must be different, got one twice in {settings.prompts}"
        )
    return prompts


def evaluate_run(run: Run, prompts: Sequence[str], settings: EvaluationSettings) -> Evaluation:
    """Sample and judge both generators, with progress; the text encoder must still be there."""
    judges = build_judges(run.settings)
    measured = {}
    for side in SIDES:
        with policy_of(run, side):
            measured[side] = measure_side(
                run.generator, judges, prompts, settings, run.settings.rollout, side
            )
    count = min(settings.audit_videos, len(measured["base"].prompts))
    reward = next(one for one in run.rewards if one.name == JUDGE)
    audit = audit_judge(
        reward.function,
        measured["base"].videos[:count].float() / 255,
        measured["base"].prompts[:count],
        fps=run.generator.fps,
    )
    autoencoder = run.generator.pipeline.vae  # type: ignore[attr-defined]
    errors = oracle.error_rates(autoencoder, settings.oracle_clips, EVALUATION_SEED)
    guided = {}
    for side in SIDES:
        with policy_of(run, side):
            guided[side] = measure_guided(run, prompts, settings, side)
    return Evaluation(*measured.values(), run.generator.fps, audit, errors, guided)


def policy_of(run: Run, side: str) -> AbstractContextManager[None]:
    """The base generator, or the one that the run saves."""
    policy = reference_policy if side == "base" else saved_policy
    return policy(run.generator.transformer)


def measure_guided(
    run: Run, prompts: Sequence[str], settings: EvaluationSettings, side: str
) -> dict[str, float]:
    """What the oracle says of the active policy under GUIDANCE."""
    rollout = dataclasses.replace(run.settings.rollout, guidance_scale=GUIDANCE)
    description = f"{side} with guidance"
    measured = measure_side(run.generator, {}, prompts, settings, rollout, description)
    reports = measured.reports[ORACLE]
    return {
        "anomaly_rate_oracle": oracle.anomaly_rate(reports),
        "prompt_match": oracle.prompt_match(reports),
        "motion": oracle.mean_motion(reports),
        "diversity": measured.values["diversity"].mean().item(),
    }


def build_judges(settings: RunSettings) -> dict[str, RewardFunction]:
    """The run's judge in full mode (its findings carry boxes), its alignment, and the oracle.

    Raises:
        ValueError: The run does not reward with both.
    """
    by_name = {reward.name: reward for reward in settings.rewards}
    for name in (JUDGE, ALIGNMENT):
        if name not in by_name:
            raise ValueError(f"rewards must hold one named {name}, got {', '.join(by_name)}")
    full = {**by_name[JUDGE].options, "mode": "full"}
    judge = dataclasses.replace(by_name[JUDGE], options=full)
    return {
        JUDGE: build_reward(judge).function,
        ALIGNMENT: build_reward(by_name[ALIGNMENT]).function,
    }


def measure_side(
    generator: AbstractVideoGenerator,
    judges: Mapping[str, RewardFunction],
    prompts: Sequence[str],
    settings: EvaluationSettings,
    rollout: RolloutSettings,
    description: str,
) -> Measured:
    """Draw `videos_per_prompt` videos of each prompt with the active policy and measure them.

    Video i of prompt p always starts from the noise of seed p * videos_per_prompt + i, whatever
    the run; training draws its seeds from a range that never meets these.
    """
    measures = {
        **judges,
        ORACLE: judge_by_oracle,
        "diversity": oracle_diversity,
        **statistic_measures("sharpness", "contrast"),
    }
    texts = [prompt for prompt in prompts for _ in range(settings.videos_per_prompt)]

    def sample(batch: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return sample_videos(
            generator,
            batch,
            seeds,
            num_inference_steps=rollout.num_inference_steps,
            guidance_scale=rollout.guidance_scale,
            micro_batch=rollout.micro_batch,
        )

    def parts() -> Iterator[Measured]:
        batches = measure_generator(
            sample,
            measures,
            texts,
            range(len(texts)),
            fps=generator.fps,
            batch_size=settings.batch_size,
        )
        with tqdm(total=len(texts), desc=f"evaluate {description}", unit="video") as bar:
            unjudged = 0
            for part in batches:
                unjudged += int(part.values[JUDGE].isnan().sum()) if judges else 0
                bar.set_postfix(unjudged=unjudged)
                bar.update(len(part.prompts))
                yield part

    return gather(parts())


def judge_by_oracle(videos: Tensor, prompts: Sequence[str], *, fps: float) -> dict[str, Any]:
    """The oracle as a measure: 1 for a sound video, 0 for a broken one, with its reports."""
    reports = oracle.judge_videos(videos, prompts, fps)
    return {
        "score": torch.tensor([float(not report.broken) for report in reports]),
        "reports": reports,
    }


def oracle_diversity(videos: Tensor, prompts: Sequence[str], *, fps: float) -> Tensor:
    """[N] how different the videos of each one's prompt are; NaN where it is alone."""
    group = prompt_groups(prompts)
    result = torch.full((len(prompts),), math.nan)
    for index in group.unique():
        members = (group == index).nonzero().flatten()
        if len(members) > 1:
            texts = [prompts[member] for member in members.tolist()]
            result[members] = oracle.diversity(videos[members], texts)
    return result


def outcomes(measured: Measured) -> dict[str, Tensor]:
    """Every measure of the report, [N] each; NaN where the judge failed."""
    reports = measured.reports[ORACLE]
    return {
        "anomaly_rate_oracle": broken(measured.values[ORACLE]),
        "anomaly_rate_judge": broken(measured.values[JUDGE]),
        "motion": torch.tensor([float(report.motion) for report in reports]),
        "prompt_match": torch.tensor([float(bool(report.prompt_followed)) for report in reports]),
        "diversity": measured.values["diversity"],
        "P(clean) by the judge": measured.values[JUDGE],
        "P(yes) to the prompt": measured.values[ALIGNMENT],
        "sharpness": measured.values["sharpness"],
        "contrast": measured.values["contrast"],
    }


SUMMARY_MEASURES = (
    "anomaly_rate_oracle",
    "anomaly_rate_judge",
    "motion",
    "prompt_match",
    "diversity",
)
"""The measures of summary.json; the others are in the report alone."""


def side_summary(measured: Measured) -> dict[str, float | int]:
    """One generator's part of summary.json."""
    values = outcomes(measured)
    means = {name: values[name].nanmean().item() for name in SUMMARY_MEASURES}
    return {"videos": len(measured.prompts), **means}


def fault_rates(measured: Measured) -> dict[str, float]:
    """Share of videos in which the oracle finds each type of fault."""
    reports = measured.reports[ORACLE]
    rates = {}
    for kind in FAULTS:
        found = [any(one.type == kind for one in report.findings) for report in reports]
        rates[kind] = sum(found) / len(found)
    rates[UNWORLDLY] = sum(bool(report.unworldly) for report in reports) / len(reports)
    return rates


def judge_fault_rates(measured: Measured) -> dict[str, float]:
    """Share of videos in which the judge names each type of fault, or one of its own."""
    named = [{one.type for one in report.findings} for report in measured.reports[JUDGE]]
    rates = {fault: sum(fault in kinds for kinds in named) / len(named) for fault in FAULTS}
    return {**rates, "another": sum(bool(kinds - set(FAULTS)) for kinds in named) / len(named)}
