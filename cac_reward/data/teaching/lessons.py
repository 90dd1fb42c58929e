"""From clip to questions: what a recipe asks, and how the answers become fields of the clip.

    vanguard    each sub-clip, with what is annotated in it -> scene, events, findings, reasoning
    srvau       the clip alone -> first answer; with the annotation -> reflection, revised answer

Sources: VANGUARD (arXiv:2605.02912) and SRVAU-R1 (arXiv:2602.01004) describe these steps; their
wording and forms are not public, so these are ours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cac_reward.data.annotations import AnnotatedClip
from cac_reward.data.lines import write_record
from cac_reward.data.teaching.settings import TYPES, TeachSettings
from cac_reward.data.teaching.stretches import Stretch, check_times, cut, even_frames, open_clip
from cac_reward.frames import frame_times, resize_to_budget
from cac_reward.questions import Message
from cac_reward.report import UNSPECIFIED
from cac_reward.video import Video

Answer = Mapping[str, Any]
Ask = Callable[["Question"], Answer]
"""Gives the accepted answer, old or new; what it raises ends the job."""


@dataclass(frozen=True)
class Question:
    """One question with everything that its answer must be."""

    step: str
    """Name within the clip, for example 'part 3'."""
    messages: tuple[Message, ...]
    schema: Mapping[str, Any]
    """JSON Schema of the answer."""
    check: Callable[[Answer], None]
    """Raises RejectedAnswerError for an answer that fits the schema and must not be kept."""


@dataclass(frozen=True)
class Job:
    """Questions of which each needs the answer to the one before."""

    run: Callable[[Ask], dict[str, Answer]]
    """Gives the answers by step."""


@dataclass(frozen=True)
class Lesson:
    """A clip that is ready to be asked about."""

    clip: AnnotatedClip
    video: Video
    stretches: tuple[Stretch, ...]
    settings: TeachSettings

    @classmethod
    def open(
        cls, clip: AnnotatedClip, root: Path, settings: TeachSettings, seconds: float | None
    ) -> Lesson:
        """Decode a clip and cut it.

        Args:
            clip: The annotation.
            root: Folder of the videos.
            settings: What is asked.
            seconds: Longest stretch; None for the whole clip.

        Raises:
            FileNotFoundError, ValueError: If there is no readable video, or the annotation ends
                after it.
        """
        video = open_clip(clip, root)
        check_times(clip, video)
        stretches = cut(clip, video.num_frames, video.fps, seconds)
        return cls(clip, video, tuple(stretches), settings)

    def frames(self, indices: Sequence[int]) -> tuple[Tensor, list[float]]:
        """Frames as they are shown, [K 3 H W] in [0, 1], and their times; never enlarged."""
        pixels = min(self.settings.pixels, self.video.height * self.video.width)
        shown = resize_to_budget(self.video.to_float(indices), pixels, factor=1)
        return shown, frame_times(indices, self.video.fps)

    def even(self, stretch: Stretch) -> list[int]:
        """Frames at the rate that was asked for, within the budget."""
        asked = self.settings
        return even_frames(stretch.frames, self.video.fps, asked.fps, asked.max_frames)


@dataclass(frozen=True)
class Recipe:
    """One way to ask."""

    check: Callable[[AnnotatedClip, TeachSettings], None]
    """Raises ValueError for a clip whose annotation does not say what answers are held against."""
    whole: bool
    """Whether a clip stays whole."""
    jobs: Callable[[Lesson], Iterator[Job]]
    """What is to be asked; a job holds its frames, so they are made one at a time."""
    taught: Callable[
        [AnnotatedClip, Sequence[Stretch], TeachSettings, Mapping[str, Answer]], dict[str, Any]
    ]
    """The fields that the answers fill in."""


def check_types(clip: AnnotatedClip, settings: TeachSettings) -> None:
    """Refuse findings of a type that the teacher cannot choose.

    Raises:
        ValueError: Naming the finding.
    """
    for number, finding in enumerate(clip.findings):
        if finding.type not in (*TYPES[settings.types], UNSPECIFIED):
            raise ValueError(
                f"findings[{number}] must be one of the {settings.types}, got {finding.type!r}; "
                f"choose others by --types ({', '.join(TYPES)})"
            )


def digest(clip: AnnotatedClip) -> str:
    """Tells an annotation from any other."""
    return hashlib.sha256(write_record(clip).encode("utf-8")).hexdigest()[:32]


def finish(
    clip: AnnotatedClip,
    settings: TeachSettings,
    fields: Mapping[str, Any],
    answers: Mapping[str, Answer],
) -> AnnotatedClip:
    """The clip with what was taught, and in `extra` by whom, of what, and every answer as it was.

    What a field held before is kept in `extra` as FIELD_before_RECIPE.
    """
    recipe = settings.recipe
    values = {name: one for name, one in fields.items() if name != "extra"}
    before = {
        f"{name}_before_{recipe}": getattr(clip, name)
        for name in ("reasoning", "first_answer", "reflection")
        if name in values and getattr(clip, name) is not None
    }
    ordered = [{"step": step, **answer} for step, answer in answers.items()]
    extra = {
        **clip.extra,
        **before,
        **fields.get("extra", {}),
        f"{recipe}_teacher": settings.to_json(),
        f"{recipe}_clip": digest(clip),
        f"{recipe}_answers": json.dumps(ordered, ensure_ascii=False),
    }
    return replace(clip, **values, extra=extra)
