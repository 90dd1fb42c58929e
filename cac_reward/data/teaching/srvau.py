"""SRVAU-R1's recipe: a first answer without help, a reflection on it, a revised answer.

Source: arXiv:2602.01004, and SRPO's order of the parts (https://github.com/SUSTechBruce/SRPO_MLLMs).
`first_answer` is in the form that a trainer's task has: a letter, a class, or windows; the thinking
that led to it stands in `extra`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from cac_reward.answers import write_window
from cac_reward.data.annotations import FIRST_REASONING, LETTERS, NO_WINDOW, AnnotatedClip
from cac_reward.data.teaching.lessons import (
    Answer,
    Ask,
    Job,
    Lesson,
    Question,
    Recipe,
    check_types,
)
from cac_reward.data.teaching.settings import TeachSettings
from cac_reward.data.teaching.stretches import Stretch
from cac_reward.data.teaching.vanguard import claim_reasons, findings_schema
from cac_reward.data.teaching.verifying import (
    Reason,
    RejectedAnswerError,
    Schema,
    disagreements,
    object_schema,
    prose_reasons,
    read_claims,
    text_schema,
    verdict_reasons,
)
from cac_reward.data.teaching.wording import (
    BLIND_TEXTS,
    REFLECT_TEXT,
    SYSTEM_TEXT,
    annotation_text,
    shown,
    types_text,
)
from cac_reward.questions import Message, sanitise_prompt, write_time
from cac_reward.report import VERDICTS


@dataclass(frozen=True, kw_only=True)
class Exam:
    """What one clip is asked, and the right answer."""

    kind: str
    """'qa', 'grounding' or 'classification'."""
    clip: AnnotatedClip
    stretch: Stretch
    """The whole clip."""
    settings: TeachSettings
    choices: tuple[str, ...]
    """Letters or classes; none for 'grounding'."""
    right: str | None
    """Among `choices`."""

    @property
    def answer_schemas(self) -> dict[str, Schema]:
        """The keys of a whole answer."""
        asked: dict[str, Schema] = {"reasoning": text_schema()}
        if self.kind != "grounding":
            return {**asked, "answer": text_schema(self.choices)}
        asked["findings"] = findings_schema(self.settings)
        return {**asked, "verdict": text_schema(VERDICTS)}

    def own_reasons(self, answer: Answer, *, blind: bool) -> list[Reason]:
        """What is wrong with an answer in itself."""
        within = self.stretch.window
        said = answer["reasoning"]
        found = list(prose_reasons("reasoning", said, within, reader_sees_video_only=not blind))
        if self.kind == "grounding":
            claims = read_claims(answer)
            found += claim_reasons(claims, within)
            found += verdict_reasons(answer["verdict"], claims)
        return found

    def differences(self, answer: Answer) -> list[Reason]:
        """What of an answer is not as annotated."""
        if self.kind == "grounding":
            claims = read_claims(answer)
            found = disagreements(answer["verdict"], claims, self.stretch, self.settings.min_iou)
            return list(found)
        if answer["answer"] == self.right:
            return []
        return [("answer", f"answer must be {self.right!r} as annotated, got {answer['answer']!r}")]


def kind_of(clip: AnnotatedClip, settings: TeachSettings) -> str:
    """The task that a clip is asked.

    Raises:
        ValueError: If its annotation does not have the right answer to it.
    """
    answered = bool(clip.options) and clip.answer is not None
    kind = settings.task
    if kind == "auto":
        kind = "qa" if answered else "grounding"
    located = clip.verdict == VERDICTS[0] or bool(clip.findings)
    for name, known, wanted in (
        ("qa", answered, "a question with options and its answer"),
        ("grounding", located, "a clean verdict, or findings"),
        ("classification", clip.category in settings.classes, "a category among the classes"),
    ):
        if kind == name and not known:
            raise ValueError(f"clip must have {wanted} for the task {kind!r}, got none")
    return kind


def _check(clip: AnnotatedClip, settings: TeachSettings) -> None:
    if kind_of(clip, settings) == "grounding":
        check_types(clip, settings)


def _exam(lesson: Lesson) -> Exam:
    clip, kind = lesson.clip, kind_of(lesson.clip, lesson.settings)
    choices = {"qa": tuple(LETTERS[: len(clip.options)]), "grounding": ()}
    right = {"qa": clip.answer, "classification": clip.category}
    return Exam(
        kind=kind,
        clip=clip,
        stretch=lesson.stretches[0],
        settings=lesson.settings,
        choices=choices.get(kind, lesson.settings.classes),
        right=right.get(kind),
    )


def _jobs(lesson: Lesson) -> Iterator[Job]:
    exam = _exam(lesson)
    even = lesson.even(exam.stretch)
    more = [index for index in exam.stretch.telling if index not in even]
    first, told = lesson.frames(even), lesson.frames(more) if more else None
    asked = (Message("system", (SYSTEM_TEXT,)), shown(*first, *_blind_texts(exam)))
    yield Job(partial(_ask_twice, exam, asked, told))


def _ask_twice(exam: Exam, asked: tuple[Message, ...], told: Any, ask: Ask) -> dict[str, Answer]:
    schemas = exam.answer_schemas
    first = ask(
        Question("first", asked, object_schema(**schemas), partial(_check_first, exam=exam))
    )
    differences = exam.differences(first)
    said = json.dumps(dict(first), ensure_ascii=False)
    reply = shown(*told, "More frames.") if told else None
    text = REFLECT_TEXT.format(
        annotation=annotation_text(exam.clip, exam.stretch, whole=True),
        right="wrong" if differences else "right",
        differences="".join(f"\n- {why}" for _, why in differences),
    )
    content = (*reply.content, "\n" + text) if reply else (text,)
    second = ask(
        Question(
            "second",
            (*asked, Message("assistant", (said,)), Message("user", content)),
            object_schema(
                first_answer_is_right={"type": "boolean"}, reflection=text_schema(), **schemas
            ),
            partial(_check_second, exam=exam, was_right=not differences),
        )
    )
    return {"first": first, "second": second}


def _blind_texts(exam: Exam) -> list[str]:
    """The question, without anything that was annotated."""
    clip, window = exam.clip, exam.stretch.window
    question = ", ".join(exam.choices)
    if exam.kind == "qa":
        options = zip(LETTERS, clip.options, strict=False)
        listed = [f"{letter}. {sanitise_prompt(one)}" for letter, one in options]
        question = "\n".join([sanitise_prompt(clip.question or ""), *listed])
    text = BLIND_TEXTS[exam.kind].format(
        start=write_time(window.start_seconds),
        end=write_time(window.end_seconds),
        question=question,
    )
    return [types_text(exam.settings.types), text] if exam.kind == "grounding" else [text]


def _check_first(answer: Answer, exam: Exam) -> None:
    """A first answer may be wrong, but not outside the clip."""
    reasons = exam.own_reasons(answer, blind=True)
    if reasons:
        raise RejectedAnswerError(reasons)


def _check_second(answer: Answer, exam: Exam, was_right: bool) -> None:
    reasons = list(prose_reasons("reflection", answer["reflection"], exam.stretch.window))
    if answer["first_answer_is_right"] != was_right:
        said = "right" if was_right else "wrong"
        reasons.append(("judgement", f"first_answer_is_right must say that it was {said}"))
    reasons += exam.own_reasons(answer, blind=False) + exam.differences(answer)
    if reasons:
        raise RejectedAnswerError(reasons)


def _taught(
    clip: AnnotatedClip,
    stretches: Sequence[Stretch],
    settings: TeachSettings,
    answers: Mapping[str, Answer],
) -> dict[str, Any]:
    first, second = answers["first"], answers["second"]
    value = first.get("answer")
    if value is None:
        windows = sorted({claim.window for claim in read_claims(first)})
        written = [write_window(window) for window in windows]
        value = f"[{', '.join(written)}]" if len(written) > 1 else "".join(written) or NO_WINDOW
    return {
        "first_answer": value,
        "reflection": second["reflection"],
        "reasoning": second["reasoning"],
        "extra": {FIRST_REASONING: first["reasoning"]},
    }


RECIPE = Recipe(check=_check, whole=True, jobs=_jobs, taught=_taught)
