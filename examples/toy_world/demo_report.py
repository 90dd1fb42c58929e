"""What the demo shows: summary.json, the page a person opens, and the table of the console."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_rl.charts import BarChart
from diffusion_rl.clips import Clip, judged_clip
from diffusion_rl.comparison import McNemar
from diffusion_rl.evaluation import Measured, audit_table
from diffusion_rl.launch import Run
from diffusion_rl.page import Section, Table, VideoPair, comparison_table, write_page
from diffusion_rl.tracking import METRICS_FILE
from examples.toy_world.demo_curves import hack_section, training_section
from examples.toy_world.demo_evaluation import (
    GUIDANCE,
    JUDGE,
    ORACLE,
    SIDES,
    SUMMARY_MEASURES,
    UNWORLDLY,
    Evaluation,
    fault_rates,
    judge_fault_rates,
)
from examples.toy_world.stored_run import StoredRun, read_curves

PACKAGES = ("torch", "diffusers", "transformers", "peft", "numpy", "cac-reward")
SHOWN_PAIRS = 6
SHOWN_LOSSES = 2


def build_summary(run: Run, evaluation: Evaluation) -> dict[str, Any]:
    """The content of summary.json."""
    measured, videos = evaluation.comparisons(), len(evaluation.base.prompts)
    reduction = evaluation.reduction()
    ends = [None, None] if reduction is None else [reduction.low, reduction.high]
    return {
        "base": {"videos": videos, **{name: measured[name].base for name in SUMMARY_MEASURES}},
        "tuned": {"videos": videos, **{name: measured[name].tuned for name in SUMMARY_MEASURES}},
        "relative_reduction_oracle": None if reduction is None else reduction.value,
        "relative_reduction_oracle_ci95": [_finite(end) for end in ends],
        "with_guidance": {side: dict(rates) for side, rates in evaluation.guided.items()},
        "videos_generated_in_training": run.state.videos_generated,
        "reward_calls": run.state.reward_calls,
        "training_seconds": round(run.state.seconds, 1),
        "peak_memory_mb": round(peak_memory_mb(), 1),
        "seed": run.settings.seed,
        "versions": versions(),
    }


def save_summary(summary: Mapping[str, Any], path: Path) -> None:
    """Write the summary, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def peak_memory_mb() -> float:
    """Most memory this process has held at once; the unit of ru_maxrss differs on macOS."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def result_table(evaluation: Evaluation) -> Table:
    """Base against tuned with intervals, most important first."""
    return comparison_table(
        evaluation.comparisons(),
        title="Before and after",
        percent=("P(clean) by the judge", "P(yes) to the prompt"),
        caption=f"{len(evaluation.base.prompts)} videos a side: the same held-out prompts, the "
        "same noise. Intervals: paired bootstrap over prompts. The oracle tracks pixels, shares "
        "no code with the judge and took no part in training. Pairs: those judged on both sides.",
    )


def table_text(table: Table) -> str:
    """A table for the console."""
    rows = [[str(cell) for cell in row] for row in (table.columns, *table.rows)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(table.columns))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def console_table(evaluation: Evaluation) -> str:
    """The measures of summary.json as text."""
    table = result_table(evaluation)
    shown = [name.replace("_", " ") for name in SUMMARY_MEASURES]
    rows = [row for row in table.rows if row[0] in shown]
    return table_text(Table(title=table.title, columns=table.columns, rows=rows))


def write_demo_page(
    run: Run,
    evaluation: Evaluation,
    summary: Mapping[str, Any],
    stored: Mapping[str, StoredRun | None],
) -> Path:
    """Write report.html.

    Args:
        run: Finished.
        evaluation: Of its generator.
        summary: From `build_summary`.
        stored: `unguarded`, and the name of the row that this run did not use; None where there
            is no such file.
    """
    curves = read_curves(run.output / METRICS_FILE)
    name = run.settings.algorithm.name
    other = next((one for key, one in stored.items() if key != "unguarded" and one), None)
    sections = [
        Section(title="", tables=[result_table(evaluation), _mcnemar(evaluation)]),
        _guided(evaluation),
        _faults(evaluation),
        training_section(name, curves, other),
        _videos(evaluation),
    ]
    if stored.get("unguarded") is not None:
        sections.append(hack_section(stored["unguarded"], curves, summary))  # type: ignore[arg-type]
    sections += [_trust(evaluation), _cost(run, summary)]
    return write_page(
        run.output / "report.html",
        title="A text-to-video generator learns to break less often",
        lead=lead_sentence(run, evaluation, summary),
        summary=summary,
        sections=sections,
    )


def lead_sentence(run: Run, evaluation: Evaluation, summary: Mapping[str, Any]) -> str:
    """What happened, in two sentences."""
    before, after = (summary[side]["anomaly_rate_oracle"] for side in ("base", "tuned"))
    minutes = summary["training_seconds"] / 60
    return (
        f"After {run.state.step} updates of {run.settings.algorithm.name} on the CaC reward "
        f"({summary['videos_generated_in_training']:,} videos, {minutes:.1f} minutes), "
        f"{after:.0%} of the videos break where {before:.0%} did. So says an oracle that tracks "
        f"pixels and took no part in training, on {len(evaluation.base.prompts)} videos of "
        "held-out prompts."
    )


def _guided(evaluation: Evaluation) -> Section:
    """What is left of the gain where guidance has already taken its share."""
    percent = ("anomaly_rate_oracle", "prompt_match")
    rows: list[list[str | float | int]] = []
    for name in evaluation.guided.get("base", {}):
        cells = [evaluation.guided[side][name] for side in SIDES]
        shown = [_percent(cell) if name in percent else f"{cell:.4f}" for cell in cells]
        rows.append([name.replace("_", " "), *shown])
    return Section(
        title="With guidance",
        paragraphs=[
            "Training and the table above sample without classifier-free guidance, which costs "
            f"twice as much. These are the same prompts and noise with guidance {GUIDANCE:g}, by "
            "the oracle: guidance alone mends a part, and the same LoRA adds to it."
        ],
        tables=[Table(title="", columns=["measure", *SIDES], rows=rows)],
    )


def _faults(evaluation: Evaluation) -> Section:
    """By type, as the oracle and as the judge see them."""
    charts = []
    for title, rates in (
        ("Videos with each type of fault, by the oracle", fault_rates),
        ("The same by the CaC judge, which was the reward", judge_fault_rates),
    ):
        base, tuned = rates(evaluation.base), rates(evaluation.tuned)
        charts.append(
            BarChart(
                title=title,
                labels=list(base),
                series={"base": list(base.values()), "tuned": list(tuned.values())},
                percent=True,
            )
        )
    return Section(
        title="Which faults",
        paragraphs=[
            f"A video may have several. {UNWORLDLY.capitalize()}: tinted, patterned, blurred, "
            "empty, or otherwise no clip of moving shapes."
        ],
        charts=charts,
    )


def _mcnemar(evaluation: Evaluation) -> Table:
    return Table(
        title="McNemar's exact test of broken videos",
        columns=["judge", "broken before only", "broken after only", "p"],
        rows=[_test_row(name, test) for name, test in evaluation.tests().items()],
    )


def _test_row(name: str, test: McNemar) -> list[str | float | int]:
    words = {"oracle": "oracle (held out)", "judge": "CaC judge (was the reward)"}
    return [words[name], test.only_base, test.only_tuned, f"{test.p_value:.1e}"]


def choose_pairs(evaluation: Evaluation) -> tuple[list[int], list[int]]:
    """Places of videos to show: broken before (by the oracle), and broken after only.

    The first of each kind, one for each prompt: nobody picked them.
    """
    before, after = (evaluation.values[side]["anomaly_rate_oracle"] > 0 for side in SIDES)
    prompts = evaluation.base.prompts
    found = []
    for wanted, count in ((before, SHOWN_PAIRS), (after & ~before, SHOWN_LOSSES)):
        first = {prompts[place]: place for place in reversed(wanted.nonzero().flatten().tolist())}
        found.append(sorted(first.values())[:count])
    return found[0], found[1]


def _videos(evaluation: Evaluation) -> Section:
    broken_before, broken_after = choose_pairs(evaluation)
    return Section(
        title="Videos before and after",
        paragraphs=[
            f"The first {len(broken_before)} prompts with a video that was broken before "
            f"training, and the first {len(broken_after)} with one that broke only after it; "
            "nobody picked them. Windows, boxes and words are the judge's; the line below them is "
            "the oracle's."
        ],
        video_pairs=[_pair(evaluation, place) for place in (*broken_before, *broken_after)],
    )


def _pair(evaluation: Evaluation, place: int) -> VideoPair:
    return VideoPair(
        prompt=evaluation.base.prompts[place],
        base=_judged(evaluation.base, place, evaluation.fps),
        tuned=_judged(evaluation.tuned, place, evaluation.fps),
    )


def _judged(measured: Measured, place: int, fps: float) -> Clip:
    report = measured.reports[ORACLE][place]
    found = [f"{one.type} at {one.window[0]:.2f}-{one.window[1]:.2f} s" for one in report.findings]
    said = ", ".join([*dict.fromkeys(found), *report.unworldly]) or "nothing wrong"
    followed = "" if report.prompt_followed else "; not what the prompt asks for"
    return judged_clip(
        measured.videos[place].float() / 255,
        fps,
        measured.reports[JUDGE][place],
        note=f"Oracle: {said}{followed}.",
    )


def _trust(evaluation: Evaluation) -> Section:
    """How far judge and oracle can be believed."""
    errors = evaluation.oracle_errors
    missed = errors["miss_rate_by_type"]
    rows: list[list[str | float | int]] = [
        ["right about a clip", _percent(errors["accuracy"])],
        ["sound clips called broken", _percent(errors["false_alarm_rate"])],
        ["broken clips called sound", _percent(errors["miss_rate"])],
        ["overlap of its windows with the truth", _percent(errors["window_iou"])],
        ["prompts of sound clips read as followed", _percent(errors["prompt_match"])],
    ]
    return Section(
        title="How far to believe this",
        tables=[
            Table(
                title="The oracle's own errors",
                columns=["on rendered clips whose faults are known", "rate"],
                rows=rows,
                caption=f"{errors['clips']} rendered clips that no training saw, passed through "
                "the generator's autoencoder.",
            ),
            Table(
                title="Faults it misses, by type",
                columns=["", *missed],
                rows=[["missed", *map(_percent, missed.values())]],
                caption="Not found under their own name; they may still be found under another.",
            ),
            audit_table(evaluation.audit),
        ],
    )


def _cost(run: Run, summary: Mapping[str, Any]) -> Section:
    options = run.settings.rollout
    rows: list[list[str | float | int]] = [
        ["videos drawn in training", summary["videos_generated_in_training"]],
        ["rewards asked for", summary["reward_calls"]],
        ["seconds of training", summary["training_seconds"]],
        ["most memory, MB", summary["peak_memory_mb"]],
        ["updates", run.state.step],
        ["videos an update", options.prompts_per_update * options.videos_per_prompt],
        ["denoising steps", options.num_inference_steps],
        ["guidance", options.guidance_scale],
        ["learning rate", f"{run.settings.optimizer.learning_rate:g}"],
        ["LoRA rank", run.settings.lora.rank],
        ["seed", run.settings.seed],
    ]
    table = Table(title="Cost and settings", columns=["", "this run"], rows=rows)
    return Section(title="", tables=[table])


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}%"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
