"""What a judge is taught on one annotated clip: a conversation, and which of its words count.

Only the judge's own words carry loss. Beside them every frame shown knows whether a fault is on,
for the heads of the classifier.

Axes: F frames, C channels (3), H height, W width, K frames shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from torch import Tensor

from cac_reward.data.annotations import AnnotatedClip
from cac_reward.frames import (
    JudgeSettings,
    frame_times,
    inspect_indices,
    resize_to_budget,
    scan_indices,
)
from cac_reward.judges.families import Family
from cac_reward.questions import (
    INSPECT_TOOL,
    Message,
    inspect_message,
    scan_message,
    write_time,
)
from cac_reward.report import VERDICTS, Box, Finding, TimeWindow
from cac_reward.training.rules import near_name


@dataclass(frozen=True, kw_only=True)
class LessonOptions:
    """Shares and counts of what lessons show; from `options` of a stage."""

    exact_windows: float = 0.5
    """Of 'inspect': lessons whose call asks for the true windows, and teaches it. In the others
    the windows are misplaced or needless, shown but not taught, as a judge in error would ask."""
    misplaced_seconds: float = 0.25
    """Of 'inspect': farthest that a misplaced window begins or ends off the true one."""
    verdict_only: float = 0.3
    """Of 'inspect': lessons that teach the verdict straight after the frames, as fast mode asks."""
    reasons: float = 1.0
    """Of findings: lessons that teach why ('thinking'); the others leave it empty."""
    boxes: int = 3
    """Of findings: most boxes taught of each, evenly over its time."""
    wrong_prompts: float = 0.5
    """Of 'alignment': lessons with a prompt that the clip does not show."""
    clean_frames: float = 0.3
    """Of 'frame': lessons on a frame without a fault."""
    compressed: float = 0.0
    """Lessons on frames that went through JPEG of some quality first, against overfitting."""
    turns: int = 1
    """Of 'frame' and 'caption': frames or stretches asked about, one after the other."""
    scan_size: float = 0.0
    """Of 'frame' and 'caption': lessons at turn 1's size of frames, the others at turn 2's."""
    thinking: float = 1.0
    """Of questions: lessons that teach to think first, where reasoning is known."""
    reflection: float = 0.0
    """Of questions: lessons with a first answer, a reflection and a revised answer, where the clip
    has them."""
    written: bool = True
    """Whether answers are taught, so that thoughts must be known; a judge that learns from rewards
    finds its own."""

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name == "written":
                continue
            if one.name in ("boxes", "turns"):
                if not (1 <= value < math.inf and value == int(value)):
                    raise ValueError(
                        f"options.{one.name} must be a whole number of at least 1, got {value}"
                    )
                object.__setattr__(self, one.name, int(value))
            elif one.name == "misplaced_seconds":
                if not 0 <= value < math.inf:
                    raise ValueError(f"options.{one.name} must be at least 0, got {value}")
            elif not 0 <= value <= 1:
                raise ValueError(f"options.{one.name} must be in [0, 1], got {value}")

    @classmethod
    def build(cls, values: Mapping[str, float], *, written: bool = True) -> LessonOptions:
        """From a stage's `options`.

        Raises:
            ValueError: If a name is unknown or a value breaks its rule.
        """
        known = [one.name for one in fields(cls) if one.name != "written"]
        for name in values:
            if name not in known:
                raise ValueError(
                    f"options must name some of {', '.join(known)}, got {name!r}"
                    f"{near_name(name, known)}"
                )
        return cls(**values, written=written)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Words:
    """One turn of the judge and what is learnt of it."""

    text: str
    weights: tuple[tuple[int, int, bool], ...] = ()
    """Stretches [start, end) of characters that are learnt, and whether they decide a verdict."""
    ends: bool = False
    """Whether it is learnt that the turn ends here."""

    @classmethod
    def learnt(cls, text: str, decisive: tuple[int, int] | None = None) -> Words:
        """A turn that is learnt whole; `decisive` is the stretch that decides a verdict."""
        if decisive is None:
            return cls(text, ((0, len(text), False),), True)
        start, end = decisive
        parts = ((0, start, False), (start, end, True), (end, len(text), False))
        return cls(text, tuple(part for part in parts if part[0] < part[1]), True)

    @classmethod
    def shown(cls, text: str) -> Words:
        """A turn that is read and not learnt."""
        return cls(text)


@dataclass(frozen=True, eq=False)
class Lesson:
    """One conversation and its labels."""

    messages: tuple[Message | Words, ...]
    """Turns in their order; the judge's are `Words`."""
    tools: tuple[Mapping[str, object], ...] = ()
    """That the judge may call."""
    frame_labels: tuple[float, ...] = ()
    """Of every frame shown, in order: 1 where a fault is on, 0 where none is, NaN unknown."""
    clip_label: float = math.nan
    """1 anomalous, 0 clean, NaN unknown."""
    frame_captions: tuple[str, ...] = ()
    """Of every frame shown, in order: what a caption says of it; '' where none does."""


@dataclass(frozen=True)
class View:
    """How a judge sees clips."""

    settings: JudgeSettings
    family: Family
    patch_factor: int
    """What sides of frames are multiples of."""
    classes: tuple[str, ...] = ()
    """That a clip may be of, for the task of classification."""

    @property
    def tools(self) -> tuple[Mapping[str, object], ...]:
        """A judge that was trained on the brief wording is not told of its tool."""
        return (INSPECT_TOOL,) if self.settings.wording == "full" else ()

    def show(self, frames: Tensor, indices: Sequence[int], pixels: int) -> Tensor:
        """[K C H' W'] float in [0, 1] of frames [F C H W] uint8, at a budget of pixels."""
        return resize_to_budget(frames[list(indices)].float() / 255, pixels, self.patch_factor)


@dataclass(frozen=True, eq=False)
class ClipInView:
    """A clip with its frames, as a lesson is written from it.

    What the annotation says of times behind the last frame is cut off.
    """

    clip: AnnotatedClip
    frames: Tensor
    """[F 3 H W] uint8."""
    fps: float
    view: View
    options: LessonOptions
    random: np.random.Generator
    other_prompt: str = ""
    """Of another clip; '' where none is known."""

    def __post_init__(self) -> None:
        clip = replace(
            self.clip,
            findings=tuple(
                self._inside(one) for one in self.clip.findings if self._begins(one.window)
            ),
            captions=tuple(one for one in self.clip.captions if self._begins(one.window)),
        )
        object.__setattr__(self, "clip", clip)

    @property
    def seconds(self) -> float:
        return len(self.frames) / self.fps

    @property
    def findings(self) -> tuple[Finding, ...]:
        """In the order of their beginnings."""
        return tuple(sorted(self.clip.findings, key=lambda one: one.window))

    def _begins(self, window: TimeWindow) -> bool:
        """Whether a window begins before the clip's end, also as it is written, rounded."""
        start = window.start_seconds
        return max(start, round(start, 2)) < self.seconds

    def _inside(self, finding: Finding) -> Finding:
        if finding.window.end_seconds <= self.seconds:
            return finding
        window = TimeWindow(finding.window.start_seconds, self.seconds)
        boxes = tuple(one for one in finding.boxes if window.holds(one.time_seconds))
        return replace(finding, window=window, boxes=boxes)

    @property
    def windows(self) -> tuple[TimeWindow, ...]:
        """Of all findings, merged where they touch."""
        return merged_windows(self.clip.findings)

    @property
    def clip_label(self) -> float:
        verdict = self.clip.verdict
        return math.nan if verdict is None else float(verdict == VERDICTS[1])

    def labels(self, indices: Sequence[int]) -> tuple[float, ...]:
        """Of frames: whether a fault is on."""
        if self.clip.verdict is None or (self.clip_label and not self.clip.findings):
            return (math.nan,) * len(indices)
        broken = {
            index
            for window in self.windows
            for index in window.frame_indices(len(self.frames), self.fps)
        }
        return tuple(float(index in broken) for index in indices)

    def captions(self, indices: Sequence[int]) -> tuple[str, ...]:
        """Of frames: the first caption of a stretch that they lie in; '' without one."""
        said: dict[int, str] = {}
        for caption in self.clip.captions:
            for index in caption.window.frame_indices(len(self.frames), self.fps):
                said.setdefault(index, caption.text)
        return tuple(said.get(index, "") for index in indices)

    def pixels(self) -> int:
        """Of a frame that is shown by itself, as one of the two turns shows it."""
        settings = self.view.settings
        small = self.chance(self.options.scan_size)
        return settings.scan.pixels if small else settings.inspect.pixels

    def chance(self, share: float) -> bool:
        return bool(self.random.random() < share)

    def scan(self) -> tuple[list[int], tuple[Message, ...]]:
        """Frames of turn 1, and the conversation up to where the judge answers."""
        settings = self.view.settings
        indices = scan_indices(len(self.frames), self.fps, settings.scan)
        shown = self.view.show(self.frames, indices, settings.scan.pixels)
        return indices, scan_message(shown, frame_times(indices, self.fps), settings.wording)

    def stamped(self, indices: Sequence[int], pixels: int) -> list[str | Tensor]:
        """Frames behind their times, at a budget of pixels."""
        shown = self.view.show(self.frames, indices, pixels)
        content: list[str | Tensor] = []
        for index, frame in zip(indices, shown, strict=True):
            content += [write_time(index / self.fps), frame]
        return content

    def second_look(self, windows: Sequence[TimeWindow]) -> tuple[list[int], Message]:
        """Frames of turn 2, and the tool's answer that shows them."""
        settings = self.view.settings
        indices = inspect_indices(windows, len(self.frames), self.fps, settings.inspect)
        shown = self.view.show(self.frames, indices, settings.inspect.pixels)
        times, units = frame_times(indices, self.fps), self.view.family.box_units
        return indices, inspect_message(shown, times, settings.wording, units)

    def stated(self, findings: Sequence[Finding], shown: Sequence[int]) -> list[Finding]:
        """Findings as the judge is to state them: at most so many boxes, on frames that it sees."""
        reasons = self.chance(self.options.reasons)
        return [
            replace(
                one,
                boxes=_thinned(one.boxes, self.options.boxes, frame_times(shown, self.fps)),
                why=one.why if reasons else "",
            )
            for one in findings
        ]


def merged_windows(findings: Sequence[Finding]) -> tuple[TimeWindow, ...]:
    """The windows of findings in order, merged where they touch."""
    merged: list[TimeWindow] = []
    for window in sorted(one.window for one in findings):
        start, end = window.start_seconds, window.end_seconds
        if merged and start <= merged[-1].end_seconds:
            start, end = merged[-1].start_seconds, max(end, merged.pop().end_seconds)
        merged.append(TimeWindow(start, end))
    return tuple(merged)


def _thinned(boxes: Sequence[Box], most: int, times: Sequence[float]) -> tuple[Box, ...]:
    """At most so many boxes, evenly; of frames that are shown, where there are such."""
    known = {round(time, 2) for time in times}
    seen = [one for one in boxes if round(one.time_seconds, 2) in known] or list(boxes)
    if len(seen) <= most:
        return tuple(seen)
    if most == 1:
        return (seen[len(seen) // 2],)
    return tuple(seen[round(i * (len(seen) - 1) / (most - 1))] for i in range(most))
