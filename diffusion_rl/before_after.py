"""What `evaluate` does: base and LoRA on the same prompts and seeds, compared and written down.

Axes: N videos a side, F frames, C, H, W.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_rl.clips import judged_clip
from diffusion_rl.evaluation import (
    AuditRow,
    Comparison,
    Measured,
    VideoPair,
    audit_table,
    broken,
    compare_all,
    comparison_table,
    mcnemar,
    prompt_groups,
    relative_reduction,
    summarise,
    write_report,
)
from diffusion_rl.generators.base import AbstractVideoGenerator
from diffusion_rl.policies import reference_policy
from diffusion_rl.rollout import RolloutSettings, rollout

SIDES = ("base", "tuned")
RATE = "_anomaly_rate"
SHOWN = 8
"""Pairs of videos on the page."""

Sampler = Callable[[Sequence[str], Sequence[int]], Tensor]


def build_samplers(
    generator: AbstractVideoGenerator, prompts: Sequence[str], settings: RolloutSettings
) -> dict[str, Sampler]:
    """(prompts, seeds) -> videos for the generator without and with its LoRA.

    Args:
        generator: with a LoRA from `load_lora`.
        prompts: all that will be asked for; each is encoded once, here.
        settings: steps, guidance and micro batch; nothing is stochastic.
    """
    distinct = list(dict.fromkeys(prompts))
    place = {text: index for index, text in enumerate(distinct)}
    embeddings = generator.encode_prompts(distinct)

    def sampler(policy: Callable[[], AbstractContextManager[None]]) -> Sampler:
        def sample(texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
            index = torch.tensor([place[text] for text in texts])
            with policy():
                return rollout(generator, embeddings, index, seeds, settings).videos

        return sample

    def without_lora() -> AbstractContextManager[None]:
        return reference_policy(generator.transformer)

    return {"base": sampler(without_lora), "tuned": sampler(nullcontext)}


def with_anomaly_rates(measured: Measured, clean: Sequence[str]) -> Measured:
    """Add, for every measure that is P(clean), whether it calls a video broken.

    Raises:
        ValueError: there is no such measure, or it is no probability.
    """
    values = dict(measured.values)
    for name in clean:
        if name not in values:
            raise ValueError(f"--clean must name measures, got {name}; there are {list(values)}")
        judged = values[name][~values[name].isnan()]
        if bool(((judged < 0) | (judged > 1)).any()):
            raise ValueError(
                f"--clean must name measures in [0, 1], got {name} with "
                f"{judged.min().item():.3g} to {judged.max().item():.3g}; name those that give "
                "P(clean)"
            )
        values[name + RATE] = broken(values[name])
    return dataclasses.replace(measured, values=values)


def compare_sides(
    sides: Mapping[str, Measured], clean: Sequence[str]
) -> tuple[dict[str, Comparison], dict[str, Any]]:
    """Every measure before against after, and the summary of all of it.

    Args:
        sides: `base` and `tuned`, with anomaly rates.
        clean: measures that are P(clean).
    """
    base, tuned = (sides[name] for name in SIDES)
    group = prompt_groups(base.prompts)
    comparisons = compare_all(base.values, tuned.values, group)
    summary: dict[str, Any] = {"base": summarise(base), "tuned": summarise(tuned)}
    for name in clean:
        rates = base.values[name + RATE], tuned.values[name + RATE]
        summary[f"mcnemar_p_{name}"] = mcnemar(*rates).p_value
        if comparisons[name + RATE].base > 0:
            found = relative_reduction(*rates, group=group)
            summary[f"relative_reduction_{name}"] = found.value
            summary[f"relative_reduction_{name}_ci95"] = [found.low, found.high]
    return comparisons, summary


def write_results(
    folder: str | Path,
    sides: Mapping[str, Measured],
    comparisons: Mapping[str, Comparison],
    summary: Mapping[str, Any],
    audits: Mapping[str, Sequence[AuditRow]],
    *,
    fps: float,
) -> Path:
    """Write summary.json and report.html; returns the page's path.

    Args:
        folder: made if missing.
        sides: `base` and `tuned`.
        comparisons: from `compare_sides`.
        summary: from `compare_sides`, with whatever else is to be kept.
        audits: what each judge says of frozen and blurred copies.
        fps: of the videos.
    """
    folder = Path(folder)
    base, tuned = (sides[name] for name in SIDES)
    tables = [comparison_table(comparisons)]
    for name, rows in audits.items():
        table = audit_table(rows)
        tables.append(dataclasses.replace(table, title=f"{table.title} ({name})"))
    judge = next(iter(base.reports), None)
    pairs = [
        VideoPair(
            prompt=base.prompts[index],
            **{
                side: judged_clip(
                    sides[side].videos[index].float() / 255,
                    fps,
                    sides[side].reports[judge][index] if judge else None,
                )
                for side in SIDES
            },
        )
        for index in _spread(len(base.videos), SHOWN)
    ]
    page = write_report(
        folder / "report.html",
        title="Base and tuned generator",
        summary=summary,
        tables=tables,
        video_pairs=pairs,
        notes=[
            f"{len(base.prompts)} videos a side, from the same prompts and the same noise; "
            "intervals are 95% paired bootstrap intervals over prompts."
        ],
    )
    partial = folder / "summary.json.partial"
    partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / "summary.json")
    return page


def _spread(count: int, wanted: int) -> list[int]:
    """Up to `wanted` places evenly over `count`."""
    return sorted({index * count // wanted for index in range(wanted)}) if count else []
