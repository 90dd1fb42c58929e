"""What `evaluate` does: generators on the same prompts and seeds, compared and written down.

Axes: N videos a side, F frames, C, H, W.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_rl.clips import Clip, judged_clip
from diffusion_rl.evaluation import (
    AuditRow,
    Comparison,
    Measured,
    Table,
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
from diffusion_rl.page import markdown_table, plain_numbers
from diffusion_rl.policies import reference_policy
from diffusion_rl.rollout import RolloutSettings
from diffusion_rl.sampling import draw_videos
from diffusion_rl.whole_files import write_whole

SIDES: tuple[str, str] = ("base", "tuned")
RATE = "_anomaly_rate"
SHOWN = 8
"""Pairs of videos on the page."""
AUDITED = 32
"""Base videos of which the judges see spoilt copies."""

Pair = tuple[str, str]
"""Names of two sides, the earlier first."""
Sampler = Callable[[Sequence[str], Sequence[int]], Tensor]


def build_samplers(
    generator: AbstractVideoGenerator,
    prompts: Sequence[str],
    settings: RolloutSettings,
    noise_level: float = 0.0,
) -> dict[str, Sampler]:
    """(prompts, seeds) -> videos for the generator without and with its LoRA.

    Args:
        generator: with a LoRA from `load_lora`.
        prompts: all that will be asked for; each is encoded once, here.
        settings: steps, guidance and micro batch.
        noise_level: as in `draw_videos`.
    """
    distinct = list(dict.fromkeys(prompts))
    place = {text: index for index, text in enumerate(distinct)}
    embeddings = generator.encode_prompts(distinct)

    def sampler(policy: Callable[[], AbstractContextManager[None]]) -> Sampler:
        def sample(texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
            index = torch.tensor([place[text] for text in texts])
            with policy():
                return draw_videos(generator, embeddings, index, seeds, settings, noise_level)

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


def shown_videos(count: int) -> list[int]:
    """Numbers of the videos that the page shows, of `count` a side."""
    return _spread(count, SHOWN)


def kept_videos(count: int) -> list[int]:
    """Numbers of the videos that stay in memory: those of the page and of the audit, ascending."""
    return sorted({*shown_videos(count), *range(min(count, AUDITED))})


def compare_sides(
    sides: Mapping[str, Measured], clean: Sequence[str]
) -> tuple[dict[Pair, dict[str, Comparison]], dict[str, Any]]:
    """Every measure of base against tuned, and of every further side against both.

    Args:
        sides: `base` and `tuned`, then any others, with anomaly rates.
        clean: measures that are P(clean).

    Returns:
        Comparisons by pair of sides and measure; and the summary of all of it.
    """
    group = prompt_groups(sides["base"].prompts)
    summary: dict[str, Any] = {name: summarise(side) for name, side in sides.items()}
    found: dict[Pair, dict[str, Comparison]] = {}
    entries = []
    for pair in side_pairs(sides):
        first, second = (sides[name] for name in pair)
        found[pair] = compare_all(first.values, second.values, group)
        tests: dict[str, Any] = {}
        for name in clean:
            rates = first.values[name + RATE], second.values[name + RATE]
            tests[f"mcnemar_p_{name}"] = mcnemar(*rates).p_value
            if found[pair][name + RATE].base > 0:
                fewer = relative_reduction(*rates, group=group)
                tests[f"relative_reduction_{name}"] = fewer.value
                tests[f"relative_reduction_{name}_ci95"] = [fewer.low, fewer.high]
        if pair == SIDES:
            summary |= tests
        measures = {name: _numbers(one) for name, one in found[pair].items()}
        entries.append({"sides": list(pair), **tests, "measures": measures})
    return found, summary | {"comparisons": entries}


def side_pairs(sides: Iterable[str]) -> list[Pair]:
    """Base to tuned; then for every further side, base to it and it to tuned."""
    others = [name for name in sides if name not in SIDES]
    return [SIDES, *(pair for name in others for pair in (("base", name), (name, "tuned")))]


def _numbers(one: Comparison) -> dict[str, Any]:
    difference = one.difference
    return {
        "means": [one.base, one.tuned],
        "difference": difference.value,
        "difference_ci95": [difference.low, difference.high],
        "pairs": one.pairs,
        "missing": one.missing,
    }


def result_tables(
    comparisons: Mapping[Pair, Mapping[str, Comparison]],
    summary: Mapping[str, Any],
    audits: Mapping[str, Sequence[AuditRow]],
) -> list[Table]:
    """The tables of the page, of the Markdown and of the model card, in order.

    Args:
        comparisons: from `compare_sides`.
        summary: from `compare_sides`.
        audits: what each judge says of spoilt copies.
    """
    tables = []
    for (pair, found), entry in zip(comparisons.items(), summary["comparisons"], strict=True):
        tested = [name for name in entry if name.startswith("mcnemar_p_")]
        clean = [name.removeprefix("mcnemar_p_") for name in tested]
        tests = [f"{one}: {entry[name]:.2g}" for one, name in zip(clean, tested, strict=True)]
        tables.append(
            comparison_table(
                found,
                title="Before and after" if pair == SIDES else f"{pair[0]} and {pair[1]}",
                caption=f"McNemar's p-value by judge: {', '.join(tests)}." if tests else "",
                percent=clean,  # A ratio of probabilities near 0 would say nothing.
                sides=pair,
            )
        )
    for name, rows in audits.items():
        table = audit_table(rows)
        tables.append(dataclasses.replace(table, title=f"{table.title} ({name})"))
    return tables


def write_results(
    folder: str | Path,
    sides: Mapping[str, Measured],
    summary: Mapping[str, Any],
    tables: Sequence[Table],
    *,
    fps: float,
) -> Path:
    """Write summary.json, report.md and report.html; returns the page's path.

    Args:
        folder: made if missing.
        sides: `base`, `tuned` and any others, each with the videos of `kept_videos`.
        summary: from `compare_sides`, with whatever else is to be kept.
        tables: from `result_tables`.
        fps: of the videos.
    """
    folder, base = Path(folder), sides["base"]
    judge, kept = next(iter(base.reports), None), kept_videos(len(base.prompts))

    def clip(side: Measured, number: int) -> Clip:
        video = side.videos[kept.index(number)].float() / 255
        return judged_clip(video, fps, side.reports[judge][number] if judge else None)

    pairs = []
    for number in shown_videos(len(base.prompts)):
        clips = {name: clip(side, number) for name, side in sides.items()}
        own = {name: clips.pop(name) for name in SIDES}
        pairs.append(VideoPair(prompt=base.prompts[number], **own, others=clips))
    note = (
        f"{len(base.prompts)} videos a side, from the same prompts and the same noise; intervals "
        "are 95% paired bootstrap intervals over prompts, and p-values McNemar's exact test."
    )
    title = "Base and tuned generator"
    page = write_report(
        folder / "report.html",
        title=title,
        summary=summary,
        tables=tables,
        video_pairs=pairs,
        notes=[note],
    )
    text = "\n\n".join([f"# {title}", note, *(markdown_table(table) for table in tables)])
    write_whole(folder / "report.md", text + "\n")
    write_whole(folder / "summary.json", json.dumps(plain_numbers(summary), indent=2) + "\n")
    return page


def _spread(count: int, wanted: int) -> list[int]:
    """Up to `wanted` places evenly over `count`."""
    return sorted({index * count // wanted for index in range(wanted)}) if count else []
