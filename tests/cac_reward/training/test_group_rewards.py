"""Rewards of a group: weights, what is missing, what failed, what ties."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cac_reward.data.annotations import AnnotatedClip
from cac_reward.training.group_rewards import all_failed, combine, missing_rewards, tied
from cac_reward.training.rollouts import JudgedRollout, TaskRollout, read_rollout, read_task_rollout
from cac_reward.training.task_answers import Task

CLIP = AnnotatedClip(path="a.mp4", question="What?", options=("x", "y"), answer="A")
VALUES = st.one_of(st.none(), st.just(math.nan), st.floats(0, 1))
WEIGHTED = st.lists(st.tuples(VALUES, st.floats(0, 100)), min_size=1, max_size=6).filter(
    lambda rows: any(weight > 1e-3 for _, weight in rows)
)


@settings(max_examples=300, deadline=None)
@given(WEIGHTED)
def test_a_missing_reward_leaves_out_its_weight(
    rows: list[tuple[float | None, float]],
) -> None:
    values = {str(number): value for number, (value, _) in enumerate(rows)}
    weights = {str(number): weight for number, (_, weight) in enumerate(rows)}
    there = [(value, weight) for value, weight in rows if value is not None and value == value]
    assert len(missing_rewards(values)) == len(rows) - len(there)
    result = combine(values, weights)
    if not any(weight for _, weight in there):
        assert math.isnan(result)
        return
    expected = sum(v * w for v, w in there) / sum(w for _, w in there)
    assert result == pytest.approx(expected, abs=1e-9)
    # What is missing could as well not have been asked for.
    asked = {name: value for name, value in values.items() if name not in missing_rewards(values)}
    assert combine(asked, {name: weights[name] for name in asked}) == result


def test_missing_rewards_are_named() -> None:
    assert missing_rewards({"a": 0.0, "b": math.nan, "c": None, "d": 1.0}) == ["b", "c"]
    assert math.isnan(combine({"a": None, "b": 1.0}, {"a": 1.0, "b": 0.0}))


@pytest.mark.parametrize(
    ("weights", "why"),
    [
        ({"a": 1.0}, r"weights must have the names of the values \['a', 'b'\], got \['a'\]"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, "weights must have the names"),
        ({"a": 1.0, "b": -1.0}, "weights must be at least 0 and one above 0, got"),
        ({"a": 0.0, "b": 0.0}, "weights must be at least 0 and one above 0"),
        ({"a": 1.0, "b": math.nan}, "weights must be at least 0"),
        ({"a": 1.0, "b": math.inf}, "weights must be at least 0"),
    ],
)
def test_weights_are_checked(weights: dict[str, float], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        combine({"a": 1.0, "b": 0.5}, weights)


def test_a_group_in_which_no_answer_can_be_read() -> None:
    bad: list[JudgedRollout | TaskRollout] = [
        read_rollout([text], CLIP, duration_seconds=2.0) for text in ("", "Clean.", "<tool_call>")
    ]
    good = read_rollout(["Verdict: clean"], CLIP, duration_seconds=2.0)
    assert all_failed(bad)
    assert not all_failed([*bad, good])
    task = Task(kind="qa", thinking=False)
    assert all_failed([read_task_rollout("A", CLIP, task)] * 2)
    assert not all_failed([read_task_rollout(f"<answer>{x}</answer>", CLIP, task) for x in "AC"])
    with pytest.raises(ValueError, match="rollouts must hold a group's answers, got none"):
        all_failed([])


@pytest.mark.parametrize(
    ("rewards", "tie"),
    [
        ([], True),
        ([math.nan, math.nan], True),
        ([0.5], True),
        ([0.5, math.nan, 0.5], True),
        ([0.5, 0.5 + 1e-9], True),
        ([0.5, 0.5001], False),
        ([0.0, math.nan, 1.0], False),
        ([0.5, 0.5, 0.5, 0.4], False),
    ],
)
def test_ties(rewards: list[float], tie: bool) -> None:
    assert tied(rewards) is tie
