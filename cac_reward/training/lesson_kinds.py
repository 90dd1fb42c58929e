"""The kinds of lessons: what can be asked of an annotated clip, and what the right answer is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from cac_reward.answers import (
    MAX_FINDINGS,
    MAX_WINDOWS,
    write_findings,
    write_scan_answer,
    write_tool_call,
)
from cac_reward.data.annotations import AnnotatedClip
from cac_reward.frames import InspectSettings, frame_times, inspect_indices, scan_indices
from cac_reward.questions import (
    ALIGNMENT_CHOICES,
    SYSTEM_TEXT_FULL,
    VERDICT_CHOICES,
    VERDICT_PREFIX,
    Message,
    alignment_message,
    inspect_message,
    sanitise_prompt,
)
from cac_reward.report import VERDICTS, Box, TimeWindow
from cac_reward.training.lessons import ClipInView, Lesson, View, Words, merged_windows
from cac_reward.training.task_answers import Task, write_task_answer
from cac_reward.training.tasks import lacking, task_answer, task_question

FRAME_TEXTS = {
    "brief": "Mark.",
    "full": "This is one frame of a generated clip. Mark what is broken in it in two lines: JSON "
    '{"findings": [{"type": "flicker", "window": [0.25, 0.38], "boxes": [{"time": 0.25, "box": '
    '[312, 250, 640, 588]}], "severity": 2, "why": ""}]} with an entry for each fault and the '
    "frame's own time as its window, then Verdict: clean or Verdict: anomalous",
}
CAPTION_TEXTS = {"brief": "Describe.", "full": "Describe what these frames show."}


def write_scan(seen: ClipInView) -> Lesson:
    """Turn 1: a clean verdict, or a call for the windows that hold faults."""
    indices, opening = seen.scan()
    answer = _scan_words(seen, seen.windows)
    return Lesson(
        (*opening, answer),
        seen.view.tools,
        seen.labels(indices),
        seen.clip_label,
        seen.captions(indices),
    )


def write_inspect(seen: ClipInView) -> Lesson:
    """Both turns; a misplaced or needless call is shown, the true one is taught."""
    options, view = seen.options, seen.view
    exact = bool(seen.windows) and seen.chance(options.exact_windows)
    windows = seen.windows if exact else misplace(seen)
    scanned, opening = seen.scan()
    inspected, look = seen.second_look(windows)
    call = _scan_words(seen, windows) if exact else _call_shown(windows, view)
    if seen.chance(options.verdict_only):
        choice = VERDICT_CHOICES[bool(seen.findings)]
        start = len(VERDICT_PREFIX)
        answer = Words(VERDICT_PREFIX + choice, ((start, start + len(choice), True),))
    else:
        writer = view.family.box_writer(*look.frames[0].shape[-2:])
        text = write_findings(seen.stated(seen.findings, inspected), writer)
        choice = VERDICT_CHOICES[bool(seen.findings)]
        answer = Words.learnt(text, (len(text) - len(choice), len(text)))
    labels = (*seen.labels(scanned), *seen.labels(inspected))
    captions = seen.captions([*scanned, *inspected])
    return Lesson((*opening, call, look, answer), view.tools, labels, seen.clip_label, captions)


def write_verdict(seen: ClipInView) -> Lesson:
    """A verdict at once on the frames of turn 1, as rewards without a second look are taught."""
    indices, opening = seen.scan()
    text = VERDICT_PREFIX + VERDICT_CHOICES[bool(seen.clip_label)]
    words = Words.learnt(text, (len(VERDICT_PREFIX), len(text)))
    return Lesson(
        (*opening, words), (), seen.labels(indices), seen.clip_label, seen.captions(indices)
    )


def write_whole(seen: ClipInView) -> Lesson:
    """Findings and verdict in one turn, on the frames of turn 1."""
    indices, opening = open_whole(seen)
    writer = seen.view.family.box_writer(*opening[-1].frames[0].shape[-2:])
    text = write_findings(seen.stated(seen.findings, indices), writer)
    choice = VERDICT_CHOICES[bool(seen.findings)]
    words = Words.learnt(text, (len(text) - len(choice), len(text)))
    return Lesson(
        (*opening, words), (), seen.labels(indices), seen.clip_label, seen.captions(indices)
    )


def open_whole(seen: ClipInView) -> tuple[list[int], tuple[Message, ...]]:
    """Frames of turn 1 with turn 2's question, up to where the judge answers."""
    settings = seen.view.settings
    indices = scan_indices(len(seen.frames), seen.fps, settings.scan)
    shown = seen.view.show(seen.frames, indices, settings.scan.pixels)
    times, units = frame_times(indices, seen.fps), seen.view.family.box_units
    asked = inspect_message(shown, times, settings.wording, units)
    return indices, (*_told(seen), Message("user", asked.content))


def _told(seen: ClipInView) -> tuple[Message, ...]:
    """The system turn that names the kinds of fault to a chat model."""
    full = seen.view.settings.wording == "full"
    return (Message("system", (SYSTEM_TEXT_FULL,)),) if full else ()


def write_frame(seen: ClipInView) -> Lesson:
    """What is broken in single frames, with types and boxes."""
    settings, fps, pixels = seen.view.settings, seen.fps, seen.pixels()
    messages: list[Message | Words] = [*_told(seen)]
    chosen: list[int] = []
    for _ in range(seen.options.turns):
        index = _frame_to_mark(seen)
        stamp, shown = seen.stamped([index], pixels)
        assert not isinstance(shown, str)
        writer = seen.view.family.box_writer(*shown.shape[-2:])
        window = TimeWindow(index / fps, (index + 1) / fps)
        found = [
            replace(
                one,
                window=window,
                boxes=tuple(
                    Box(index / fps, *part.coordinates) for part in one.boxes_at(index / fps)
                ),
                why="",
            )
            if one.boxes
            else replace(one, window=window, why="")
            for one in seen.findings
            if index in one.window.frame_indices(len(seen.frames), fps)
        ]
        text = write_findings(found, writer)
        choice = VERDICT_CHOICES[bool(found)]
        question = (stamp, shown, FRAME_TEXTS[settings.wording])
        messages += [
            Message("user", question),
            Words.learnt(text, (len(text) - len(choice), len(text))),
        ]
        chosen.append(index)
    return Lesson(tuple(messages), (), seen.labels(chosen), frame_captions=seen.captions(chosen))


def write_caption(seen: ClipInView) -> Lesson:
    """What is to be seen in stretches of the clip, in the words of its captions."""
    settings = seen.view.settings
    whole = InspectSettings(
        fps=settings.inspect.fps,
        max_frames=settings.inspect.max_frames,
        pixels=seen.pixels(),
        margin_seconds=0.0,
    )
    picked = seen.random.permutation(len(seen.clip.captions))[: seen.options.turns]
    messages: list[Message | Words] = []
    chosen: list[int] = []
    for at in sorted(picked.tolist()):
        caption = seen.clip.captions[at]
        indices = inspect_indices([caption.window], len(seen.frames), seen.fps, whole)
        content = seen.stamped(indices, whole.pixels)
        messages += [
            Message("user", (*content, CAPTION_TEXTS[settings.wording])),
            Words.learnt(caption.text),
        ]
        chosen += indices
    return Lesson(tuple(messages), (), seen.labels(chosen), frame_captions=seen.captions(chosen))


def write_alignment(seen: ClipInView) -> Lesson:
    """Whether the clip shows a prompt: its own, or one that it does not."""
    known = seen.clip.extra.get(SHOWS_PROMPT)
    prompt, shown = seen.clip.prompt, known != "no"
    other = sanitise_prompt(seen.other_prompt)
    if known is None and other and seen.chance(seen.options.wrong_prompts):
        prompt, shown = other, False
    settings = seen.view.settings
    indices = scan_indices(len(seen.frames), seen.fps, settings.scan)
    frames = seen.view.show(seen.frames, indices, settings.scan.pixels)
    times = frame_times(indices, seen.fps)
    opening = alignment_message(frames, times, prompt, settings.wording)
    answer = ALIGNMENT_CHOICES[0 if shown else 1]
    return Lesson(
        (*opening, Words.learnt(answer, (0, len(answer)))),
        (),
        seen.labels(indices),
        frame_captions=seen.captions(indices),
    )


SHOWS_PROMPT = "shows_prompt"
"""Name in `AnnotatedClip.extra`: 'yes' or 'no', where a clip's prompt may be one that it does not
show; without it the prompt is taken as shown, and another clip's as not shown."""


def task_of(kind: str, seen: ClipInView) -> Task:
    """The question of one turn that is put to a clip, with or without thinking and reflection.

    Where answers are taught, a clip that lacks thoughts, or whose first answer is one to another
    task, is asked without them.
    """
    options = seen.options
    thinking = seen.chance(options.thinking)
    reflection = seen.chance(options.reflection) and kind != "description"
    tasks = [
        Task(
            kind=kind,
            thinking=thinks,
            reflection=reflects,
            classes=seen.view.classes if kind == "classification" else (),
            wording=seen.view.settings.wording,
        )
        for thinks, reflects in (
            *((thinking, reflection), (thinking, False)),
            *((False, reflection), (False, False)),
        )
    ]
    if not options.written:
        return tasks[0]
    return next((one for one in tasks if lacking(one, seen.clip) is None), tasks[-1])


def open_task(task: Task, seen: ClipInView) -> tuple[list[int], tuple[Message, ...]]:
    """Frames shown, and the conversation up to where the judge answers."""
    settings = seen.view.settings.scan
    indices = scan_indices(len(seen.frames), seen.fps, settings)
    content = seen.stamped(indices, settings.pixels)
    return indices, (Message("user", (*content, task_question(task, seen.clip))),)


def _write_task(kind: str) -> LessonWriter:
    def write(seen: ClipInView) -> Lesson:
        task = task_of(kind, seen)
        indices, opening = open_task(task, seen)
        answer = write_task_answer(task, task_answer(task, seen.clip))
        words = Words.learnt(answer)
        return Lesson(
            (*opening, words), (), seen.labels(indices), seen.clip_label, seen.captions(indices)
        )

    return write


class LessonWriter(Protocol):
    def __call__(self, seen: ClipInView) -> Lesson: ...


@dataclass(frozen=True)
class LessonKind:
    """One way to ask of a clip."""

    write: LessonWriter
    fits: Callable[[AnnotatedClip, View], bool]
    """Whether a clip's annotation says enough for it."""
    answered: bool
    """Whether stage rewards can judge the answers, so that GRPO can learn from it."""


def _located(clip: AnnotatedClip, view: View) -> bool:
    """Whether it is known that there is no fault, or when all are; an answer can hold so many."""
    few = len(clip.findings) <= MAX_FINDINGS and len(merged_windows(clip.findings)) <= MAX_WINDOWS
    return clip.verdict == VERDICTS[0] or (bool(clip.findings) and few)


def _judged(clip: AnnotatedClip, view: View) -> bool:
    return clip.verdict is not None


def _boxed(clip: AnnotatedClip, view: View) -> bool:
    return clip.verdict == VERDICTS[0] or any(one.boxes for one in clip.findings)


def _prompted(clip: AnnotatedClip, view: View) -> bool:
    return bool(sanitise_prompt(clip.prompt))


def _known(kind: str) -> Callable[[AnnotatedClip, View], bool]:
    def fits(clip: AnnotatedClip, view: View) -> bool:
        classes = view.classes if kind == "classification" else ()
        if kind == "classification" and len(classes) < 2:
            raise ValueError(f"classes must be at least two for lessons.{kind}, got {classes}")
        task = Task(kind=kind, thinking=False, classes=classes, wording=view.settings.wording)
        return lacking(task, clip) is None

    return fits


TASKS = ("qa", "grounding", "classification", "description")
LESSONS: Mapping[str, LessonKind] = {
    "scan": LessonKind(write_scan, _located, False),
    "inspect": LessonKind(write_inspect, _located, True),
    "verdict": LessonKind(write_verdict, _judged, False),
    "whole": LessonKind(write_whole, _located, False),
    "frame": LessonKind(write_frame, _boxed, False),
    "caption": LessonKind(write_caption, lambda clip, view: bool(clip.captions), False),
    "alignment": LessonKind(write_alignment, _prompted, False),
    **{kind: LessonKind(_write_task(kind), _known(kind), kind != "description") for kind in TASKS},
}
"""What can be asked of a clip, by name. 'inspect' is the whole conversation of two turns; GRPO lets
the judge itself write both."""


def misplace(seen: ClipInView) -> tuple[TimeWindow, ...]:
    """Windows as a judge in error would ask for them: off the true ones, or needless."""
    frames, fps = len(seen.frames), seen.fps
    reach = max(1, round(seen.options.misplaced_seconds * fps))
    if not seen.windows:
        shortest = min(frames, max(1, reach))
        length = int(seen.random.integers(shortest, max(shortest, min(frames, 3 * reach)) + 1))
        first = int(seen.random.integers(0, frames - length + 1))
        return (TimeWindow(first / fps, (first + length) / fps),)
    moved = []
    for window in seen.windows:
        early, late = seen.random.integers(-reach, reach + 1, size=2)
        first = min(max(0, round(window.start_seconds * fps) + int(early)), frames - 1)
        last = min(frames, max(round(window.end_seconds * fps) + int(late), first + 1))
        moved.append(TimeWindow(first / fps, last / fps))
    return tuple(moved)


def _scan_words(seen: ClipInView, windows: Sequence[TimeWindow]) -> Words:
    """Turn 1 as it is taught; what decides the verdict is how it begins."""
    text = write_scan_answer(windows, seen.view.family.call_format)
    clean = len(VERDICT_PREFIX) + len(VERDICT_CHOICES[0])
    decisive = (0, text.index(">") + 1) if windows else (0, clean)
    return Words.learnt(text, decisive)


def _call_shown(windows: Sequence[TimeWindow], view: View) -> Words:
    return Words.shown(write_tool_call(windows, view.family.call_format))


def _frame_to_mark(seen: ClipInView) -> int:
    """A broken frame, or one that is not."""
    labels = np.array(seen.labels(range(len(seen.frames))))
    wanted = 0.0 if seen.chance(seen.options.clean_frames) else 1.0
    fitting = np.flatnonzero(labels == wanted)
    if not len(fitting):
        fitting = np.arange(len(labels))
    return int(seen.random.choice(fitting))
