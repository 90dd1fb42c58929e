"""A judge's classifier at work: P(anomalous) of clips and of their frames in one pass, no words.

Axes: F frames of a clip, K frames shown, C channels (3), H height, W width.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cac_reward.data.annotations import AnnotatedClip
from cac_reward.frames import JudgeSettings
from cac_reward.inputs import Clip, check_prompts, open_clip
from cac_reward.judges.families import find_family
from cac_reward.judges.loading import LoadOptions, find_files, load
from cac_reward.report import UNSPECIFIED, AnomalyReport, Finding, TimeWindow
from cac_reward.training.encoding import Encoder
from cac_reward.training.heads import HEADS_FILE, ClassifierHeads, attach_heads
from cac_reward.training.lessons import ClipInView, Lesson, LessonOptions, View, Words

DECODER = "heads"
"""How its verdicts were chosen, in reports."""


@dataclass(frozen=True, eq=False)
class Classified:
    """What the heads say of one clip."""

    p_anomalous: float
    """Of the clip, in [0, 1]."""
    indices: tuple[int, ...]
    """Frames that were shown."""
    frames: Tensor
    """[K] P(a fault is on) in each of them."""

    def windows(self, num_frames: int, fps: float, threshold: float = 0.5) -> list[TimeWindow]:
        """Stretches in which a fault is likelier than the threshold; each frame shown stands for
        the time until the next."""
        ends = (*self.indices[1:], num_frames)
        found: list[TimeWindow] = []
        for start, end, chance in zip(self.indices, ends, self.frames.tolist(), strict=True):
            if chance <= threshold:
                continue
            first = start / fps
            if found and found[-1].end_seconds >= first:
                first = found.pop().start_seconds
            found.append(TimeWindow(first, end / fps))
        return found


class Classifier:
    """The heads of a trained judge (VANGUARD's first stage).

    Args:
        model: transformers' model.
        processor: its processor.
        heads: attached to the model.
        settings: how the judge is asked.
        name: of the judge, for reports.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        heads: ClassifierHeads,
        settings: JudgeSettings,
        name: str,
    ) -> None:
        family = find_family(model.config.model_type)
        self.model, self.heads, self.settings, self.name = model, heads, settings, name
        self._encoder = Encoder(processor, family)
        self._view = View(settings, family, self._encoder.renderer.patch_factor)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        attention: str = "sdpa",
    ) -> Classifier:
        """Load the judge of a stage that trained heads.

        Raises:
            FileNotFoundError: If there is no such judge, or it has no heads.
            ValueError: If its files are damaged.
        """
        files = find_files(folder)
        options = LoadOptions(device=device, dtype=dtype, attention=attention)
        model, processor = load(files, options)
        heads = attach_heads(model)
        if not heads.restore(files.folder):
            raise FileNotFoundError(
                f"judge must have {HEADS_FILE}, got none in {files.folder}; train a stage with "
                "loss.clip or loss.frames above 0"
            )
        heads.requires_grad_(False)
        known = JudgeSettings.load(files.settings_folder)
        return cls(model, processor, heads, known, files.judge_id)

    @torch.inference_mode()
    def classify(self, frames: Tensor, fps: float) -> Classified:
        """One clip: frames [F 3 H W] uint8, or float in [0, 1], at least two."""
        if frames.is_floating_point():
            frames = (frames * 255).round().to(torch.uint8)
        clip = AnnotatedClip(path="clip")
        dice = np.random.default_rng(0)
        seen = ClipInView(clip, frames, fps, self._view, LessonOptions(), dice)
        indices, opening = seen.scan()
        lesson = Lesson((*opening, Words.shown("")), self._view.tools, seen.labels(indices))
        batch = self._encoder.collate(self._encoder.encode(lesson))
        text = ("input_ids", "attention_mask", "mm_token_type_ids")
        shown = ("pixel_values", "image_grid_thw")
        device = self.model.device
        self.heads.watch(batch["frame_ends"].to(device))
        self.model(**{name: batch[name].to(device) for name in (*text, *shown)}, logits_to_keep=1)
        by_frame, by_clip = self.heads.take()
        return Classified(
            torch.sigmoid(by_clip.float())[0].item(),
            tuple(indices),
            torch.sigmoid(by_frame.float()).cpu(),
        )

    def inspect(
        self,
        videos: Sequence[Clip],
        prompts: Sequence[str] | None = None,
        *,
        fps: float | None = None,
        threshold: float = 0.5,
    ) -> list[AnomalyReport]:
        """Reports as a scorer gives them: windows without types, boxes or reasons.

        Args:
            videos: clips of any sizes and lengths, as for `CaCScorer.inspect`.
            prompts: what each was generated from; None where it is not known.
            fps: frames per second; needed for arrays and pictures.
            threshold: of frames, above which a fault is taken to be on.
        """
        prompts = [""] * len(videos) if prompts is None else prompts
        check_prompts(prompts, len(videos))
        reports = []
        for video, prompt in zip(videos, prompts, strict=True):
            frames, rate = open_clip(video, fps)
            began = time.perf_counter()
            found = self.classify(frames, rate)
            windows = found.windows(len(frames), rate, threshold)
            reports.append(
                AnomalyReport(
                    score=1 - found.p_anomalous,
                    judge_id=self.name,
                    decoder=DECODER,
                    attention=self.model.config._attn_implementation,
                    fps=rate,
                    num_frames=len(frames),
                    findings=tuple(Finding(UNSPECIFIED, window) for window in windows),
                    windows=tuple(windows),
                    scan_frames=found.indices,
                    prompt=prompt,
                    timings={"scan": time.perf_counter() - began},
                )
            )
        return reports
