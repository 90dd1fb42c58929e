"""VANGUARD's recipe: structured reasoning on each sub-clip, led by the manual annotation.

Source: arXiv:2605.02912. A clip stays one annotated clip: the parts' reasoning stands in
`reasoning` in order of time, with times of the whole recording, so that a trainer shows the video
and teaches the text as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from cac_reward.data.annotations import AnnotatedClip
from cac_reward.data.teaching.lessons import (
    Answer,
    Ask,
    Job,
    Lesson,
    Question,
    Recipe,
    check_types,
)
from cac_reward.data.teaching.settings import TYPES, TeachSettings
from cac_reward.data.teaching.stretches import Stretch, frames_with
from cac_reward.data.teaching.verifying import (
    WINDOW_SCHEMA,
    Claim,
    Reason,
    RejectedAnswerError,
    Schema,
    disagreements,
    list_schema,
    object_schema,
    prose_reasons,
    read_claims,
    read_window,
    text_schema,
    verdict_reasons,
    window_reasons,
)
from cac_reward.data.teaching.wording import (
    PART_TEXT,
    SYSTEM_TEXT,
    annotation_text,
    shown,
    types_text,
)
from cac_reward.overlap import window_iou
from cac_reward.questions import Message, write_time
from cac_reward.report import UNSPECIFIED, VERDICTS, Finding, TimeWindow


def findings_schema(settings: TeachSettings) -> Schema:
    """A list of findings."""
    known = text_schema(tuple(TYPES[settings.types]))
    return list_schema(object_schema(type=known, window=WINDOW_SCHEMA, why=text_schema()))


def claim_reasons(claims: Sequence[Claim], within: TimeWindow) -> Iterator[Reason]:
    """Why findings may not be taught, whatever is annotated."""
    for number, claim in enumerate(claims):
        yield from window_reasons(f"findings[{number}].window", claim.window, within)
        yield from prose_reasons(f"findings[{number}].why", claim.why, within)


def _check(clip: AnnotatedClip, settings: TeachSettings) -> None:
    if clip.verdict is None:
        raise ValueError("verdict must be annotated to lead a teacher, got none")
    check_types(clip, settings)


def _jobs(lesson: Lesson) -> Iterator[Job]:
    for number, stretch in enumerate(lesson.stretches, 1):
        question = _question(lesson, stretch, f"part {number}")
        yield Job(partial(_ask_part, question))


def _ask_part(question: Question, ask: Ask) -> dict[str, Answer]:
    return {question.step: ask(question)}


def _question(lesson: Lesson, stretch: Stretch, step: str) -> Question:
    settings = lesson.settings
    even = lesson.even(stretch)
    frames, times = lesson.frames(frames_with(stretch.telling, even, settings.max_frames))
    text = PART_TEXT.format(
        start=write_time(stretch.window.start_seconds),
        end=write_time(stretch.window.end_seconds),
        annotation=annotation_text(lesson.clip, stretch, whole=len(lesson.stretches) == 1),
    )
    schema = object_schema(
        scene=text_schema(),
        events=list_schema(object_schema(window=WINDOW_SCHEMA, what=text_schema())),
        findings=findings_schema(settings),
        reasoning=text_schema(),
        verdict=text_schema(VERDICTS),
    )
    return Question(
        step,
        (
            Message("system", (SYSTEM_TEXT,)),
            shown(frames, times, types_text(settings.types), text),
        ),
        schema,
        partial(_check_part, stretch=stretch, min_iou=settings.min_iou),
    )


def _check_part(answer: Answer, stretch: Stretch, min_iou: float) -> None:
    claims, within = read_claims(answer), stretch.window
    reasons: list[Reason] = []
    for name in ("scene", "reasoning"):
        reasons += prose_reasons(name, answer[name], within)
    for number, event in enumerate(answer["events"]):
        reasons += prose_reasons(f"events[{number}].what", event["what"], within)
        try:
            window = read_window(event["window"])
        except ValueError as error:
            reasons.append(("form", f"events[{number}]: {error}"))
        else:
            reasons += window_reasons(f"events[{number}].window", window, within)
    reasons += claim_reasons(claims, within)
    reasons += verdict_reasons(answer["verdict"], claims)
    reasons += disagreements(answer["verdict"], claims, stretch, min_iou)
    if reasons:
        raise RejectedAnswerError(reasons)


def _taught(
    clip: AnnotatedClip,
    stretches: Sequence[Stretch],
    settings: TeachSettings,
    answers: Mapping[str, Answer],
) -> dict[str, Any]:
    parts = [answers[f"part {number}"] for number in range(1, len(stretches) + 1)]
    texts = [_write_part(one, stretch) for one, stretch in zip(parts, stretches, strict=True)]
    if len(parts) > 1:
        spans = [f"{one.type} {_span(one.window)}" for one in clip.findings]
        texts.append(f"Whole recording: {', '.join([str(clip.verdict), *spans])}")
    claims = [claim for part in parts for claim in read_claims(part)]
    findings = tuple(_explained(finding, claims) for finding in clip.findings)
    return {"reasoning": "\n\n".join(texts), "findings": findings}


def _write_part(answer: Answer, stretch: Stretch) -> str:
    events = [f"- {_span(read_window(one['window']))} {one['what']}" for one in answer["events"]]
    findings = [f"- {one.type} {_span(one.window)} {one.why}" for one in read_claims(answer)]
    return "\n".join(
        [
            _span(stretch.window),
            f"Scene: {answer['scene']}",
            *(["Events:", *events] if events else []),
            *(["Findings:", *findings] if findings else []),
            f"Why: {answer['reasoning']}",
            f"So this stretch is {answer['verdict']}.",
        ]
    )


def _explained(finding: Finding, claims: Sequence[Claim]) -> Finding:
    """A finding that says why: in its own words or in those of the claim that lies on it best."""
    fitting = [one for one in claims if finding.type in (UNSPECIFIED, one.type)]
    best = max(fitting, key=lambda one: window_iou(one.window, finding.window), default=None)
    if finding.why.strip() or best is None or window_iou(best.window, finding.window) == 0:
        return finding
    return replace(finding, why=best.why)


def _span(window: TimeWindow) -> str:
    return f"{write_time(window.start_seconds)} to {write_time(window.end_seconds)}"


RECIPE = Recipe(check=_check, whole=False, jobs=_jobs, taught=_taught)
