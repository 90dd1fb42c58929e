"""What a judge answered in one rollout, read for the rewards; a bad answer is kept as its error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cac_reward.answers import (
    AnswerError,
    BoxReader,
    parse_findings,
    parse_scan_answer,
    read_thousandths,
)
from cac_reward.data.annotations import AnnotatedClip
from cac_reward.questions import CLEAN_ANSWER
from cac_reward.report import VERDICTS, Finding, TimeWindow
from cac_reward.training.task_answers import Task, TaskAnswer, parse_task_answer

NUM_TURNS = 2


@dataclass(frozen=True, kw_only=True)
class JudgedRollout:
    """A conversation of the CaC protocol beside what is known of its clip."""

    clip: AnnotatedClip
    """The truth."""
    windows: tuple[TimeWindow, ...] = ()
    """What turn 1 asked to see again, also where turn 2 went wrong; none if it ended clean."""
    findings: tuple[Finding, ...] = ()
    """Of turn 2; none where anything went wrong."""
    verdict: str | None = None
    """One of `report.VERDICTS`; None where anything went wrong."""
    scan_ended_clean: bool = False
    """Whether turn 1 gave a clean verdict at once."""
    errors: tuple[str | None, str | None] = (None, None)
    """What is wrong with each turn; None where nothing is."""

    @property
    def failed(self) -> bool:
        """Whether there is no verdict to score."""
        return self.verdict is None

    @property
    def follows_form(self) -> bool:
        """Whether every turn parses and the conversation is whole."""
        return self.errors == (None, None)


@dataclass(frozen=True, kw_only=True)
class TaskRollout:
    """The answer to a task of a single turn beside what is known of its clip."""

    clip: AnnotatedClip
    """The truth."""
    task: Task
    """What was asked."""
    answer: TaskAnswer | None = None
    """None where nothing could be read."""
    error: str | None = None
    """What is wrong with the answer; None where nothing is. A task with reflection that was
    answered once, without looking back, has both an answer and an error."""
    num_tokens: int = 0
    """Length of the whole answer."""
    num_first_tokens: int = 0
    """Length of the first attempt's thinking and answer; 0 where the answer has none."""

    @property
    def failed(self) -> bool:
        """Whether there is no answer to score."""
        return self.answer is None

    @property
    def follows_form(self) -> bool:
        """Whether the answer has the form that was asked for."""
        return self.error is None


Rollout = JudgedRollout | TaskRollout


def read_rollout(
    turns: Sequence[str],
    clip: AnnotatedClip,
    *,
    duration_seconds: float,
    box_reader: BoxReader = read_thousandths,
    call_format: str = "json",
    types: Sequence[str] | None = None,
) -> JudgedRollout:
    """Read a conversation of the CaC protocol; a bad answer is no exception.

    A whole conversation is a clean verdict in turn 1 and nothing more, or a call of the tool in
    turn 1 and, in turn 2, findings and the verdict line that goes with them.

    Args:
        turns: What the judge said, in order: raw texts, tool calls included.
        clip: The truth that the rewards compare with.
        duration_seconds: Length of the clip as it was shown; no window may end after it.
        box_reader: The family's way to write boxes, at the size of turn 2's frames.
        call_format: The family's way to write a call, of `answers.CALL_TAGS`.
        types: Kinds of fault that findings may name, or None for any.
    """
    rollout = JudgedRollout(clip=clip)
    if not turns:
        return replace(rollout, errors=("turn 1 must be an answer, got none", None))
    try:
        windows = parse_scan_answer(turns[0], duration_seconds, call_format)
    except AnswerError as error:
        return replace(rollout, errors=(str(error), None))
    if not windows:
        rollout = replace(rollout, scan_ended_clean=True)
        if len(turns) > 1:
            return replace(rollout, errors=(None, f"{CLEAN_ANSWER!r} must end it, got more turns"))
        return replace(rollout, verdict=VERDICTS[0])
    rollout = replace(rollout, windows=windows)
    if len(turns) != NUM_TURNS:
        wrong = f"a call must be followed by one more turn, got {len(turns) - 1}"
        return replace(rollout, errors=(None, wrong))
    try:
        findings = parse_findings(turns[1], duration_seconds, box_reader=box_reader, types=types)
    except AnswerError as error:
        return replace(rollout, errors=(None, str(error)))
    if "\n" not in turns[1].strip():
        # The parser reads the JSON alone too, for the scorer, which weighs the verdict itself.
        return replace(rollout, errors=(None, "findings must be followed by a verdict line"))
    return replace(rollout, findings=findings, verdict=VERDICTS[bool(findings)])


def count_words(text: str) -> int:
    """Length of a text where no tokenizer is at hand."""
    return len(text.split())


def read_task_rollout(
    text: str,
    clip: AnnotatedClip,
    task: Task,
    *,
    duration_seconds: float | None = None,
    count_tokens: Callable[[str], int] = count_words,
) -> TaskRollout:
    """Read the answer to a task; a bad answer is no exception.

    Args:
        text: What the judge said.
        clip: The truth that the rewards compare with.
        task: What was asked.
        duration_seconds: Length of the clip as it was shown; by default the one that it states.
        count_tokens: Length of a text, for `reflection_length`.

    Raises:
        ValueError: If the task is 'grounding' and nobody knows how long the clip is.
    """
    rollout = TaskRollout(clip=clip, task=task, num_tokens=count_tokens(text))
    try:
        answer = parse_task_answer(task, text, clip, duration_seconds=duration_seconds)
    except AnswerError as error:
        rollout = replace(rollout, error=str(error))
        if not task.reflection:
            return rollout
        once = replace(task, reflection=False)
        try:
            answer = parse_task_answer(once, text, clip, duration_seconds=duration_seconds)
        except AnswerError:
            return rollout
        return replace(rollout, answer=answer)
    first = text.partition("<reflection>")[0] if task.reflection else ""
    return replace(rollout, answer=answer, num_first_tokens=count_tokens(first) if first else 0)
