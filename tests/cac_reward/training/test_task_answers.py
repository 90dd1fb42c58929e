"""Answers to tasks: what is written is read back, and nothing else is."""

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cac_reward.answers import MAX_ANSWER_CHARACTERS, MAX_WINDOWS, AnswerError
from cac_reward.data.annotations import LETTERS, AnnotatedClip
from cac_reward.report import TimeWindow
from cac_reward.training.task_answers import (
    Attempt,
    Task,
    TaskAnswer,
    parse_task_answer,
    parse_value,
    write_task_answer,
)

CLASSES = ("Fire", "Normal", "Traffic_accident", "Food Safety")
CLIP = AnnotatedClip(
    path="a.mp4", duration_seconds=6.0, question="What happens?", options=("x", "y", "z")
)
QA, PLAIN_QA = Task(kind="qa"), Task(kind="qa", thinking=False)
GROUNDING = Task(kind="grounding", thinking=False)
CLASSIFICATION = Task(kind="classification", thinking=False, classes=CLASSES)
TASKS = [
    Task(
        kind=kind,
        thinking=thinking,
        reflection=reflection,
        classes=CLASSES if kind == "classification" else (),
    )
    for kind, thinking, reflection in itertools.product(
        ("qa", "grounding", "classification"), (True, False), (True, False)
    )
]
TASKS += [Task(kind="description", thinking=thinking) for thinking in (True, False)]
# No tags and no heading: '<' and '>' stand alone in the test of what a text may hold.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=60)
SAID = TEXT.map(str.strip).filter(lambda text: bool(text) and "\nReasoning: " not in text)


@st.composite
def window_sets(draw: Any) -> tuple[TimeWindow, ...]:
    """Different windows in order of time, on the grid of 0.01 s that answers are written in."""
    windows = set()
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, 599))
        windows.add(TimeWindow(start / 100, draw(st.integers(start + 1, 600)) / 100))
    return tuple(sorted(windows))


@st.composite
def task_answers(draw: Any, task: Task) -> TaskAnswer:
    values = {
        "qa": st.sampled_from(LETTERS[: len(CLIP.options)]),
        "classification": st.sampled_from(CLASSES),
        "grounding": window_sets(),
        "description": SAID,
    }[task.kind]
    attempts = [
        Attempt(draw(values), draw(SAID) if task.thinking else None)
        for _ in range(1 + task.reflection)
    ]
    if not task.reflection:
        return TaskAnswer(attempts[0])
    return TaskAnswer(attempts[1], attempts[0], draw(SAID))


@pytest.mark.parametrize("task", TASKS, ids=str)
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_what_is_written_is_read_back(task: Task, data: st.DataObject) -> None:
    answer = data.draw(task_answers(task))
    assert parse_task_answer(task, write_task_answer(task, answer), CLIP) == answer


@pytest.mark.parametrize("task", TASKS, ids=str)
@settings(max_examples=10, deadline=None)
@given(st.data())
def test_an_answer_in_the_form_of_another_task_is_refused(task: Task, data: st.DataObject) -> None:
    for other in TASKS:
        if other == task:
            continue
        text = write_task_answer(other, data.draw(task_answers(other)))
        # A letter is no class here, so the forms of 'qa' and 'classification' differ too.
        with pytest.raises(AnswerError, match=f"^{task.kind}: "):
            parse_task_answer(task, text, CLIP)


def test_the_forms_to_the_letter() -> None:
    seen = TimeWindow(0.25, 1.0), TimeWindow(2.0, 3.5)
    assert write_task_answer(QA, TaskAnswer(Attempt("B", "it falls"))) == (
        "<think>it falls</think><answer>B</answer>"
    )
    assert write_task_answer(GROUNDING, TaskAnswer(Attempt(seen[:1]))) == (
        "<answer>Anomaly</answer><glue>[0.25, 1.00]</glue>"
    )
    assert write_task_answer(GROUNDING, TaskAnswer(Attempt(seen))) == (
        "<answer>Anomaly</answer><glue>[[0.25, 1.00], [2.00, 3.50]]</glue>"
    )
    assert write_task_answer(GROUNDING, TaskAnswer(Attempt(()))) == (
        "<answer>Normal</answer><glue>[-1.0, -1.0]</glue>"
    )
    looked_back = Task(kind="classification", classes=CLASSES, reflection=True)
    answer = TaskAnswer(Attempt("Fire", "smoke"), Attempt("Normal", "calm"), "I missed the smoke.")
    assert write_task_answer(looked_back, answer) == (
        "<think>calm</think><answer>Normal</answer><reflection>I missed the smoke.</reflection>"
        "<think>smoke</think><answer>Fire</answer>"
    )
    assert parse_task_answer(looked_back, write_task_answer(looked_back, answer), CLIP).value == (
        "Fire"
    )
    described = Task(kind="description")
    assert write_task_answer(described, TaskAnswer(Attempt("A street.", "Nothing."))) == (
        "Description: A street.\nReasoning: Nothing."
    )


def test_white_space_between_tags_is_no_fault() -> None:
    text = " <think>\n it falls\n</think>\n\n<answer> B </answer>\n"
    assert parse_task_answer(QA, text, CLIP) == TaskAnswer(Attempt("B", "it falls"))


GOOD = "<think>why</think><answer>B</answer>"


@pytest.mark.parametrize(
    ("task", "text", "why"),
    [
        (QA, "", "<think>..<answer> and nothing else"),
        (QA, "B", "nothing else"),
        (QA, GOOD + " I hope.", "nothing else"),
        (QA, "So: " + GOOD, "nothing else"),
        (QA, GOOD + GOOD, "nothing else"),
        (QA, "<answer>B</answer><think>why</think>", "nothing else"),
        (QA, "<think>why<answer>B</answer>", "nothing else"),
        (QA, "<think>a<think>b</think></think><answer>B</answer>", "nothing else"),
        (QA, "<THINK>why</THINK><ANSWER>B</ANSWER>", "nothing else"),
        (QA, "<think> </think><answer>B</answer>", "must say something"),
        (QA, "<think>a <tool_call> b</think><answer>B</answer>", "hold no tag, got '<tool_call>'"),
        (QA, "<think>a <|im_end|> b</think><answer>B</answer>", "hold no tag"),
        (QA, "<think>a or b</think><answer>D</answer>", "one of A, B, C, got 'D'"),
        (PLAIN_QA, "<answer>b</answer>", "one of A, B, C, got 'b'"),
        (PLAIN_QA, "<answer>B. y</answer>", "one of A, B, C"),
        (PLAIN_QA, "<answer>AB</answer>", "one of A, B, C"),
        (PLAIN_QA, f"<answer>{'B' * MAX_ANSWER_CHARACTERS}</answer>", "at most 20000 characters"),
        (CLASSIFICATION, "<answer>fire</answer>", "one of Fire, Normal"),
        (CLASSIFICATION, "<answer>Fire, Normal</answer>", "one of Fire, Normal"),
        (GROUNDING, "<answer>Anomaly</answer>", "<answer>..<glue> and nothing else"),
        (GROUNDING, "<answer>Anomaly</answer><glue>[-1.0, -1.0]</glue>", "agree with its windows"),
        (GROUNDING, "<answer>Normal</answer><glue>[1.0, 2.0]</glue>", "agree with its windows"),
        (GROUNDING, "<answer>Fire</answer><glue>[1.0, 2.0]</glue>", "agree with its windows"),
        (GROUNDING, "<answer>Anomaly</answer><glue>1 to 2</glue>", "must be JSON"),
        (GROUNDING, "<answer>Anomaly</answer><glue>00:01</glue>", "must be JSON"),
        (GROUNDING, "<answer>Anomaly</answer><glue>5</glue>", "glue must be a list"),
        (GROUNDING, "<answer>Anomaly</answer><glue>[]</glue>", "window must be a list of 2"),
        (GROUNDING, "<answer>Anomaly</answer><glue>[1]</glue>", "window must be a list of 2"),
        (GROUNDING, "<answer>Anomaly</answer><glue>[1, NaN]</glue>", "finite numbers"),
        (GROUNDING, "<answer>Anomaly</answer><glue>[1, true]</glue>", "must be a number"),
        (GROUNDING, "<answer>Anomaly</answer><glue>[2.0, 1.0]</glue>", "0 <= start < end"),
        (GROUNDING, "<answer>Anomaly</answer><glue>[1.0, 1.0]</glue>", "0 <= start < end"),
        (GROUNDING, "<answer>Anomaly</answer><glue>[0, 0]</glue>", "0 <= start < end"),
        (GROUNDING, "<answer>Anomaly</answer><glue>[1.0, 6.5]</glue>", "within the clip's 6.00 s"),
        (
            GROUNDING,
            "<answer>Anomaly</answer><glue>[[1.0, 2.0], [-1.0, -1.0]]</glue>",
            "0 <= start < end",
        ),
        (
            GROUNDING,
            f"<answer>Anomaly</answer><glue>{[[1, 2]] * (MAX_WINDOWS + 1)}</glue>",
            "at most 16 windows, got 17",
        ),
        (Task(kind="description"), "A street.", "must begin with 'Description: '"),
        (Task(kind="description"), "Description: A street.", "must have a line 'Reasoning: '"),
        (Task(kind="description"), "Description: a\nReasoning: ", "must have a line"),
        (Task(kind="description"), "Description: a <|b\nReasoning: c", "must hold no tag"),
        (Task(kind="description", thinking=False), "Description: a\nReasoning: b", "no line"),
    ],
)
def test_anything_else_is_refused(task: Task, text: str, why: str) -> None:
    with pytest.raises(AnswerError, match=f"^{task.kind}: .*{why}.*; the answer was"):
        parse_task_answer(task, text, CLIP)


def test_a_reflection_in_other_orders_is_refused() -> None:
    task = Task(kind="qa", thinking=False, reflection=True)
    parts = ["<answer>A</answer>", "<reflection>no</reflection>", "<answer>B</answer>"]
    good = "".join(parts)
    assert parse_task_answer(task, good, CLIP) == TaskAnswer(Attempt("B"), Attempt("A"), "no")
    for order in [(1, 0, 2), (0, 2, 1), (0, 2), (1, 2), (0, 1), (0, 1, 2, 1, 2)]:
        text = "".join(parts[number] for number in order)
        with pytest.raises(AnswerError, match="nothing else"):
            parse_task_answer(task, text, CLIP)


def test_the_length_of_the_clip_bounds_windows_and_must_be_known() -> None:
    text = "<answer>Anomaly</answer><glue>[1.0, 2.5]</glue>"
    unknown = AnnotatedClip(path="a.mp4")
    with pytest.raises(ValueError, match="duration_seconds must be known for grounding, got none"):
        parse_task_answer(GROUNDING, text, unknown)
    read = parse_task_answer(GROUNDING, text, unknown, duration_seconds=2.5)
    assert read.value == (TimeWindow(1.0, 2.5),)
    # What was shown goes before what the annotation states.
    with pytest.raises(AnswerError, match="within the clip's 2.00 s"):
        parse_task_answer(GROUNDING, text, CLIP, duration_seconds=2.0)
    assert parse_value(GROUNDING, "[1.0, 2.5]", unknown, None) == (TimeWindow(1.0, 2.5),)


@pytest.mark.parametrize(
    ("task", "answer", "why"),
    [
        (
            QA,
            TaskAnswer(Attempt("B")),
            "exactly where the task has .thinking=True., got None",
        ),
        (PLAIN_QA, TaskAnswer(Attempt("B", "why")), "thinking=False., got 'why'"),
        (QA, TaskAnswer(Attempt("B", "a </think> b")), "thinking must hold no tag, got '</think>'"),
        (QA, TaskAnswer(Attempt("B", "\n")), "thinking must say something"),
        (PLAIN_QA, TaskAnswer(Attempt("B"), Attempt("A"), "no"), "reflection=False., got Attempt"),
        (PLAIN_QA, TaskAnswer(Attempt("B"), None, "no"), "reflection=False., got None and 'no'"),
        (
            Task(kind="qa", thinking=False, reflection=True),
            TaskAnswer(Attempt("B"), Attempt("A")),
            "reflection=True., got Attempt.* and None",
        ),
        (
            GROUNDING,
            TaskAnswer(Attempt(tuple(TimeWindow(n, n + 1) for n in range(MAX_WINDOWS + 1)))),
            "windows must be at most 16, got 17",
        ),
        (
            Task(kind="description", thinking=False),
            TaskAnswer(Attempt("A street.\nReasoning: none")),
            "description must hold no line 'Reasoning:'",
        ),
        (Task(kind="description"), TaskAnswer(Attempt("A street.")), "answer must be a descript"),
        (Task(kind="description"), TaskAnswer(Attempt((), "why")), "answer must be a description"),
    ],
)
def test_an_answer_that_does_not_fit_its_task_is_not_written(
    task: Task, answer: TaskAnswer, why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        write_task_answer(task, answer)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"kind": "tag"}, r"kind must be one of \('qa'"),
        ({"kind": "qa", "wording": "long"}, "wording must be one of"),
        ({"kind": "description", "reflection": True}, "reflection must be false for the kind"),
        ({"kind": "qa", "classes": ("a", "b")}, "classes must be empty for the kind 'qa'"),
        ({"kind": "classification"}, "at least two different names, got"),
        ({"kind": "classification", "classes": ("a", "a")}, "at least two different names"),
        ({"kind": "classification", "classes": ("a", "<answer>")}, "classes must hold no tag"),
        ({"kind": "classification", "classes": ("a", " ")}, "classes must say something"),
    ],
)
def test_a_task_checks_itself(values: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Task(**values)


PIECES = [
    *(
        f"<{slash}{tag}>"
        for tag in ("think", "answer", "glue", "reflection")
        for slash in ("", "/")
    ),
    *("Normal", "Anomaly", "Fire", "A", "[1, 2]", "[[1, 2], [0, 3]]", "[-1.0, -1.0]", "<|", " "),
    *("Description: ", "\nReasoning: ", "1e999", "[" * 2000, "9" * 5000, "\ud800"),
]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(TASKS), st.data())
def test_what_is_read_is_written_alike_and_anything_else_is_an_answer_error(
    task: Task, data: st.DataObject
) -> None:
    whole = write_task_answer(task, data.draw(task_answers(task)))
    cut = data.draw(st.integers(0, len(whole)))
    soup = "".join(data.draw(st.lists(st.sampled_from(PIECES), max_size=8)))
    for text in (soup, whole[:cut] + soup + whole[cut:], whole[cut:]):
        try:
            answer = parse_task_answer(task, text, CLIP)
        except AnswerError:
            continue
        assert parse_task_answer(task, write_task_answer(task, answer), CLIP) == answer


def test_a_long_answer_is_refused_or_read_in_time() -> None:
    # The parser's cost must not explode on repeated half-tags.
    text = "<think>" + "<thin" * 3000 + "</think><answer>B</answer>"
    assert parse_task_answer(QA, text, CLIP).value == "B"
    with pytest.raises(AnswerError):
        parse_task_answer(QA, "<think>" * 2800, CLIP)
