"""The model card of what a run made: README.md beside the weights, with nothing of whose machine.

Folders, addresses and secrets of the settings are left out; the license is the user's to choose.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_rl.configuration import RunSettings
from diffusion_rl.generators.base import SECOND_LORA_FILE
from diffusion_rl.generators.families import FAMILIES
from diffusion_rl.page import Table, markdown_table
from diffusion_rl.progress import FinetuneState
from diffusion_rl.rewards import RewardSettings
from diffusion_rl.weight_files import COMPONENTS
from diffusion_rl.whole_files import write_whole

CARD = "README.md"
BEGIN, END = "<!-- evaluation -->", "<!-- end of evaluation -->"
NOT_MEASURED = "Not measured yet; `python -m diffusion_rl evaluate` puts its tables here."
SECRET = re.compile(r"(^|_)(key|token|secret|password)$", re.IGNORECASE)


def write_card(folder: Path, settings: RunSettings, state: FinetuneState, prompts: int) -> Path:
    """Write the card of a finished run in one step; an earlier one there is replaced.

    Args:
        folder: of the weights, made by `save_result`.
        settings: of the run.
        state: at its end.
        prompts: how many it was trained on.
    """
    base = public(settings.generator.path)
    parts = [
        _head(settings, base),
        f"# {settings.algorithm.name} fine-tuning of {base}",
        f"Made by `diffusion_rl` from {base} (`{FAMILIES[settings.generator.family].pipeline}`), "
        f"{settings.generator.num_frames} frames of {settings.generator.width} x "
        f"{settings.generator.height} pixels at {settings.generator.fps:g} frames per second. "
        f"{_learner(settings)}",
        "## Load it",
        _loading(folder, settings, base),
        "## Rewards",
        _rows(
            ("reward", "callable", "weight", "options"),
            [
                (one.name, _target(one), f"{one.weight:g}", _options(one.options))
                for one in settings.rewards
            ],
        ),
        "## Training",
        _rows(("setting", "value"), [*_settings(settings)]),
        "## Cost",
        _cost(state, prompts),
        "## Evaluation",
        f"{BEGIN}\n{NOT_MEASURED}\n{END}",
    ]
    return write_whole(folder / CARD, "\n\n".join(parts) + "\n")


def card_says(folder: Path, state: FinetuneState, prompts: int) -> bool:
    """Whether there is a card of a run that came as far, at the same cost; as `write_card`."""
    path = folder / CARD
    return path.is_file() and _cost(state, prompts) in path.read_text(encoding="utf-8")


def update_card(folder: Path, tables: Sequence[Table], note: str) -> Path:
    """Put an evaluation's tables into the card of a folder; the rest of it stays as it is.

    Args:
        folder: of the weights; without a card it gets one of the tables alone.
        tables: of the evaluation.
        note: how it was measured.
    """
    path = folder / CARD
    inside = "\n\n".join([note, *(f"#{markdown_table(table)}" for table in tables)])
    section = f"{BEGIN}\n{inside}\n{END}"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        return write_whole(path, before + section + after)
    heading = f"{text.rstrip()}\n\n" if text.strip() else ""
    return write_whole(path, f"{heading}## Evaluation\n\n{section}\n")


def public(value: Any) -> str:
    """A setting as a stranger may read it: no folders, no addresses."""
    text = str(value)
    if "://" in text:
        return "(an address)"
    if text[:1] in ("/", "~", ".", "\\") or text[1:3] == ":\\" or os.path.exists(text):
        return "(a local folder)" if not os.path.isfile(text) else "(a local file)"
    return text


def _head(settings: RunSettings, base: str) -> str:
    """The lines that model hubs read."""
    lines = ["---", "# license: yours to choose; that of the base model binds it too"]
    if base == settings.generator.path:
        lines.append(f"base_model: {json.dumps(base)}")
    lines += ["library_name: diffusers", "pipeline_tag: text-to-video", "tags:"]
    tags = ["text-to-video", "reinforcement-learning", settings.algorithm.name]
    tags += [] if settings.full else ["lora"]
    return "\n".join([*lines, *(f"- {tag}" for tag in tags), "---"])


def _learner(settings: RunSettings) -> str:
    if settings.lora is None:
        return "The transformer's own weights were trained."
    targets = ", ".join(f"`{target}`" for target in settings.lora.targets or ())
    return f"A LoRA of rank {settings.lora.rank} and alpha {settings.lora.alpha:g} on {targets}."


def _loading(folder: Path, settings: RunSettings, base: str) -> str:
    """The lines that load it in stock diffusers."""
    family = FAMILIES[settings.generator.family]
    name = base if base == settings.generator.path else "BASE_MODEL"
    if settings.full:
        found = [one for one in COMPONENTS.values() if (folder / one).is_dir()]
        lines = [f"from diffusers import {family.pipeline}, {family.transformer}", ""]
        lines += [
            f'{one} = {family.transformer}.from_pretrained("THIS_FOLDER", subfolder="{one}")'
            for one in found
        ]
        given = ", ".join(f"{one}={one}" for one in found)
        lines.append(f'pipeline = {family.pipeline}.from_pretrained("{name}", {given})')
        return _code(lines)
    lines = [f"from diffusers import {family.pipeline}", ""]
    lines.append(f'pipeline = {family.pipeline}.from_pretrained("{name}")')
    for file in COMPONENTS:
        if not (folder / file).is_file():
            continue
        if settings.generator.family == "hunyuan1.5":  # Its pipeline has no LoRA loader.
            call = "pipeline.transformer.load_lora_adapter"
        else:
            call = "pipeline.load_lora_weights"
        second = ", load_into_transformer_2=True" if file == SECOND_LORA_FILE else ""
        weight = f', weight_name="{file}"' if second or call.endswith("adapter") else ""
        lines.append(f'{call}("THIS_FOLDER"{weight}{second})')
    return _code(lines)


def _code(lines: Sequence[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


def _settings(settings: RunSettings) -> list[tuple[str, str]]:
    """What of the settings says how it was trained, by its place in the YAML."""
    found = []
    for part in ("algorithm", "credit", "rollout", "optimizer"):
        for name, value in dataclasses.asdict(getattr(settings, part)).items():
            found.append((f"`{part}.{name}`", _cell(value)))
    for guard in settings.guards or ():
        found.append((f"`guards` {guard.statistic}", f"weight {guard.weight:g}"))
    return [*found, ("`seed`", str(settings.seed))]


def _cost(state: FinetuneState, prompts: int) -> str:
    return _rows(
        ("what", "figure"),
        [
            ("updates", f"{state.step:,}"),
            ("prompts", f"{prompts:,}"),
            ("videos generated", f"{state.videos_generated:,}"),
            ("videos judged", f"{state.reward_calls:,}"),
            ("seconds", f"{state.seconds:,.0f}"),
        ],
    )


def _target(reward: RewardSettings) -> str:
    return "(a server)" if reward.where == "http" else f"`{reward.target}`"


def _options(options: Mapping[str, Any]) -> str:
    shown = [
        f"{name}={'(hidden)' if SECRET.search(name) else _cell(value)}"
        for name, value in options.items()
    ]
    return ", ".join(shown)


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + _options(value) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_cell, value)) + "]"
    return public(value)


def _rows(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, [":--"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
        for line in lines
    )
