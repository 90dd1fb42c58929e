"""The answers to tasks of a single turn: what they hold, how they are written, a strict parser.

    qa              <think>..</think><answer>LETTER</answer>
    grounding       <think>..</think><answer>Normal|Anomaly</answer><glue>[s, e]</glue>
    classification  <think>..</think><answer>CLASS</answer>
    description     Description: .. then a line Reasoning: ..

The first three without thinking have no <think>, and with reflection say it all twice around a
<reflection>: first answer, what is to be said of it, revised answer. The revised answer is what is
scored. The tags are those of VAU-R1 (arXiv:2505.23504) and, around a reflection, of SRPO
(https://github.com/SUSTechBruce/SRPO_MLLMs); SRVAU-R1's own (arXiv:2602.01004) are not public.

What departs from VAU-R1: a <glue> holds one interval there. Where a clip has several windows it is
a list of them here, [[s, e], [s, e]], so that set-valued truth has an answer; an interval without
length is none. Classes are compared letter by letter, in the case in which they are listed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from cac_reward.answers import (
    MAX_WINDOWS,
    answer_error,
    limited,
    load_json,
    read_window,
    write_window,
)
from cac_reward.data.annotations import LETTERS, NO_WINDOW, AnnotatedClip
from cac_reward.frames import WORDINGS
from cac_reward.plain import read_sequence
from cac_reward.report import TimeWindow

KINDS = ("qa", "grounding", "classification", "description")
GROUNDING_ANSWERS = ("Normal", "Anomaly")
"""For a clean and for an anomalous clip, in the order of `VERDICTS`."""
Value = str | tuple[TimeWindow, ...]
"""What is scored: an option's letter, a class, a description, or windows (none for 'Normal')."""

_DESCRIPTION, _REASONING = "Description: ", "\nReasoning: "
# Tags of answers and of tool calls, and special tokens of chat templates: a text that held one
# could end the answer early or open another.
_RESERVED = re.compile(
    r"</?\s*(?:think|answer|glue|reflection|tool_call|tool_response)\b[^<>]*>|<\|"
)
_BODY = r"((?:(?!</?(?:think|answer|glue|reflection)>).)*)"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is asked of a clip, and in which form the answer comes."""

    kind: str
    """One of `KINDS`."""
    thinking: bool = True
    """Whether the answer begins with its reasons; for 'description', whether it ends with them."""
    reflection: bool = False
    """Whether a first answer is looked back at and revised; not for 'description'."""
    classes: tuple[str, ...] = ()
    """Of 'classification', at least two, in the order in which they are listed."""
    wording: str = "full"
    """'brief' for judges trained on these tasks, 'full' for chat models."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {self.kind!r}")
        if self.wording not in WORDINGS:
            raise ValueError(f"wording must be one of {WORDINGS}, got {self.wording!r}")
        if self.kind == "description" and self.reflection:
            raise ValueError("reflection must be false for the kind 'description', got true")
        if self.kind != "classification" and self.classes:
            raise ValueError(
                f"classes must be empty for the kind {self.kind!r}, got {self.classes}"
            )
        if self.kind == "classification":
            if len(set(self.classes)) != len(self.classes) or len(self.classes) < 2:
                raise ValueError(
                    f"classes must be at least two different names, got {self.classes}"
                )
            for name in self.classes:
                _body("classes", name)


@dataclass(frozen=True)
class Attempt:
    """One answer with what was thought before it."""

    value: Value
    """The answer; the windows of an answer come in order of time."""
    thinking: str | None = None
    """Text without tags; None in a thinking-free answer."""


@dataclass(frozen=True)
class TaskAnswer:
    """A whole answer: the attempt that is scored and, with reflection, what came before."""

    final: Attempt
    first: Attempt | None = None
    reflection: str | None = None

    @property
    def value(self) -> Value:
        """What is scored."""
        return self.final.value


def write_task_answer(task: Task, answer: TaskAnswer) -> str:
    """Write an answer in the task's form; `parse_task_answer` reads it back.

    Texts lose white space around them, and times are rounded to 0.01 s.

    Raises:
        ValueError: If a part that the form has is missing, a part that it lacks is given, or a
            text holds a tag.

    Example:
        >>> task = Task(kind="grounding", thinking=False)
        >>> write_task_answer(task, TaskAnswer(Attempt((TimeWindow(0.25, 1.0),))))
        '<answer>Anomaly</answer><glue>[0.25, 1.00]</glue>'
        >>> write_task_answer(task, TaskAnswer(Attempt(())))
        '<answer>Normal</answer><glue>[-1.0, -1.0]</glue>'
    """
    if task.kind == "description":
        return _write_description(task, answer)
    if (answer.first is None) == task.reflection or (answer.reflection is None) == task.reflection:
        raise ValueError(
            "answer must have a first answer and a reflection exactly where the task has them "
            f"(reflection={task.reflection}), got {answer.first} and {answer.reflection!r}"
        )
    if answer.first is None or answer.reflection is None:
        return _write_attempt(task, answer.final)
    reflection = f"<reflection>{_body('reflection', answer.reflection)}</reflection>"
    return _write_attempt(task, answer.first) + reflection + _write_attempt(task, answer.final)


def parse_task_answer(
    task: Task, text: str, clip: AnnotatedClip, *, duration_seconds: float | None = None
) -> TaskAnswer:
    """Read an answer in the task's form: every tag once, in order, and nothing around them.

    Args:
        task: What was asked.
        text: The judge's whole answer.
        clip: Which options there are.
        duration_seconds: Length of the clip, for the windows of 'grounding'; by default the one
            that the clip states.

    Raises:
        AnswerError: If the text is anything else: a letter that is no option, a class that is not
            listed, 'Normal' with a window, a window outside the clip.
        ValueError: If nobody knows how long the clip is.
    """
    length = clip.duration_seconds if duration_seconds is None else duration_seconds
    if task.kind == "grounding" and length is None:
        raise ValueError(f"duration_seconds must be known for grounding, got none for {clip.name}")
    try:
        if task.kind == "description":
            return _read_description(task, limited(text))
        found = _layout(task).fullmatch(limited(text).strip())
        if found is None:
            raise ValueError(f"must be {'..'.join(_tags(task))} and nothing else")
        bodies = [_body("text in tags", body) for body in found.groups()]
        size = (len(bodies) - task.reflection) // (1 + task.reflection)
        final = _read_attempt(task, bodies[-size:], clip, length)
        if not task.reflection:
            return TaskAnswer(final)
        return TaskAnswer(final, _read_attempt(task, bodies[:size], clip, length), bodies[size])
    except ValueError as error:
        raise answer_error(task.kind, error, text) from error


def write_glue(windows: Sequence[TimeWindow]) -> str:
    """What a <glue> holds: one interval, a list of several, or the one that stands for none.

    Raises:
        ValueError: If there are more windows than an answer can hold.
    """
    written = [write_window(window) for window in windows]
    if len(written) > MAX_WINDOWS:
        raise ValueError(f"windows must be at most {MAX_WINDOWS}, got {len(written)}")
    if not written:
        return NO_WINDOW
    return written[0] if len(written) == 1 else f"[{', '.join(written)}]"


def parse_value(task: Task, body: str, clip: AnnotatedClip, length: float | None) -> Value:
    """Read a letter, a class or windows from what stands in an answer's last tag.

    Raises:
        ValueError: If it is none of those that the task and the clip allow.
    """
    if task.kind != "grounding":
        names = tuple(LETTERS[: len(clip.options)]) if task.kind == "qa" else task.classes
        if body not in names:
            raise ValueError(f"answer must be one of {', '.join(names)}, got {body!r}")
        return body
    plain = read_sequence("glue", load_json(body))
    if list(plain) == [-1, -1]:
        return ()
    listed = plain if plain and isinstance(plain[0], list) else [plain]
    if len(listed) > MAX_WINDOWS:
        raise ValueError(f"glue must hold at most {MAX_WINDOWS} windows, got {len(listed)}")
    # A clip of unknown length bounds nothing; only an annotation's own first answer comes here so.
    bound = float("inf") if length is None else length
    return tuple(sorted({read_window(one, bound) for one in listed}))


def _tags(task: Task) -> list[str]:
    """The tags of a task's answer, in order."""
    attempt = ["<think>"] * task.thinking + ["<answer>"] + ["<glue>"] * (task.kind == "grounding")
    return attempt + (["<reflection>", *attempt] if task.reflection else [])


@cache
def _layout(task: Task) -> re.Pattern[str]:
    parts = [f"{tag}{_BODY}</{tag[1:]}" for tag in _tags(task)]
    return re.compile(r"\s*".join(parts), re.DOTALL)


def _body(name: str, text: str) -> str:
    """Text that may stand between tags, without white space around it."""
    if not text.strip():
        raise ValueError(f"{name} must say something, got {text!r}")
    reserved = _RESERVED.search(text)
    if reserved:
        raise ValueError(f"{name} must hold no tag, got {reserved.group()!r}")
    return text.strip()


def _write_attempt(task: Task, attempt: Attempt) -> str:
    thought = ""
    if (attempt.thinking is None) == task.thinking:
        raise ValueError(
            f"answer must have thinking exactly where the task has (thinking={task.thinking}), "
            f"got {attempt.thinking!r}"
        )
    if attempt.thinking is not None:
        thought = f"<think>{_body('thinking', attempt.thinking)}</think>"
    if isinstance(attempt.value, str):
        return f"{thought}<answer>{_body('answer', attempt.value)}</answer>"
    answer = GROUNDING_ANSWERS[bool(attempt.value)]
    return f"{thought}<answer>{answer}</answer><glue>{write_glue(attempt.value)}</glue>"


def _read_attempt(
    task: Task, bodies: Sequence[str], clip: AnnotatedClip, length: float | None
) -> Attempt:
    """An attempt from what stands between its tags."""
    value = parse_value(task, bodies[-1], clip, length)
    if task.kind == "grounding" and bodies[-2] != GROUNDING_ANSWERS[bool(value)]:
        raise ValueError(f"answer {bodies[-2]!r} must agree with its windows, got {bodies[-1]!r}")
    return Attempt(value, bodies[0] if task.thinking else None)


def _write_description(task: Task, answer: TaskAnswer) -> str:
    if not isinstance(answer.value, str) or (answer.final.thinking is None) == task.thinking:
        raise ValueError(
            f"answer must be a description, with reasoning exactly where the task has thinking "
            f"(thinking={task.thinking}), got {answer.final}"
        )
    text = _DESCRIPTION + _body("description", answer.value)
    if _REASONING in text:
        raise ValueError(f"description must hold no line {_REASONING.strip()!r}, got one")
    if answer.final.thinking is None:
        return text
    return text + _REASONING + _body("reasoning", answer.final.thinking)


def _read_description(task: Task, text: str) -> TaskAnswer:
    stripped = text.strip()
    if not stripped.startswith(_DESCRIPTION):
        raise ValueError(f"must begin with {_DESCRIPTION!r}")
    said, heading, why = stripped[len(_DESCRIPTION) :].partition(_REASONING)
    if bool(heading) != task.thinking:
        raise ValueError(f"must {'have a' if task.thinking else 'have no'} line 'Reasoning: '")
    thinking = _body("reasoning", why) if task.thinking else None
    return TaskAnswer(Attempt(_body("description", said), thinking))
