"""Tasks of a single turn: what is asked of a clip, and the answer that SFT teaches.

The wording is ours; the forms of the answers, and what they follow, are in `task_answers`.

The two turns of the CaC protocol have their thinking elsewhere: the scorer begins turn 2 with its
JSON, so what is thought goes into each finding's `why`; see `with_reasoning`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cac_reward.data.annotations import FIRST_REASONING, LETTERS, NO_WINDOW, AnnotatedClip
from cac_reward.questions import sanitise_prompt
from cac_reward.report import VERDICTS, Finding
from cac_reward.training.task_answers import (
    Attempt,
    Task,
    TaskAnswer,
    Value,
    parse_value,
    write_task_answer,
)

MAX_WHY_CHARACTERS = 1000
"""Of a finding's `why`."""


def task_question(task: Task, clip: AnnotatedClip) -> str:
    """The text that stands behind the clip's frames in the user's turn.

    Questions and options of data sets are untrusted text; what could speak for the judge is
    stripped from them.

    Raises:
        ValueError: If the kind is 'qa' and the clip has no question with options.

    Example:
        >>> task_question(Task(kind="grounding", wording="brief"), AnnotatedClip(path="a.mp4"))
        'Ground. Think.'
    """
    asked = {
        "qa": lambda: _qa_text(clip, task.wording),
        "grounding": lambda: _GROUNDING_TEXT[task.wording],
        "classification": lambda: _CLASS_TEXT[task.wording].format(", ".join(task.classes)),
        "description": lambda: _DESCRIPTION_TEXT[task.wording, task.thinking],
    }[task.kind]()
    if task.kind == "description":
        return asked
    if task.wording == "brief":
        return asked + " Think." * task.thinking + " Reflect." * task.reflection
    return f"{asked}\n{_form_text(task)}"


def right_value(task: Task, clip: AnnotatedClip) -> Value | None:
    """The right answer to a task as the clip is annotated; None where that is not known.

    A clean clip's windows are known: there are none. An anomalous clip without findings has
    windows that nobody has noted. A category that is not among the classes is not known either.
    """
    if task.kind == "qa":
        return clip.answer if clip.options else None
    if task.kind == "classification":
        return clip.category if clip.category in task.classes else None
    if task.kind == "description":
        return clip.description
    if clip.verdict == VERDICTS[0]:
        return ()
    return tuple(sorted({finding.window for finding in clip.findings})) or None


def task_answer(task: Task, clip: AnnotatedClip) -> TaskAnswer:
    """The whole answer that SFT teaches for a clip.

    Thinking is the clip's `reasoning`. With reflection the first answer is the clip's
    `first_answer` in the task's own form (a letter, a class, what a <glue> holds), its thinking
    stands in `extra` under `FIRST_REASONING`, and the clip's `reflection` follows.

    Raises:
        ValueError: If the clip lacks one of these, by its name, or one of them breaks the form.
    """
    value = right_value(task, clip)
    if value is None:
        raise ValueError(f"clip must have {_VALUE_FIELDS[task.kind]} for {task.kind}, got none")
    final = Attempt(value, _needed(clip, "reasoning") if task.thinking else None)
    if not task.reflection:
        return TaskAnswer(final)
    length = clip.duration_seconds
    try:
        before = parse_value(task, _needed(clip, "first_answer").strip(), clip, length)
    except ValueError as error:
        raise ValueError(f"first_answer: {error}") from error
    thought = None
    if task.thinking:
        thought = clip.extra.get(FIRST_REASONING)
        if thought is None:
            raise ValueError(f"clip must have {FIRST_REASONING!r} in extra, got none")
    return TaskAnswer(final, Attempt(before, thought), _needed(clip, "reflection"))


def lacking(task: Task, clip: AnnotatedClip) -> str | None:
    """Why SFT cannot teach a task on a clip, or None where it can.

    A clip taught one task may be unfit for another: a first answer that is a letter reflects on a
    question, not on a grounding.
    """
    try:
        task_question(task, clip)
        write_task_answer(task, task_answer(task, clip))
    except ValueError as error:
        return str(error)
    return None


def without_reasoning(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Findings of a thinking-free judge: no `why` in any of them."""
    return tuple(replace(finding, why="") for finding in findings)


def with_reasoning(findings: Sequence[Finding], clip: AnnotatedClip) -> tuple[Finding, ...]:
    """Findings of a thinking judge: each says why.

    A finding's own explanation stays. Where a clip's only finding has none, the clip's `reasoning`
    takes its place, on one line and cut at the end of a sentence or else of a word; of several
    findings nobody knows which one it explains.

    Raises:
        ValueError: If a finding then has no explanation.
    """
    explained = []
    for number, finding in enumerate(findings):
        why = finding.why.strip()
        if not why and len(findings) == 1:
            why = _one_line(clip.reasoning or "")
        if not why:
            raise ValueError(
                f"findings[{number}] must have a 'why' to teach thinking, got none in {clip.name}; "
                "leave the clip out or train without thinking"
            )
        explained.append(replace(finding, why=why))
    return tuple(explained)


_VALUE_FIELDS = {
    "qa": "'options' and 'answer'",
    "grounding": "'verdict' \"clean\" or 'findings'",
    "classification": "a 'category' among the classes",
    "description": "a 'description'",
}
_GROUNDING_TEXT = {
    "brief": "Ground.",
    "full": (
        "These frames cover the whole clip; each follows its time. Does anything abnormal happen, "
        "and from when to when?"
    ),
}
_CLASS_TEXT = {
    "brief": "Classify: {}.",
    "full": (
        "These frames cover the whole clip; each follows its time. Which of these classes fits "
        "what happens in it? {}"
    ),
}
_DESCRIPTION_TEXT = {
    ("brief", False): "Describe.",
    ("brief", True): "Describe. Think.",
    ("full", False): (
        "These frames cover the whole clip; each follows its time. Tell in about five sentences "
        "what is to be seen, unusual events above all; leave out captions and watermarks. Begin "
        "with 'Description: '."
    ),
    ("full", True): (
        "These frames cover the whole clip; each follows its time. Tell in about five sentences "
        "what is to be seen, unusual events above all; leave out captions and watermarks. Begin "
        "with 'Description: '. Then, on a new line that begins with 'Reasoning: ', explain whether "
        "something abnormal happens, how one can tell, and what led to it."
    ),
}
_THINK_FORM = "First think between <think> and </think>, naming the seconds that you rely on. Then"
_ANSWER_FORMS = {
    "qa": "give the letter of the right option between <answer> and </answer>",
    "grounding": (
        "give Anomaly or Normal between <answer> and </answer>, and the seconds between <glue> and "
        f"</glue>: [start, end], [[start, end], [start, end]] for several, {NO_WINDOW} for Normal"
    ),
    "classification": "give the class, written as above, between <answer> and </answer>",
}
_REFLECT_FORM = (
    " After that look back at your answer between <reflection> and </reflection>: what speaks for "
    "it, what against? Then give the whole answer a second time in the same form; only this one "
    "counts."
)


def _qa_text(clip: AnnotatedClip, wording: str) -> str:
    if clip.question is None or not clip.options:
        raise ValueError(f"clip must have a question with options for qa, got {clip.options}")
    opening = "" if wording == "brief" else "These frames cover the whole clip.\n"
    options = [
        f"{letter}. {sanitise_prompt(option)}"
        for letter, option in zip(LETTERS, clip.options, strict=False)
    ]
    return opening + "\n".join([sanitise_prompt(clip.question), *options])


def _form_text(task: Task) -> str:
    """How a chat model is told to write its answer."""
    form = _ANSWER_FORMS[task.kind]
    text = f"{_THINK_FORM} {form}." if task.thinking else f"{form[0].upper()}{form[1:]}."
    return f"{text}{_REFLECT_FORM if task.reflection else ''} Write nothing outside the tags."


def _needed(clip: AnnotatedClip, name: str) -> str:
    text = getattr(clip, name)
    if text is None:
        raise ValueError(f"clip must have {name!r}, got none")
    return str(text)


def _one_line(text: str) -> str:
    """Text on one line of at most `MAX_WHY_CHARACTERS`, cut where a sentence or a word ends."""
    line = " ".join(text.split())
    if len(line) <= MAX_WHY_CHARACTERS:
        return line
    cut = line[: MAX_WHY_CHARACTERS - 3]
    sentence = max(cut.rfind(mark) for mark in (". ", "! ", "? "))
    return cut[: sentence + 1] if sentence > 0 else cut.rpartition(" ")[0] + "..."
