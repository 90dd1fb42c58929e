"""Sample videos of a run: the same prompts and noise every few updates, with what the judge sees.

Axes: B videos, F frames, C channels, H height, W width.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_rl.clips import Clip, draw_clip, judged_clip, tint_blame
from diffusion_rl.generators.base import AbstractVideoGenerator, PromptEmbeddings
from diffusion_rl.policies import saved_policy
from diffusion_rl.rewards import Judgement, Reward, ask_rewards
from diffusion_rl.rollout import RolloutSettings, rollout
from diffusion_rl.tracking import write_video

SAMPLES = "samples"
INDEX = "samples.json"
FORMATS = ("mp4", "webp")


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Videos to look at while the run goes on; they take no part in it."""

    prompts: tuple[str, ...]
    """What they show, at least one text."""
    every: int = 10
    """Updates between them, at least 1."""
    seeds: tuple[int, ...] = (0,)
    """Of their noise: a video of each prompt from each; at least one, each in [0, 2^31)."""
    format: str = "mp4"
    """mp4 (H.264) or webp (lossless)."""

    def __post_init__(self) -> None:
        if not self.prompts or not all(text.strip() for text in self.prompts):
            raise ValueError(f"prompts must be at least one text, got {list(self.prompts)}")
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")
        if not self.seeds or not all(0 <= seed < 1 << 31 for seed in self.seeds):
            raise ValueError(f"seeds must be at least one in [0, 2^31), got {list(self.seeds)}")
        if self.format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {self.format}")


@dataclass(frozen=True)
class Sample:
    """One sample video as it is shown."""

    name: str
    """Of its file, without the ending: the same for the same prompt and seed."""
    path: Path
    """Where it is."""
    video: Tensor
    """[F 3 H W] in [0, 1], with boxes and a time line, or with blame tinted red."""


def write_samples(
    generator: AbstractVideoGenerator,
    rewards: Sequence[Reward],
    settings: SampleSettings,
    embeddings: PromptEmbeddings,
    options: RolloutSettings,
    folder: Path,
) -> list[Sample]:
    """Draw, judge and write the samples of one update, in one step; those there are replaced.

    Nothing of the run changes: the noise has its own seeds, and the steps are deterministic.

    Args:
        generator: with what learns; the policy that is saved draws.
        rewards: of the run; each sees the samples too.
        settings: which samples.
        embeddings: of the settings' prompts, a row for each.
        options: how the run samples: steps, guidance, micro batch.
        folder: of this update's samples.
    """
    places = [(index, seed) for index in range(len(settings.prompts)) for seed in settings.seeds]
    index, seeds = torch.tensor([place for place, _ in places]), [seed for _, seed in places]
    texts = [settings.prompts[place] for place, _ in places]
    with saved_policy(generator.transformer):
        videos = rollout(generator, embeddings, index, seeds, options).videos
    answers = ask_rewards(rewards, videos, texts, fps=generator.fps).answers()
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    samples, entries = [], []
    for row, (place, seed) in enumerate(places):
        name = f"{place:02d}-seed{seed}"
        shown = draw_sample(videos[row], generator.fps, answers, row)
        file = f"{name}.{settings.format}"
        write_video(partial / file, shown, generator.fps)
        samples.append(Sample(name, folder / file, shown))
        scores = {name: _number(one.score[row]) for name, one in answers.items()}
        entries.append({"file": file, "prompt": texts[row], "seed": seed, "scores": scores})
    index_text = json.dumps(entries, indent=2, ensure_ascii=False)
    (partial / INDEX).write_text(index_text + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return samples


def draw_sample(video: Tensor, fps: float, answers: Mapping[str, Judgement], row: int) -> Tensor:
    """A video [F C H W] with the boxes of the first report that can be read, else tinted blame.

    A report that says why its reward could not judge holds no boxes, so it is none to read.

    Args:
        video: float in [0, 1].
        fps: frames per second.
        answers: of the rewards, by name.
        row: which of their videos this is.

    Returns:
        [F 3 H W] float32 in [0, 1], small ones enlarged, with a time line.
    """
    for one in answers.values():
        report = one.reports[row] if one.reports is not None else None
        if report is not None and hasattr(report, "to_dict"):
            report = report.to_dict()
        if isinstance(report, Mapping) and not report.get("error"):
            return draw_clip(judged_clip(video, fps, report))
    for one in answers.values():
        if one.blame is not None:
            return draw_clip(Clip(tint_blame(video, one.blame[row]), fps))
    return draw_clip(Clip(video.float().cpu(), fps))


def step_folder(output: Path, step: int) -> Path:
    """Where the samples of an update are."""
    return output / SAMPLES / f"step-{step:06d}"


def _number(score: Tensor) -> Any:
    value = float(score)
    return value if math.isfinite(value) else None
