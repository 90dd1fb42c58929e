"""How good a judge is while it learns: held-out clips, judged as users will judge them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from peft import PeftModel

from cac_reward.data.annotations import AnnotatedClip
from cac_reward.evaluation.measuring import Evaluation, evaluate
from cac_reward.evaluation.pairing import Pair, Pairing
from cac_reward.evaluation.predictions import Prediction
from cac_reward.judges.local import LocalJudge
from cac_reward.records import ClipRecord
from cac_reward.scorer import CaCScorer
from cac_reward.training.asking import Asking, ask, to_prediction, with_answers
from cac_reward.training.classifier import Classifier
from cac_reward.training.clips import ClipStore
from cac_reward.training.models import Pupil
from cac_reward.training.processes import processes
from cac_reward.video import Video

LOGGED = (
    *("clip.accuracy", "clip.balanced_accuracy", "clip.f1", "clip.roc_auc"),
    *("clip.average_precision", "clip.calibration_error", "frame.roc_auc"),
    *("time.mean_iou", "time.recall_at_0.5", "time.effective_f1"),
    *("space.box_mean_iou", "space.tube_mean_iou", "space.invalid_box_rate"),
    *("question.accuracy_of_all", "class.accuracy"),
)
"""Measures worth a line while training; `cac-reward evaluate` has all."""
LOWER_IS_BETTER = ("clip.calibration_error", "space.invalid_box_rate")
CHOOSING = tuple(name for name in LOGGED if name not in LOWER_IS_BETTER)
"""Measures that the best judge can be chosen by."""


def check_choosing(best: str) -> None:
    """Raises ValueError unless the best judge can be chosen by a measure."""
    if best not in CHOOSING:
        raise ValueError(f"evaluation.best must be one of {', '.join(CHOOSING)}, got {best!r}")


@dataclass(eq=False)
class HeldOut:
    """The first clips of held-out annotations, and how the judge is asked about them.

    Args:
        store: the clips.
        count: most of them.
        batch: judged together.
        mode: of the two turns.
        turns: whether the two turns are asked.
        asking: tasks of one turn; their options and classes are measured beside the two turns'
            verdicts and places, or in place of these.
        heads: whether the heads answer, without a word.
    """

    store: ClipStore
    count: int
    batch: int
    mode: str = "full"
    turns: bool = True
    asking: Asking | None = None
    heads: bool = False

    def measure(self, model: Any, pupil: Pupil, *, spread: bool = True) -> dict[str, float]:
        """Judge, and return what was measured by name; 'unjudged' is the share without a score.

        What no answer lets measure is left out.

        Args:
            model: whole weights, or peft's model around them.
            pupil: how it is asked.
            spread: each process judges its part of the clips; else each judges all of them.
        """
        measured = self.evaluation(model, pupil, spread=spread)
        found = {one.name: one.estimate.value for one in measured.measurements}
        kept = {name: found[name] for name in LOGGED if not math.isnan(found.get(name, math.nan))}
        failed = measured.counts["not judged: answer not usable"]
        pairs = measured.counts["with a prediction"]
        return {**kept, "unjudged": failed / max(1, pairs)}

    def evaluation(self, model: Any, pupil: Pupil, *, spread: bool = True) -> Evaluation:
        """Everything that `evaluate` measures, without intervals; the same on every process.

        The model is left in the mode, and all random generators in the state, in which they were.
        """
        training = model.training
        python, numpy = random.getstate(), np.random.get_state()
        model.eval()
        try:
            with torch.random.fork_rng(_gpus(model)), torch.no_grad():
                pairs = self._judge(model, pupil, spread)
        finally:
            model.train(training)
            random.setstate(python)
            np.random.set_state(numpy)
        return evaluate(Pairing(tuple(pairs), (), ()), draws=0)

    def _judge(self, model: Any, pupil: Pupil, spread: bool) -> list[Pair]:
        core = model.get_base_model() if isinstance(model, PeftModel) else model
        judge = LocalJudge(core, pupil.processor, judge_id=pupil.name, settings=pupil.settings)
        inspector: CaCScorer | Classifier | None = None
        if self.heads and pupil.heads is not None:
            own = (core, pupil.processor, pupil.heads, pupil.settings, pupil.name)
            inspector = Classifier(*own)
        elif self.turns:
            inspector = CaCScorer(judge, mode=self.mode, clips_at_once=self.batch)
        state = processes()
        part = slice(state.process_index, None, state.num_processes) if spread else slice(None)
        numbers = list(range(min(self.count, len(self.store))))[part]
        judged: list[tuple[int, Pair]] = []
        for first in range(0, len(numbers), self.batch):
            some = numbers[first : first + self.batch]
            judged += zip(some, self._judge_some(judge, inspector, some), strict=True)
        if spread:
            judged = gather_object(judged)
        return [pair for _, pair in sorted(judged, key=itemgetter(0))]

    def _judge_some(
        self,
        judge: LocalJudge,
        inspector: CaCScorer | Classifier | None,
        numbers: Sequence[int],
    ) -> list[Pair]:
        clips: list[AnnotatedClip] = [self.store.annotation(number) for number in numbers]
        videos: dict[int, Video] = {}
        found: dict[int, Prediction] = {}
        for row, (number, clip) in enumerate(zip(numbers, clips, strict=True)):
            try:
                videos[row] = self.store.video(number, clip)
            except (ValueError, OSError) as error:
                found[row] = Prediction(failure=str(error))
        rows, shown = list(videos), list(videos.values())
        said: list[Prediction] = []
        if inspector is not None:
            for row, report in zip(rows, inspector.inspect(shown), strict=True):
                name, video = clips[row].name, videos[row]
                record = ClipRecord(
                    path=name, width=video.width, height=video.height, report=report
                )
                said.append(Prediction.from_record(record))
        if self.asking is not None:
            answers = ask(judge, self.asking, [clips[row] for row in rows], shown)
            more = [
                to_prediction(one, judge.name, video)
                for one, video in zip(answers, shown, strict=True)
            ]
            said = [with_answers(*pair) for pair in zip(said, more, strict=True)] if said else more
        found |= zip(rows, said, strict=True)
        return [Pair(clip, found[row]) for row, clip in enumerate(clips)]


def _gpus(model: Any) -> list[int]:
    """GPUs whose random state judging may move: the model's own."""
    device = next(model.parameters()).device
    return [device.index] if device.type == "cuda" else []
