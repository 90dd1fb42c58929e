"""How good a judge is while it learns: held-out clips, judged as users will judge them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cac_reward.data.annotations import AnnotatedClip
from cac_reward.evaluation.measuring import Evaluation, evaluate
from cac_reward.evaluation.pairing import Pair, Pairing
from cac_reward.evaluation.predictions import Prediction
from cac_reward.judges.local import LocalJudge
from cac_reward.records import ClipRecord
from cac_reward.scorer import CaCScorer
from cac_reward.training.clips import ClipStore
from cac_reward.training.models import Pupil
from cac_reward.video import Video

LOGGED = (
    *("clip.accuracy", "clip.balanced_accuracy", "clip.f1", "clip.roc_auc"),
    *("clip.average_precision", "clip.calibration_error", "frame.roc_auc"),
    *("time.mean_iou", "time.recall_at_0.5", "time.effective_f1"),
    *("space.box_mean_iou", "space.tube_mean_iou", "space.invalid_box_rate"),
)
"""Measures worth a line while training; `cac-reward evaluate` has all."""


@dataclass(eq=False)
class HeldOut:
    """The first clips of held-out annotations.

    Args:
        store: the clips.
        count: most of them.
        batch: judged together.
    """

    store: ClipStore
    count: int
    batch: int
    mode: str = "full"

    def measure(self, model: Any, pupil: Pupil) -> dict[str, float]:
        """Judge, and return what was measured by name; 'unjudged' is the share without a score."""
        measured = self.evaluation(model, pupil)
        found = {one.name: one.estimate.value for one in measured.measurements}
        kept = {name: found[name] for name in LOGGED if not math.isnan(found.get(name, math.nan))}
        failed = measured.counts["not judged: answer not usable"]
        pairs = measured.counts["with a prediction"]
        return {**kept, "unjudged": failed / max(1, pairs)}

    def evaluation(self, model: Any, pupil: Pupil) -> Evaluation:
        """Everything that `evaluate` measures, without intervals."""
        training = model.training
        model.eval()
        # Checkpointing turns the key-value cache off, which judging needs.
        checkpointed = bool(getattr(model, "is_gradient_checkpointing", False))
        if checkpointed:
            model.gradient_checkpointing_disable()
        try:
            with torch.no_grad():
                pairs = self._judge(model, pupil)
        finally:
            if checkpointed:
                model.gradient_checkpointing_enable()
            model.train(training)
        return evaluate(Pairing(tuple(pairs), (), ()), draws=0)

    def _judge(self, model: Any, pupil: Pupil) -> list[Pair]:
        core = model.get_base_model() if hasattr(model, "get_base_model") else model
        judge = LocalJudge(core, pupil.processor, judge_id=pupil.name, settings=pupil.settings)
        scorer = CaCScorer(judge, mode=self.mode, clips_at_once=self.batch)
        pairs: list[Pair] = []
        numbers = list(range(min(self.count, len(self.store))))
        for first in range(0, len(numbers), self.batch):
            pairs += self._judge_some(scorer, numbers[first : first + self.batch])
        return pairs

    def _judge_some(self, scorer: CaCScorer, numbers: Sequence[int]) -> list[Pair]:
        clips: list[AnnotatedClip] = [self.store.annotation(number) for number in numbers]
        videos: list[Video | None] = []
        reasons: list[str] = []
        for number, clip in zip(numbers, clips, strict=True):
            try:
                videos.append(self.store.video(number, clip))
                reasons.append("")
            except (ValueError, OSError) as error:
                videos.append(None)
                reasons.append(str(error))
        readable = [video for video in videos if video is not None]
        reports = iter(scorer.inspect(readable))
        records = [
            ClipRecord(path=clip.name, error=reason)
            if video is None
            else ClipRecord(
                path=clip.name, width=video.width, height=video.height, report=next(reports)
            )
            for clip, video, reason in zip(clips, videos, reasons, strict=True)
        ]
        return [
            Pair(clip, Prediction.from_record(record))
            for clip, record in zip(clips, records, strict=True)
        ]
