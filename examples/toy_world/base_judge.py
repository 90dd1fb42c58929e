"""Where the toy judge begins: a stock Qwen3-VL of 1.4M random weights and the protocol's words.

`python -m examples.toy_world.base_judge --output runs/toy_judge/base`
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Qwen3VLForConditionalGeneration

from cac_reward.answers import write_findings, write_tool_call
from cac_reward.frames import InspectSettings, JudgeSettings, ScanSettings
from cac_reward.questions import (
    ALIGNMENT_CHOICES,
    CLEAN_ANSWER,
    JUDGE_TEXT,
    SCAN_TEXT,
    VERDICT_CHOICES,
    VERDICT_PREFIX,
    alignment_question,
    write_time,
)
from cac_reward.report import Box, Finding, TimeWindow
from cac_reward.training.lesson_kinds import CAPTION_TEXTS, FRAME_TEXTS
from examples.toy_world.annotated_clips import GRID, WHY
from examples.toy_world.judge_folder import build_config, build_processor, build_tokenizer
from examples.toy_world.world import COLOURS, FAULTS, MOTIONS, SHAPES, WorldSettings

PATCH = 8
SCAN_SIDE = 24
INSPECT_SIDE = 32
SETTINGS = JudgeSettings(
    wording="brief",
    domain="toy_world",
    scan=ScanSettings(fps=8.0, max_frames=16, pixels=SCAN_SIDE**2),
    inspect=InspectSettings(fps=8.0, max_frames=8, pixels=INSPECT_SIDE**2, margin_seconds=0.25),
)


def number_tokens(num_frames: int, fps: float) -> list[str]:
    """Texts that become one token each: time stamps, times and pixel-grid coordinates."""
    times = [f"{frame / fps:.2f}" for frame in range(num_frames + 1)]
    stamps = [write_time(frame / fps) for frame in range(num_frames + 1)]
    places = sorted({str(round(place * 1000 / GRID)) for place in range(GRID + 1)}, key=int)
    return stamps + times + places


def protocol_corpus() -> list[str]:
    """Every word the judge reads or says, for its tokenizer."""
    things = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    questions = [
        alignment_question(f"a {colour} {shape} moving {motion} and", "brief")
        for colour, shape in things
        for motion in MOTIONS
    ]
    window, boxes = TimeWindow(0.5, 1.0), (Box(0.5, 0.125, 0.25, 0.5, 0.75),) * 2
    answers = [
        write_findings([Finding(fault, window, boxes, 1, f"{colour} {shape} {WHY[fault]}")])
        for fault in FAULTS
        for colour, shape in things
    ]
    captions = [f"{colour} {shape} [125, 250, 500, 750]; nothing" for colour, shape in things]
    turns = ["user\n", "assistant\n", SCAN_TEXT, JUDGE_TEXT + "\n", CLEAN_ANSWER]
    turns += [*ALIGNMENT_CHOICES, VERDICT_PREFIX + VERDICT_CHOICES[1]]
    turns += [CAPTION_TEXTS["brief"], FRAME_TEXTS["brief"]]
    return questions + answers + captions + [*turns, write_tool_call([window, window])] * 50


def build_base(folder: Path, seed: int = 3) -> Path:
    """Write the judge with random weights, its processor and how it is asked."""
    settings = WorldSettings()
    whole = number_tokens(settings.num_frames, settings.fps)
    tokenizer = build_tokenizer(protocol_corpus(), 700, whole)
    config = build_config(
        tokenizer, hidden_size=128, layers=4, heads=4, vision_layers=2, patch_size=PATCH
    )
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    build_processor(tokenizer, PATCH, 1).save_pretrained(folder)
    SETTINGS.save(folder)
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/toy_judge/base"))
    parser.add_argument("--seed", type=int, default=3)
    options = parser.parse_args(arguments)
    build_base(options.output, options.seed)


if __name__ == "__main__":
    main()
