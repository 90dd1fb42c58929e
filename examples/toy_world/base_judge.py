"""Where toy judges begin: a stock Qwen3-VL with random weights and the protocol's words.

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
from examples.toy_world.annotated_clips import WHY
from examples.toy_world.judge_folder import build_config, build_processor, build_tokenizer
from examples.toy_world.scales import SCALES, Scale
from examples.toy_world.world import COLOURS, FAULTS, MOTIONS, SHAPES, WorldSettings

PATCH = 8
MOST_TOKENS = 900


def judge_settings(scale: Scale) -> JudgeSettings:
    """How a toy judge is asked: every frame in turn 1, smaller than it is."""
    world = scale.world
    return JudgeSettings(
        wording="brief",
        domain="toy_world",
        scan=ScanSettings(
            fps=world.fps, max_frames=world.num_frames + 3, pixels=scale.scan_side**2
        ),
        inspect=InspectSettings(
            fps=world.fps,
            max_frames=scale.inspect_frames,
            pixels=scale.inspect_side**2,
            margin_seconds=0.25,
        ),
    )


def number_tokens(world: WorldSettings) -> list[str]:
    """Texts that become one token each: time stamps, times and pixel-grid coordinates."""
    times = [f"{frame / world.fps:.2f}" for frame in range(world.num_frames + 1)]
    stamps = [write_time(frame / world.fps) for frame in range(world.num_frames + 1)]
    grid = world.size
    places = sorted({str(round(place * 1000 / grid)) for place in range(grid + 1)}, key=int)
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


def build_base(folder: Path, seed: int = 3, scale: Scale = SCALES["small"]) -> Path:
    """Write the judge with random weights, its processor and how it is asked."""
    tokenizer = build_tokenizer(protocol_corpus(), MOST_TOKENS, number_tokens(scale.world))
    config = build_config(
        tokenizer,
        hidden_size=scale.hidden_size,
        layers=scale.layers,
        heads=scale.heads,
        vision_layers=scale.vision_layers,
        patch_size=PATCH,
    )
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    build_processor(tokenizer, PATCH, 1).save_pretrained(folder)
    judge_settings(scale).save(folder)
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/toy_judge/base"))
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--scale", choices=list(SCALES), default="small")
    options = parser.parse_args(arguments)
    build_base(options.output, options.seed, SCALES[options.scale])


if __name__ == "__main__":
    main()
