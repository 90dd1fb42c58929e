"""Base and tuned generator on the same prompts and seeds, and what the judge says of spoilt copies.

Axes: N videos of an evaluation, B of one batch, F frames, C, H, W.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor

from diffusion_rl.charts import format_number
from diffusion_rl.comparison import (
    Comparison,
    Estimate,
    McNemar,
    compare,
    compare_all,
    mcnemar,
    relative_reduction,
)
from diffusion_rl.guards import STATISTICS
from diffusion_rl.page import Table, VideoPair, comparison_table, write_report
from diffusion_rl.rewards import Reward, RewardFunction, ask_rewards, check_missing
from diffusion_rl.shapes import check_shape

__all__ = [
    "AuditRow",
    "Comparison",
    "Estimate",
    "McNemar",
    "Measured",
    "Table",
    "VideoPair",
    "audit_judge",
    "audit_table",
    "blurred_copy",
    "broken",
    "compare",
    "compare_all",
    "comparison_table",
    "darkened_copy",
    "frozen_copy",
    "gather",
    "mcnemar",
    "measure_generator",
    "prompt_batches",
    "prompt_groups",
    "relative_reduction",
    "statistic_measures",
    "summarise",
    "write_report",
]

BLUR = 0.06
"""Spread of the audit's blur, as a share of the shorter side."""
DARK = 0.1
"""Light that the audit's darkened copies keep."""


@dataclass(frozen=True)
class Measured:
    """What a generator's videos measure."""

    prompts: tuple[str, ...]
    """N texts."""
    seeds: tuple[int, ...]
    """N seeds."""
    values: Mapping[str, Tensor]
    """Measure's name to [N]; NaN where it could not be taken."""
    reports: Mapping[str, Sequence[Any]]
    """N objects of each measure that gives reports."""
    videos: Tensor
    """[N F C H W] uint8 in [0, 255]; N = 0 where they were not kept."""


def measure_generator(
    sample: Callable[[Sequence[str], Sequence[int]], Tensor],
    measures: Mapping[str, RewardFunction | Reward],
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    fps: float,
    batch_size: int = 32,
    missing_limit: float = 0.5,
) -> Iterator[Measured]:
    """Sample videos and measure them, batch by batch.

    Give the same prompts and seeds to both generators; `gather` joins what is yielded.

    Args:
        sample: (prompts, seeds) -> videos [B F C H W] in [0, 1]; equal seeds, equal noise.
        measures: Name to a callable that honours the reward contract, or to a reward that is asked
            its own way.
        prompts: N texts; equal ones must follow each other and share a batch, so that diversity
            can be measured.
        seeds: N integers.
        fps: Frames per second of the videos.
        batch_size: Videos per batch, at least 1; more where one prompt alone has more.
        missing_limit: Largest share of a batch, in [0, 1), that a measure may leave unjudged.

    Yields:
        One `Measured` per batch, with its videos.

    Raises:
        ValueError: The prompts and seeds do not pair up, or an option is outside its range.
        RuntimeError: A measure raised, or left too many videos of a batch unjudged.
    """
    if not prompts or len(prompts) != len(seeds):
        raise ValueError(
            f"seeds must be one for each of at least one prompt, got {len(seeds)} for "
            f"{len(prompts)} prompts"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    rewards = [_as_reward(name, measure) for name, measure in measures.items()]
    for batch in prompt_batches(prompts, batch_size):
        texts, numbers = tuple(prompts[batch]), tuple(seeds[batch])
        videos = sample(texts, numbers)
        # Not added up: each measure stands for itself, and so does what it leaves unjudged.
        judgements = ask_rewards(rewards, videos, texts, fps=fps).answers()
        check_missing(rewards, judgements, missing_limit)
        yield Measured(
            prompts=texts,
            seeds=numbers,
            values={name: one.score for name, one in judgements.items()},
            reports={
                name: list(one.reports)
                for name, one in judgements.items()
                if one.reports is not None
            },
            videos=(videos * 255).round().to(torch.uint8).cpu(),
        )


def gather(batches: Iterable[Measured], *, keep_videos: bool = True) -> Measured:
    """Join the batches of one generator.

    Args:
        batches: At least one; may be a progress bar over `measure_generator`.
        keep_videos: False drops the videos batch by batch, for those that do not fit in memory.

    Raises:
        ValueError: There is no batch.
    """
    parts = []
    for part in batches:
        videos = part.videos if keep_videos else part.videos[:0]
        parts.append(Measured(part.prompts, part.seeds, part.values, part.reports, videos))
    if not parts:
        raise ValueError("batches must be at least one, got none")
    return Measured(
        prompts=tuple(text for part in parts for text in part.prompts),
        seeds=tuple(seed for part in parts for seed in part.seeds),
        values={name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values},
        reports={
            name: [report for part in parts for report in part.reports[name]]
            for name in parts[0].reports
        },
        videos=torch.cat([part.videos for part in parts]),
    )


def prompt_groups(prompts: Sequence[str]) -> Tensor:
    """Number the prompts [N] by their text: what `group` is in advantages and comparisons."""
    numbers = {text: index for index, text in enumerate(dict.fromkeys(prompts))}
    return torch.tensor([numbers[text] for text in prompts], dtype=torch.long)


def statistic_measures(*names: str) -> dict[str, RewardFunction]:
    """Make measures of the guards' statistics: motion, sharpness, contrast, diversity.

    Raises:
        ValueError: There is no such statistic.
    """
    unknown = [name for name in names if name not in STATISTICS]
    if unknown:
        raise ValueError(f"names must be among {', '.join(STATISTICS)}, got '{unknown[0]}'")
    return {name: functools.partial(_measure_statistic, name) for name in names}


def broken(scores: Tensor, threshold: float = 0.5) -> Tensor:
    """Turn P(clean) into faults to count.

    Args:
        scores: [N]; NaN stays NaN.
        threshold: Scores below it are broken.

    Returns:
        [N] float32, 1 broken, 0 clean.
    """
    return torch.where(scores.isnan(), torch.nan, (scores < threshold).float())


def summarise(measured: Measured) -> dict[str, float]:
    """Mean of every measure over the videos that have it, and how many videos there are."""
    means = {name: values.nanmean().item() for name, values in measured.values.items()}
    return {"videos": len(measured.prompts), **means}


@dataclass(frozen=True)
class AuditRow:
    """What the judge says of one kind of copy."""

    copy: str
    """original, frozen, blurred or darkened."""
    mean_score: float
    """Over the videos judged; NaN where none was."""
    passed: float
    """Share of the videos judged that reach the threshold; NaN where none was judged."""
    preferred: float
    """Share of videos whose copy scores above the original, of those judged both ways; NaN where
    none was."""
    unjudged: float
    """Share of the videos that could not be judged."""


def audit_judge(
    judge: RewardFunction | Reward,
    videos: Tensor,
    prompts: Sequence[str],
    *,
    fps: float,
    threshold: float = 0.5,
    batch_size: int = 32,
) -> list[AuditRow]:
    """Ask a judge about a frozen, a blurred and a darkened copy of every clip.

    A good one refuses them; where copies pass, training on this judge needs the motion, sharpness
    and contrast guards. Any number of them may stay unjudged, which is an answer, too.

    Args:
        judge: Honours the reward contract, or a reward that is asked its own way.
        videos: [N F C H W], float in [0, 1] or uint8 in [0, 255].
        prompts: N texts.
        fps: Frames per second.
        threshold: Score from which a clip passes.
        batch_size: Videos copied and judged at once, at least 1.

    Returns:
        Rows for the original, the frozen, the blurred and the darkened copies.

    Raises:
        ValueError: batch_size is outside its range, or an answer breaks the contract.
        RuntimeError: The judge raised.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    scores = {}
    for name, make in {"original": Tensor.clone, **COPIES}.items():
        reward = _as_reward(f"{name} copies", judge)
        parts = []
        for at in range(0, len(prompts), batch_size):
            part = slice(at, at + batch_size)
            own = videos[part] if videos.is_floating_point() else videos[part].float() / 255
            said = ask_rewards([reward], make(own), prompts[part], fps=fps).answers()
            parts.append(said[reward.name].score)
        scores[name] = torch.cat(parts)
    rows = []
    for name, score in scores.items():
        judged = score[~score.isnan()]
        both = ~(score.isnan() | scores["original"].isnan())
        rows.append(
            AuditRow(
                copy=name,
                mean_score=_share(judged),
                passed=_share(judged >= threshold),
                preferred=_share(score[both] > scores["original"][both]),
                unjudged=_share(score.isnan()),
            )
        )
    return rows


def audit_table(rows: Sequence[AuditRow]) -> Table:
    """Lay out an audit for the report; what nobody could judge is "-"."""
    percent = functools.partial(format_number, percent=True)
    return Table(
        title="Can the judge be fooled?",
        columns=[
            *("copy of each clip", "mean score", "passed as clean", "scored above the original"),
            "not judged",
        ],
        rows=[
            [row.copy, row.mean_score, *map(percent, (row.passed, row.preferred, row.unjudged))]
            for row in rows
        ],
        caption="A still, blurred or dark clip shows no fault; where the judge lets it pass, only "
        "the guards keep training from making such clips.",
    )


def frozen_copy(videos: Tensor) -> Tensor:
    """Repeat the first frame of every video [N F C H W]."""
    check_shape("videos", videos, "N F C H W")
    return videos[:, :1].expand_as(videos).clone()


def blurred_copy(videos: Tensor) -> Tensor:
    """Blur every frame of videos [N F C H W] with a Gaussian of BLUR of the shorter side."""
    axes = check_shape("videos", videos, "N F C H W")
    spread = BLUR * min(axes["H"], axes["W"])
    radius = max(1, math.ceil(2.5 * spread))
    places = torch.arange(-radius, radius + 1, dtype=torch.float32, device=videos.device)
    kernel = torch.exp(-(places**2) / (2 * spread**2))
    kernel = kernel / kernel.sum()
    planes = rearrange(videos.float(), "N F C H W -> (N F C) 1 H W")
    planes = functional.pad(planes, (radius,) * 4, mode="replicate")
    planes = functional.conv2d(planes, kernel.reshape(1, 1, 1, -1))
    planes = functional.conv2d(planes, kernel.reshape(1, 1, -1, 1))
    blurred = rearrange(planes, "(N F C) 1 H W -> N F C H W", N=axes["N"], F=axes["F"], C=axes["C"])
    return blurred.clamp(0, 1).to(videos.dtype)


def darkened_copy(videos: Tensor) -> Tensor:
    """Leave DARK of the light of videos [N F C H W]."""
    check_shape("videos", videos, "N F C H W")
    return videos * DARK


COPIES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "frozen": frozen_copy,
    "blurred": blurred_copy,
    "darkened": darkened_copy,
}
"""How the audit spoils videos [N F C H W] in [0, 1]."""


def _measure_statistic(name: str, videos: Tensor, prompts: Sequence[str], *, fps: float) -> Tensor:
    return STATISTICS[name](videos, prompt_groups(prompts).to(videos.device))


def _as_reward(name: str, measure: RewardFunction | Reward) -> Reward:
    """A measure under its name, asked its own way where it has one."""
    if isinstance(measure, Reward):
        return replace(measure, name=name)
    return Reward(name, measure)


def _share(values: Tensor) -> float:
    return values.float().mean().item()


def prompt_batches(prompts: Sequence[str], size: int) -> Iterator[slice]:
    """Runs of equal prompts packed into batches without splitting one."""
    start = stop = 0
    for _, run in groupby(prompts):
        length = len(list(run))
        if stop > start and stop + length - start > size:
            yield slice(start, stop)
            start = stop
        stop += length
    yield slice(start, stop)
