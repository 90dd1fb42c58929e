"""Rollouts: what the judge said is kept, and a bad answer is kept as what is wrong with it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cac_reward.answers import pixel_reader, pixel_writer, write_findings, write_scan_answer
from cac_reward.data.annotations import AnnotatedClip
from cac_reward.report import Box, Finding, TimeWindow
from cac_reward.training.rollouts import (
    JudgedRollout,
    TaskRollout,
    count_words,
    read_rollout,
    read_task_rollout,
)
from cac_reward.training.task_answers import Attempt, Task, TaskAnswer

WINDOW = TimeWindow(0.25, 1.0)
FINDING = Finding("jump", WINDOW, (Box(0.25, 0.25, 0.5, 0.5, 1.0),), 2, "it jumps")
CLIP = AnnotatedClip(
    path="a.mp4", duration_seconds=3.0, question="What?", options=("x", "y"), answer="B"
)
CALL = write_scan_answer([WINDOW])
FOUND = write_findings([FINDING])
QA = Task(kind="qa", thinking=False)
REFLECTING = Task(kind="qa", thinking=True, reflection=True)


def read(*turns: str) -> JudgedRollout:
    return read_rollout(turns, CLIP, duration_seconds=3.0)


def test_whole_conversations() -> None:
    clean = read("Verdict: clean")
    assert clean == JudgedRollout(clip=CLIP, verdict="clean", scan_ended_clean=True)
    cleared = read(CALL, write_findings([]))
    assert cleared == JudgedRollout(clip=CLIP, windows=(WINDOW,), verdict="clean")
    found = read(CALL, FOUND)
    assert found == JudgedRollout(
        clip=CLIP, windows=(WINDOW,), findings=(FINDING,), verdict="anomalous"
    )
    for whole in (clean, cleared, found):
        assert whole.follows_form
        assert not whole.failed


def test_a_family_s_own_calls_and_boxes() -> None:
    answer = write_findings([FINDING], pixel_writer(28, 56))
    assert "[14, 14, 28, 28]" in answer
    rollout = read_rollout(
        [write_scan_answer([WINDOW], "xml"), answer],
        CLIP,
        duration_seconds=3.0,
        box_reader=pixel_reader(28, 56),
        call_format="xml",
        types=["jump"],
    )
    assert rollout.findings == (FINDING,)
    assert read_rollout([CALL], CLIP, duration_seconds=3.0, call_format="xml").windows == ()


@pytest.mark.parametrize(
    ("turns", "turn", "why", "windows"),
    [
        ((), 1, "turn 1 must be an answer, got none", ()),
        (("",), 1, "tool call: must be one <tool_call>", ()),
        (("Verdict: anomalous",), 1, "tool call: must be", ()),
        ((CALL[:-5], FOUND), 1, "tool call: must be", ()),
        ((write_scan_answer([TimeWindow(0, 9)]), FOUND), 1, "within the clip's 3.00 s", ()),
        (("Verdict: clean", FOUND), 2, "'Verdict: clean' must end it, got more turns", ()),
        ((CALL,), 2, "followed by one more turn, got 0", (WINDOW,)),
        ((CALL, CALL, FOUND), 2, "followed by one more turn, got 2", (WINDOW,)),
        ((CALL, FOUND, FOUND), 2, "followed by one more turn, got 2", (WINDOW,)),
        ((CALL, "It jumps."), 2, "findings: must be JSON", (WINDOW,)),
        ((CALL, FOUND.replace("jump", "dance", 1)), 2, "type must be one of jump", (WINDOW,)),
        ((CALL, FOUND.partition("\n")[0]), 2, "followed by a verdict line", (WINDOW,)),
        ((CALL, FOUND.replace("anomalous", "clean")), 2, "contradicts its 1 findings", (WINDOW,)),
        ((CALL, FOUND[:-1]), 2, "must be one line of JSON, then", (WINDOW,)),
    ],
)
def test_a_conversation_that_went_wrong(
    turns: tuple[str, ...], turn: int, why: str, windows: tuple[TimeWindow, ...]
) -> None:
    rollout = read_rollout(turns, CLIP, duration_seconds=3.0, types=["jump"])
    assert rollout.failed
    assert not rollout.follows_form
    assert rollout.windows == windows
    assert rollout.findings == ()
    assert why in (rollout.errors[turn - 1] or "")
    assert rollout.errors[2 - turn] is None


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.text(), st.sampled_from([CALL, FOUND, "Verdict: clean"])), max_size=3))
def test_no_answer_raises(turns: list[str]) -> None:
    rollout = read_rollout(turns, CLIP, duration_seconds=3.0)
    assert rollout.failed != rollout.follows_form
    assert rollout.failed != (rollout.verdict in ("clean", "anomalous"))
    for task in (QA, REFLECTING, Task(kind="grounding"), Task(kind="description")):
        answered = read_task_rollout("".join(turns), CLIP, task)
        assert (answered.error is None) == (answered.answer is not None)


def test_answers_to_a_task() -> None:
    right = read_task_rollout("<answer>B</answer>", CLIP, QA)
    assert right == TaskRollout(clip=CLIP, task=QA, answer=TaskAnswer(Attempt("B")), num_tokens=1)
    assert right.follows_form
    assert not right.failed
    wrong = read_task_rollout("I say B", CLIP, QA)
    assert wrong.failed
    assert not wrong.follows_form
    assert wrong.error == "qa: must be <answer> and nothing else; the answer was 'I say B'"
    assert (wrong.num_tokens, wrong.num_first_tokens) == (3, 0)


def test_a_task_that_was_answered_without_looking_back() -> None:
    rollout = read_task_rollout("<think>it is</think><answer>B</answer>", CLIP, REFLECTING)
    assert rollout.answer == TaskAnswer(Attempt("B", "it is"))
    assert not rollout.failed
    assert not rollout.follows_form
    assert rollout.num_first_tokens == 0
    nothing = read_task_rollout("<answer>B</answer>", CLIP, REFLECTING)
    assert nothing.failed


def test_lengths_are_those_of_the_caller_s_tokenizer() -> None:
    first = "<think>is it x</think><answer>A</answer>"
    text = first + "<reflection>no</reflection><think>it is y</think><answer>B</answer>"
    rollout = read_task_rollout(text, CLIP, REFLECTING, count_tokens=len)
    assert (rollout.num_tokens, rollout.num_first_tokens) == (len(text), len(first))
    assert read_task_rollout(text, CLIP, REFLECTING).num_first_tokens == count_words(first) == 3
    plain = Task(kind="qa", thinking=True)
    assert read_task_rollout(first, CLIP, plain, count_tokens=len).num_first_tokens == 0


def test_the_length_of_the_clip_as_shown_bounds_a_grounding() -> None:
    task = Task(kind="grounding", thinking=False)
    text = "<answer>Anomaly</answer><glue>[1.0, 2.5]</glue>"
    assert not read_task_rollout(text, CLIP, task).failed
    assert read_task_rollout(text, CLIP, task, duration_seconds=2.0).failed
    with pytest.raises(ValueError, match="duration_seconds must be known"):
        read_task_rollout(text, AnnotatedClip(path="b.mp4"), task)
