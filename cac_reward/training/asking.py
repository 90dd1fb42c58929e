"""A judge asked the tasks of one turn, VAU-R1's and SRVAU-R1's: its answers as predictions.

An answer is read as strictly as rewards read it; what breaks the form is a failure, not a guess,
but for an answer without the reflection that was asked for, which rewards take, too. A
grounding's verdict is a bare one: P(clean) is 0 where it names windows and 1 where it says that
there are none.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cac_reward.data.annotations import AnnotatedClip
from cac_reward.evaluation.predictions import Prediction
from cac_reward.evaluation.tasks import NORMAL
from cac_reward.judges.base import AbstractJudge
from cac_reward.report import UNSPECIFIED, Finding
from cac_reward.training.lesson_kinds import open_task, task_of
from cac_reward.training.lessons import ClipInView, LessonOptions, View
from cac_reward.training.rollouts import TaskRollout, read_task_rollout
from cac_reward.training.task_answers import KINDS
from cac_reward.video import Video


@dataclass(frozen=True, kw_only=True)
class Asking:
    """What is asked of every clip, and how."""

    kinds: tuple[str, ...]
    """Of `task_answers.KINDS`, at least one, each once."""
    options: LessonOptions = LessonOptions(written=False)
    """Of which `thinking` and `reflection` are taken, from a half on as all; where answers are
    taught (`written`) a clip that lacks thoughts is asked without them, as it would be taught."""
    classes: tuple[str, ...] = ()
    """Of 'classification', at least two."""
    max_new_tokens: int = 1024
    """Of an answer, at least 1."""

    def __post_init__(self) -> None:
        if not self.kinds or len(set(self.kinds)) != len(self.kinds):
            raise ValueError(f"kinds must be at least one, each once, got {list(self.kinds)}")
        for kind in self.kinds:
            if kind not in KINDS:
                raise ValueError(f"kinds must be of {', '.join(KINDS)}, got {kind!r}")
        if ("classification" in self.kinds) != bool(self.classes):
            raise ValueError(
                "classes must be given exactly where kinds has 'classification', got "
                f"{list(self.classes)} with {list(self.kinds)}"
            )
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")

    @property
    def fixed(self) -> LessonOptions:
        """The options without chance in them."""
        shares = (self.options.thinking, self.options.reflection)
        thinking, reflection = (float(share >= 0.5) for share in shares)
        return replace(self.options, thinking=thinking, reflection=reflection)


@dataclass(frozen=True)
class Answers:
    """What a judge answered on one clip."""

    rollouts: Mapping[str, TaskRollout]
    """By kind; a clip without a question is not asked it."""
    texts: Mapping[str, str]
    """By kind, as they were written."""
    seconds: float
    """Its part of the time of all that were asked together."""


def ask(
    judge: AbstractJudge, asking: Asking, clips: Sequence[AnnotatedClip], videos: Sequence[Video]
) -> list[Answers]:
    """Ask every task of every clip, all clips of one task together.

    Args:
        judge: Any; greedy, or as it samples.
        asking: Which tasks.
        clips: B annotations: the questions, and which options there are. What they say of the
            truth is not shown.
        videos: B, of these clips.
    """
    began = time.perf_counter()
    view = View(judge.settings, judge.family, judge.patch_factor, asking.classes)
    dice = np.random.default_rng(0)
    seen = [
        ClipInView(clip, video.frames, video.fps, view, asking.fixed, dice)
        for clip, video in zip(clips, videos, strict=True)
    ]
    rollouts: list[dict[str, TaskRollout]] = [{} for _ in seen]
    texts: list[dict[str, str]] = [{} for _ in seen]
    for kind in asking.kinds:
        rows = [row for row, one in enumerate(seen) if kind != "qa" or has_question(one.clip)]
        if not rows:
            continue
        tasks = [task_of(kind, seen[row]) for row in rows]
        opened = [open_task(task, seen[row])[1] for task, row in zip(tasks, rows, strict=True)]
        written = judge.generate(opened, max_new_tokens=asking.max_new_tokens)
        for row, task, text in zip(rows, tasks, written, strict=True):
            texts[row][kind] = text
            rollouts[row][kind] = read_task_rollout(
                text, seen[row].clip, task, duration_seconds=seen[row].seconds
            )
    each = (time.perf_counter() - began) / max(1, len(seen))
    return [Answers(*one, each) for one in zip(rollouts, texts, strict=True)]


def has_question(clip: AnnotatedClip) -> bool:
    """Whether 'qa' can be asked of it."""
    return clip.question is not None and bool(clip.options)


def to_prediction(answers: Answers, judge: str, video: Video) -> Prediction:
    """The answers on a clip as measures read them."""
    found = Prediction(
        judge=f"{judge} ({', '.join(answers.rollouts)})" if answers.rollouts else None,
        fps=video.fps,
        num_frames=len(video.frames),
        seconds=answers.seconds,
        boxes_asked=False,
        types_asked=False,
    )
    # A grounding's verdict counts before that of a class.
    order = sorted(answers.rollouts, key=lambda kind: kind == "grounding")
    for kind in order:
        found = _with(found, kind, answers.rollouts[kind])
    return found


def with_answers(known: Prediction, more: Prediction) -> Prediction:
    """A judge's verdict and places with what it answered to tasks beside them."""
    return replace(
        known,
        option=more.option,
        category=more.category,
        text=known.text if more.text is None else more.text,
        failure=known.failure or more.failure,
    )


def _with(found: Prediction, kind: str, rollout: TaskRollout) -> Prediction:
    if kind == "grounding":
        found = replace(found, located=True)
    if rollout.answer is None:
        return replace(found, failure=found.failure or rollout.error)
    value = rollout.answer.value
    if isinstance(value, tuple):
        findings = tuple(Finding(UNSPECIFIED, window) for window in value)
        return replace(found, findings=findings, p_clean=float(not value))
    if kind == "qa":
        return replace(found, option=value)
    if kind == "classification":
        return replace(found, category=value, p_clean=_p_clean(value, rollout.task.classes))
    why = rollout.answer.final.thinking
    lines = [f"Description: {value}", *([] if why is None else [f"Analysis: {why}"])]
    return replace(found, text="\n".join(lines))


def _p_clean(category: str, classes: Iterable[str]) -> float | None:
    """1 for the class of clean clips, 0 for another; None where no class is that."""
    clean = [name for name in classes if name.strip().lower() == NORMAL]
    return float(category in clean) if clean else None
