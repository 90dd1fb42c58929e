"""The model card of a trained judge: what it learnt from, how, and how good it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from cac_reward.training.settings import StageSettings
from cac_reward.whole_files import whole_file

CARD_FILE = "README.md"


def write_card(
    folder: Path,
    stage: StageSettings,
    measured: Mapping[str, float],
    updates: int,
    num_clips: int,
) -> None:
    """Write `README.md` into a judge's folder."""
    shares = ", ".join(f"{name} {share:g}" for name, share in stage.lessons.items())
    rewards = ", ".join(f"{name} {weight:g}" for name, weight in stage.rewards.items())
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        f"base_model: {json.dumps(stage.model.path)}",
        "tags: [cac_reward, video-anomaly, reward-model]",
        "---",
        "# A judge of generated videos",
        "",
        "It scans a clip for suspicious windows, looks again inside them, draws boxes and gives a "
        "verdict. Load it with `cac_reward.CaCScorer.from_pretrained(FOLDER)` or "
        "`cac-reward score --judge FOLDER`.",
        "",
        "## Training",
        "",
        f"* trainer: {stage.trainer}, {updates} updates, seed {stage.seed}",
        f"* from: {stage.model.path}",
        f"* learns: {stage.model.learns}{_lora(stage)}",
        f"* lessons: {shares}",
        *([f"* rewards: {rewards}"] if rewards else []),
        f"* clips: {num_clips} of {', '.join(stage.data.train)}",
        "",
        "## Measured",
        "",
        *_table(stage, measured),
        "",
        "## Limits",
        "",
        "Scores are calibrated only where `cac-reward calibrate` was run on this judge. Footage "
        "unlike what it learnt from may be judged wrongly; measure it on your own clips with "
        "`cac-reward evaluate`.",
        "",
    ]
    with whole_file(folder / CARD_FILE) as opened:
        opened.write("\n".join(lines))


def _lora(stage: StageSettings) -> str:
    lora = stage.model.lora
    return "" if lora is None else f", LoRA rank {lora.rank}, alpha {lora.alpha}"


def _table(stage: StageSettings, measured: Mapping[str, float]) -> list[str]:
    if not measured:
        return ["Nothing: no held-out clips were given."]
    rows = [f"| {name} | {value:.4f} |" for name, value in measured.items()]
    clips = ", ".join(stage.data.held_out)
    return [f"On the first {stage.evaluation.clips} clips of {clips}:", "", "| measure | |"] + [
        "|---|---|",
        *rows,
    ]
