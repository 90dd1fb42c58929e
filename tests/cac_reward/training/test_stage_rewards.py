"""Stage rewards: brute force, order, what is missing, and the defects of published rewards."""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cac_reward.answers import write_findings, write_scan_answer
from cac_reward.data.annotations import AnnotatedClip
from cac_reward.report import UNSPECIFIED, Box, Finding, TimeWindow
from cac_reward.training.group_rewards import combine
from cac_reward.training.rollouts import (
    JudgedRollout,
    TaskRollout,
    read_rollout,
    read_task_rollout,
)
from cac_reward.training.stage_rewards import (
    JUDGE_REWARDS,
    REFLECTION_TABLE,
    REWARDS,
    TASK_REWARDS,
    accuracy,
    follows_form,
    grounding_iou,
    measure,
    question_answer,
    reflection_length,
    reflection_quality,
    scan_coverage,
    spatial_iou,
    temporal_iou,
    type_match,
)
from cac_reward.training.task_answers import Attempt, Task, TaskAnswer, write_task_answer

REPOSITORY = Path(__file__).resolve().parents[3]
LENGTH = 12
LOCALISED = (temporal_iou, spatial_iou, scan_coverage, type_match)
UNKNOWN = AnnotatedClip(path="u.mp4")
CLEAN = AnnotatedClip(path="c.mp4", verdict="clean", duration_seconds=LENGTH)
UNSEEN = AnnotatedClip(path="a.mp4", verdict="anomalous", duration_seconds=LENGTH)
TAG = Task(kind="grounding", thinking=False)


def fault(
    start: float, end: float, *boxes: tuple[float, float, float, float, float], kind: str = "jump"
) -> Finding:
    return Finding(kind, TimeWindow(start, end), tuple(Box(*box) for box in boxes))


def broken(*findings: Finding) -> AnnotatedClip:
    return AnnotatedClip(path="b.mp4", findings=findings, duration_seconds=LENGTH)


def judged(
    clip: AnnotatedClip, *findings: Finding, windows: Sequence[TimeWindow] | None = None
) -> JudgedRollout:
    """A rollout whose second turn states these findings; without any the judge says 'clean'."""
    asked = [finding.window for finding in findings] if windows is None else windows
    return JudgedRollout(
        clip=clip,
        windows=tuple(asked),
        findings=findings,
        verdict="anomalous" if findings else "clean",
        scan_ended_clean=not asked,
    )


def garbled(clip: AnnotatedClip, *windows: TimeWindow) -> JudgedRollout:
    return JudgedRollout(clip=clip, windows=windows, errors=(None, "no JSON"))


# ---- what is right, wrong, missing and unreadable ------------------------------------------------


FULL = fault(2, 5, (2, 0.2, 0.2, 0.6, 0.7), (4, 0.3, 0.2, 0.7, 0.7))


@pytest.mark.parametrize("reward", LOCALISED)
def test_a_clean_clip_called_clean_earns_the_whole_localisation(reward: Any) -> None:
    assert reward(judged(CLEAN)) == 1
    # A second look that found nothing is no fault.
    assert reward(judged(CLEAN, windows=[TimeWindow(1, 2)])) == 1
    assert reward(judged(CLEAN, FULL)) == 0
    assert reward(garbled(CLEAN)) == 0


@pytest.mark.parametrize("reward", LOCALISED)
def test_an_anomalous_clip_called_clean_earns_no_localisation(reward: Any) -> None:
    clip = broken(FULL)
    assert reward(judged(clip, FULL)) == pytest.approx(1, abs=1e-12)
    assert reward(judged(clip)) == 0
    assert reward(garbled(clip)) == 0
    far = fault(11, 12, (11, 0.9, 0.9, 1, 1))
    if reward is not type_match:
        assert 0 < reward(judged(clip, far)) < 0.5


@pytest.mark.parametrize("reward", LOCALISED)
@pytest.mark.parametrize("clip", [UNKNOWN, UNSEEN])
def test_localisation_that_is_not_annotated_is_missing(reward: Any, clip: AnnotatedClip) -> None:
    for rollout in (judged(clip), judged(clip, FULL), garbled(clip)):
        assert math.isnan(reward(rollout))


def test_a_part_of_the_annotation_may_be_missing() -> None:
    placeless = broken(fault(2, 5))
    assert math.isnan(spatial_iou(judged(placeless, FULL)))
    assert temporal_iou(judged(placeless, FULL)) == 1
    nameless = broken(FULL, fault(7, 8, kind=UNSPECIFIED))
    assert math.isnan(type_match(judged(nameless, FULL)))
    assert temporal_iou(judged(nameless, FULL)) > 0.5


def test_accuracy() -> None:
    clip = broken(FULL)
    answers = judged(clip, FULL), judged(clip), garbled(clip)
    assert [accuracy(answer) for answer in answers] == [1, 0, 0]
    assert [accuracy(replace(answer, clip=UNSEEN)) for answer in answers] == [1, 0, 0]
    assert [accuracy(replace(answer, clip=CLEAN)) for answer in answers] == [0, 1, 0]
    assert all(math.isnan(accuracy(replace(answer, clip=UNKNOWN))) for answer in answers)


def test_form() -> None:
    assert follows_form(judged(UNKNOWN)) == 1
    assert follows_form(garbled(UNKNOWN)) == 0
    assert follows_form(JudgedRollout(clip=UNKNOWN, errors=("no call", None))) == 0
    for task, error in itertools.product((TAG, Task(kind="qa")), (None, "no tags")):
        answered = TaskRollout(clip=UNKNOWN, task=task, error=error)
        assert follows_form(answered) == (error is None)


BOXES = st.tuples(*[st.integers(0, 9)] * 2, *[st.integers(1, 10)] * 2).filter(
    lambda box: box[0] < box[2] and box[1] < box[3]
)


@st.composite
def faults(draw: Any) -> Finding:
    """Windows in whole seconds, boxes in tenths of the frame at whole seconds inside them."""
    start = draw(st.integers(0, LENGTH - 1))
    end = draw(st.integers(start + 1, LENGTH))
    boxes = [
        (draw(st.integers(start, end)), *(edge / 10 for edge in box))
        for box in draw(st.lists(BOXES, max_size=3))
    ]
    return fault(start, end, *boxes, kind=draw(st.sampled_from(("jump", "text", UNSPECIFIED))))


FINDINGS = st.lists(faults(), max_size=3)
TRUTHS = st.one_of(
    st.sampled_from((UNKNOWN, UNSEEN, CLEAN)),
    FINDINGS.filter(bool).map(lambda found: broken(*found)),
)
WINDOWS = st.lists(faults().map(lambda one: one.window), max_size=3)


@settings(max_examples=120, deadline=None)
@given(TRUTHS, st.lists(st.tuples(FINDINGS, WINDOWS, st.booleans()), min_size=2, max_size=4))
def test_missing_depends_on_the_clip_alone_and_rewards_are_in_0_to_1(
    clip: AnnotatedClip, answers: list[tuple[list[Finding], list[TimeWindow], bool]]
) -> None:
    rollouts = [
        garbled(clip, *windows) if bad else judged(clip, *found, windows=windows)
        for found, windows, bad in answers
    ]
    for name, reward in JUDGE_REWARDS.items():
        values = [reward(rollout) for rollout in rollouts]
        assert len({math.isnan(value) for value in values}) == 1, name
        assert all(math.isnan(value) or 0 <= value <= 1 for value in values), name


@settings(max_examples=100, deadline=None)
@given(TRUTHS, FINDINGS)
def test_the_truth_earns_1_and_nothing_earns_more(
    clip: AnnotatedClip, other: list[Finding]
) -> None:
    assume(clip.verdict is not None)
    best, some = judged(clip, *clip.findings), judged(clip, *other)
    if clip is UNSEEN:
        best = judged(clip, FULL)
    for reward in JUDGE_REWARDS.values():
        value = reward(best)
        assert math.isnan(value) or value == pytest.approx(1, abs=1e-9)
        assert math.isnan(value) or reward(some) <= value + 1e-9


# ---- time, by brute force ------------------------------------------------------------------------


def seconds(windows: Sequence[TimeWindow]) -> set[int]:
    return {
        second
        for window in windows
        for second in range(int(window.start_seconds), int(window.end_seconds))
    }


def runs(windows: Sequence[TimeWindow]) -> list[tuple[int, int]]:
    """First and last second of each run of seconds without a gap."""
    covered = seconds(windows)
    firsts = sorted(second for second in covered if second - 1 not in covered)
    lasts = sorted(second for second in covered if second + 1 not in covered)
    return list(zip(firsts, lasts, strict=True))


def mean_distance(first: Sequence[TimeWindow], second: Sequence[TimeWindow]) -> float:
    """Mean seconds between a run and the nearest of the other side, over the hull."""
    ours, theirs = runs(first), runs(second)
    gaps = [
        min(max(0, other[0] - one[1] - 1, one[0] - other[1] - 1) for other in others)
        for these, others in ((ours, theirs), (theirs, ours))
        for one in these
    ]
    every = seconds(first) | seconds(second)
    return sum(gaps) / len(gaps) / (max(every) + 1 - min(every))


@settings(max_examples=120, deadline=None)
@given(FINDINGS.filter(bool), FINDINGS.filter(bool))
def test_temporal_iou_counts_seconds(true: list[Finding], found: list[Finding]) -> None:
    ours, theirs = [one.window for one in found], [one.window for one in true]
    here, there = seconds(ours), seconds(theirs)
    shaped = len(here & there) / len(here | there) - mean_distance(ours, theirs)
    value = temporal_iou(judged(broken(*true), *found, windows=[TimeWindow(0, 1)]))
    assert value == pytest.approx((1 + shaped) / 2, abs=1e-9)


@settings(max_examples=120, deadline=None)
@given(FINDINGS.filter(bool), WINDOWS.filter(bool), st.booleans())
def test_scan_coverage_counts_seconds_whatever_turn_2_says(
    true: list[Finding], asked: list[TimeWindow], bad: bool
) -> None:
    theirs = [one.window for one in true]
    here, there = seconds(asked), seconds(theirs)
    precision, recall = len(here & there) / len(here), len(here & there) / len(there)
    f2 = 5 * precision * recall / (4 * precision + recall) if recall else 0.0
    clip = broken(*true)
    rollout = garbled(clip, *asked) if bad else judged(clip, windows=asked)
    expected = (1 + f2 - mean_distance(asked, theirs)) / 2
    assert scan_coverage(rollout) == pytest.approx(expected, abs=1e-9)


def shifted(reward: Callable[[JudgedRollout], float], offset: float) -> float:
    """Reward of one finding as long as the true one, so many seconds after it."""
    return reward(judged(broken(fault(4, 6)), fault(4 + offset, 6 + offset)))


@pytest.mark.parametrize("reward", [temporal_iou, scan_coverage])
def test_the_nearer_in_time_the_better_also_where_nothing_overlaps(reward: Any) -> None:
    later = [shifted(reward, quarter / 4) for quarter in range(25)]
    assert all(near > far for near, far in itertools.pairwise(later))
    earlier = [shifted(reward, -quarter / 4) for quarter in range(17)]
    assert all(near > far for near, far in itertools.pairwise(earlier))
    assert later[:17] == pytest.approx(earlier, abs=1e-12)
    assert later[8] == 0.5  # They touch.


def test_a_missed_second_costs_more_than_a_needless_one() -> None:
    clip = broken(fault(4, 8))
    late, wide, all_of_it, exact = (
        scan_coverage(judged(clip, windows=[TimeWindow(*window)]))
        for window in ((5, 8), (3, 8), (0, 12), (4, 8))
    )
    assert late < wide < exact == 1
    # Asking for the whole clip misses nothing and is no way to the full reward.
    assert 0.5 < all_of_it < 0.9


def test_saying_a_window_twice_changes_nothing() -> None:
    clip = broken(fault(1, 2), fault(9, 10))
    once = judged(clip, fault(1, 2), fault(4, 5))
    twice = judged(clip, *[fault(1, 2)] * 5, fault(1.25, 1.75), fault(4, 5))
    for reward in (temporal_iou, scan_coverage, type_match):
        assert reward(once) == reward(twice)


# ---- place, by brute force -----------------------------------------------------------------------


def cells(boxes: Sequence[Box]) -> set[tuple[int, int]]:
    return {
        (x, y)
        for box in boxes
        for x in range(round(box.x1 * 10), round(box.x2 * 10))
        for y in range(round(box.y1 * 10), round(box.y2 * 10))
    }


def shaped_overlap(ours: Sequence[Box], theirs: Sequence[Box]) -> float:
    """IoU of two regions minus the mean share of each box's hull with its nearest partner."""
    here, there = cells(ours), cells(theirs)

    def empty_share(one: Box, other: Box) -> float:
        hull = Box(
            0,
            min(one.x1, other.x1),
            min(one.y1, other.y1),
            max(one.x2, other.x2),
            max(one.y2, other.y2),
        )
        return 1 - len(cells([one, other])) / len(cells([hull]))

    penalties = [min(empty_share(one, other) for other in theirs) for one in ours]
    penalties += [min(empty_share(one, other) for other in ours) for one in theirs]
    return len(here & there) / len(here | there) - sum(penalties) / len(penalties)


def expected_spatial(true: Sequence[Finding], found: Sequence[Finding]) -> float:
    """From the docstring, time by time; NaN where no annotated time is left."""

    def known(time: float) -> bool:
        return not any(
            not one.boxes and one.window.start_seconds <= time <= one.window.end_seconds
            for one in true
        )

    def there(side: Sequence[Finding], time: float) -> list[Box]:
        boxes = []
        for one in side:
            if one.boxes and one.window.start_seconds <= time <= one.window.end_seconds:
                nearest = min(abs(box.time_seconds - time) for box in one.boxes)
                boxes += [box for box in one.boxes if abs(box.time_seconds - time) == nearest]
        return boxes

    every = {box.time_seconds for one in true for box in one.boxes}
    values: list[float | None] = []
    for time in filter(known, sorted(every)):
        ours = there(found, time)
        values.append(shaped_overlap(ours, there(true, time)) if ours else None)
    if not values:
        return math.nan
    if all(value is None for value in values):
        drawn = [one.window for one in found if one.boxes]
        if not drawn:
            return 0.0
        return (1 - mean_distance(drawn, [one.window for one in true if one.boxes])) / 4
    value = sum(-1.0 if one is None else one for one in values) / len(values)
    return (1 + (value if value >= 0 else value / 2)) / 2


@settings(max_examples=200, deadline=None)
@given(FINDINGS.filter(bool), FINDINGS.filter(bool))
def test_spatial_iou_counts_cells(true: list[Finding], found: list[Finding]) -> None:
    value = spatial_iou(judged(broken(*true), *found))
    assert value == pytest.approx(expected_spatial(true, found), abs=1e-9, nan_ok=True)


def test_the_nearer_the_box_the_better_also_where_nothing_overlaps() -> None:
    clip = broken(fault(2, 4, (3, 0.0, 0.4, 0.2, 0.6)))
    values = [
        spatial_iou(judged(clip, fault(2, 4, (3, left / 20, 0.4, left / 20 + 0.2, 0.6))))
        for left in range(17)
    ]
    assert values[0] == pytest.approx(1, abs=1e-12)
    assert all(near > far for near, far in itertools.pairwise(values))
    elsewhere = [
        spatial_iou(judged(clip, fault(late, late + 1, (late, 0.0, 0.4, 0.2, 0.6))))
        for late in (4.5, 5, 7, 9, 11)
    ]
    assert all(near > far for near, far in itertools.pairwise([values[-1], *elsewhere]))
    assert elsewhere[-1] > spatial_iou(judged(clip, fault(2, 4))) == 0


def test_a_box_holds_for_its_finding_s_window_and_no_longer() -> None:
    clip = broken(fault(2, 5, *((time, 0.2, 0.2, 0.6, 0.6) for time in (2, 3, 4, 5))))
    one_box = fault(2, 5, (3, 0.2, 0.2, 0.6, 0.6))
    assert spatial_iou(judged(clip, one_box)) == pytest.approx(1, abs=1e-12)
    short = fault(2, 3.5, (3, 0.2, 0.2, 0.6, 0.6))
    # Right at two times of four, and none at the others: their mean is 0.
    assert spatial_iou(judged(clip, short)) == pytest.approx(0.5, abs=1e-12)


def test_what_is_drawn_while_a_fault_of_unknown_place_is_on_is_not_judged() -> None:
    place, other = (3, 0.1, 0.1, 0.3, 0.3), (3, 0.6, 0.6, 0.9, 0.9)
    sure, unsure = fault(2, 6, place, (6, *place[1:])), fault(2, 4, kind="text")
    both = judged(broken(sure, unsure), sure, fault(2, 4, other, kind="text"))
    assert spatial_iou(both) == pytest.approx(1, abs=1e-12)
    assert spatial_iou(replace(both, clip=broken(sure))) < 0.9
    assert math.isnan(spatial_iou(replace(both, clip=broken(fault(2, 4, place), unsure))))


def test_type_match_is_dice_over_names() -> None:
    clip = broken(fault(1, 2, kind="jump"), fault(3, 4, kind="text"))
    named = {
        ("jump",): 2 / 3,
        ("jump", "text"): 1,
        ("jump", "jump"): 2 / 3,
        ("jump", "text", "flicker"): 0.8,
        ("flicker",): 0,
    }
    for kinds, value in named.items():
        rollout = judged(clip, *(fault(1, 2, kind=kind) for kind in kinds))
        assert type_match(rollout) == pytest.approx(value, abs=1e-12)


# ---- tasks of a single turn ----------------------------------------------------------------------


ASKED = AnnotatedClip(
    path="q.mp4",
    duration_seconds=LENGTH,
    verdict="anomalous",
    category="Fire",
    question="What?",
    options=("x", "y"),
    answer="B",
)
CLASSES = ("Fire", "Normal")


def answered(task: Task, clip: AnnotatedClip, *values: Any) -> TaskRollout:
    """A rollout whose attempts say these values, the last one finally."""
    attempts = [Attempt(value) for value in values]
    answer = TaskAnswer(attempts[-1], *((attempts[0], "hm") if len(attempts) > 1 else ()))
    return TaskRollout(clip=clip, task=task, answer=answer)


def test_question_answer() -> None:
    qa = Task(kind="qa")
    classify = Task(kind="classification", classes=CLASSES)
    for task, right, wrong in ((qa, "B", "A"), (classify, "Fire", "Normal")):
        assert question_answer(answered(task, ASKED, right)) == 1
        assert question_answer(answered(task, ASKED, wrong)) == 0
        assert question_answer(answered(task, ASKED, right, wrong)) == 0
        assert question_answer(TaskRollout(clip=ASKED, task=task, error="no tags")) == 0
        assert math.isnan(question_answer(answered(task, UNKNOWN, right)))
        assert math.isnan(question_answer(TaskRollout(clip=UNKNOWN, task=task, error="no tags")))
    description = Task(kind="description")
    seen = replace(ASKED, description="It burns.")
    assert math.isnan(question_answer(answered(description, seen, "It burns.")))


def test_the_answer_of_a_grounding_is_normal_or_anomaly() -> None:
    window = (TimeWindow(1, 2),)
    for clip, right, wrong in ((CLEAN, (), window), (UNSEEN, window, ())):
        assert question_answer(answered(TAG, clip, right)) == 1
        assert question_answer(answered(TAG, clip, wrong)) == 0
        assert question_answer(TaskRollout(clip=clip, task=TAG, error="no tags")) == 0
    assert math.isnan(question_answer(answered(TAG, UNKNOWN, window)))


@settings(max_examples=100, deadline=None)
@given(FINDINGS.filter(bool), WINDOWS.filter(bool))
def test_grounding_iou_counts_seconds(true: list[Finding], said: list[TimeWindow]) -> None:
    theirs = [one.window for one in true]
    here, there = seconds(said), seconds(theirs)
    shaped = len(here & there) / len(here | there) - mean_distance(said, theirs)
    value = grounding_iou(answered(TAG, broken(*true), tuple(sorted(set(said)))))
    assert value == pytest.approx((1 + shaped) / 2, abs=1e-9)


def test_grounding_without_windows() -> None:
    window = (TimeWindow(1, 2),)
    assert grounding_iou(answered(TAG, CLEAN, ())) == 1
    assert grounding_iou(answered(TAG, CLEAN, window)) == 0
    assert grounding_iou(answered(TAG, broken(FULL), ())) == 0
    assert grounding_iou(TaskRollout(clip=CLEAN, task=TAG, error="no tags")) == 0
    for clip in (UNKNOWN, UNSEEN):
        assert math.isnan(grounding_iou(answered(TAG, clip, window)))
    assert math.isnan(grounding_iou(answered(Task(kind="qa"), ASKED, "B")))


@pytest.mark.parametrize(
    ("values", "earned"),
    [("AB", 1.0), ("BB", 0.75), ("B", 0.5), ("BA", 0.25), ("AA", 0.0), ("A", 0.0)],
)
def test_reflection_quality_is_srpo_s_table(values: str, earned: float) -> None:
    task = Task(kind="qa", reflection=True)
    assert reflection_quality(answered(task, ASKED, *values)) == earned
    assert math.isnan(reflection_quality(answered(task, UNKNOWN, *values)))
    assert math.isnan(reflection_quality(answered(Task(kind="qa"), ASKED, *values)))
    assert reflection_quality(TaskRollout(clip=ASKED, task=task, error="no tags")) == 0
    assert set(REFLECTION_TABLE.values()) == {1.0, 0.75, 0.5, 0.25, 0.0}


def test_a_grounding_is_right_from_half_an_overlap_on() -> None:
    task = Task(kind="grounding", thinking=False, reflection=True)
    clip = broken(fault(4, 8))
    right, wrong = (TimeWindow(6, 8),), (TimeWindow(6.1, 8),)
    assert reflection_quality(answered(task, clip, wrong, right)) == 1
    assert reflection_quality(answered(task, clip, right, wrong)) == 0.25
    assert reflection_quality(answered(task, clip, (), wrong)) == 0
    assert reflection_quality(answered(task, CLEAN, right, ())) == 1


def test_reflection_length_is_highest_at_twice_the_first_attempt() -> None:
    task = Task(kind="qa", reflection=True)

    def length(whole: int, first: int) -> float:
        rollout = TaskRollout(clip=ASKED, task=task, num_tokens=whole, num_first_tokens=first)
        return reflection_length(rollout)

    assert length(200, 100) == 1
    assert length(250, 100) == pytest.approx(math.exp(-1), abs=1e-12)
    assert length(150, 100) == pytest.approx(math.exp(-1), abs=1e-12)
    assert length(300, 100) == pytest.approx(math.exp(-4), abs=1e-12)
    assert length(30, 0) == 0
    assert math.isnan(reflection_length(TaskRollout(clip=ASKED, task=Task(kind="qa"))))


TASKS = [
    Task(kind=kind, reflection=reflection, classes=CLASSES if kind == "classification" else ())
    for kind in ("qa", "grounding", "classification")
    for reflection in (False, True)
]


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(TASKS),
    st.one_of(TRUTHS, st.just(ASKED)),
    st.lists(st.tuples(WINDOWS, st.integers(0, 2)), min_size=2, max_size=4),
)
def test_missing_depends_on_clip_and_task_alone(
    task: Task, clip: AnnotatedClip, answers: list[tuple[list[TimeWindow], int]]
) -> None:
    rollouts = []
    for windows, attempts in answers:
        said = tuple(windows) if task.kind == "grounding" else "B" if windows else "Fire"
        wrong = TaskRollout(clip=clip, task=task, error="no tags", num_tokens=5)
        rollouts.append(answered(task, clip, *[said] * attempts) if attempts else wrong)
    for name, reward in TASK_REWARDS.items():
        values = [reward(rollout) for rollout in rollouts]
        assert len({math.isnan(value) for value in values}) == 1, name
        assert all(math.isnan(value) or 0 <= value <= 1 for value in values), name


# ---- the table -----------------------------------------------------------------------------------


def test_rewards_are_found_by_name() -> None:
    assert {*JUDGE_REWARDS, *TASK_REWARDS} == set(REWARDS)
    rollout = judged(broken(FULL), FULL)
    values = measure(rollout, list(REWARDS))
    assert list(values) == list(REWARDS)
    own = {name: value for name, value in values.items() if not math.isnan(value)}
    assert own == pytest.approx(dict.fromkeys(JUDGE_REWARDS, 1.0))
    task = answered(Task(kind="qa", reflection=True), ASKED, "A", "B")
    values = measure(task, ["question_answer", "accuracy", "format"])
    assert values["question_answer"] == values["format"] == 1
    assert math.isnan(values["accuracy"])
    with pytest.raises(ValueError, match="rewards must be of accuracy, .*, got 'iou'"):
        measure(task, ["iou"])


def test_the_page_on_rewards_names_them_all() -> None:
    page = (REPOSITORY / "docs" / "stage_rewards.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert sorted(rows) == sorted([*JUDGE_REWARDS, *TASK_REWARDS])
    example = re.findall(r"(\w+): [\d.]+", page.partition("```yaml")[2].partition("```")[0])
    assert example
    assert set(example) <= set(REWARDS)


# ---- defects of published rewards ----------------------------------------------------------------


WEIGHTS = dict.fromkeys(JUDGE_REWARDS, 1.0)


def total(clip: AnnotatedClip, *turns: str) -> float:
    rollout = read_rollout(turns, clip, duration_seconds=LENGTH)
    return combine(measure(rollout, list(WEIGHTS)), WEIGHTS)


def conversation(*findings: Finding) -> tuple[str, ...]:
    call = write_scan_answer([finding.window for finding in findings])
    return (call, write_findings(findings)) if findings else (call,)


def test_a_right_normal_answer_earns_all_where_vau_r1_gives_it_no_iou() -> None:
    """Its normal rows hold 0 and 0 and its reward looks for -1 and -1, so 'Normal' earned 0."""
    text = "<answer>Normal</answer><glue>[-1.0, -1.0]</glue>"
    rollout = read_task_rollout(text, CLEAN, TAG)
    names = ["question_answer", "grounding_iou", "format"]
    assert measure(rollout, names) == dict.fromkeys(names, 1.0)
    # The sentinel of its files is no answer: it is a window without length.
    zeros = read_task_rollout("<answer>Normal</answer><glue>[0.0, 0.0]</glue>", CLEAN, TAG)
    assert measure(zeros, names) == dict.fromkeys(names, 0.0)


def test_a_right_clean_verdict_earns_most_where_skyra_gives_it_nothing() -> None:
    """Its patterns for 'real' and 'fake' are the same, so that a right 'real' earned 0."""
    right = total(CLEAN, *conversation())
    assert right == 1
    wrong = [total(CLEAN, *conversation(*[fault(n, n + 1) for n in range(k)])) for k in (1, 3, 6)]
    wrong.append(total(CLEAN, "It is real."))
    assert max(wrong) < 0.5 < right


def test_more_evidence_earns_nothing_by_its_number() -> None:
    """Skyra pays by the number of places named, wherever they are."""
    clip = broken(FULL)
    one = total(clip, *conversation(FULL))
    more = [fault(n, n + 1, (n, 0, 0, 0.1, 0.1), kind="text") for n in range(6, 6 + 4)]
    many = [total(clip, *conversation(FULL, *more[:count])) for count in range(5)]
    assert many[0] == one == pytest.approx(1, abs=1e-12)
    assert all(fewer > further for fewer, further in itertools.pairwise(many))


def test_windows_that_miss_differ_where_plain_iou_is_0_for_all() -> None:
    clip = broken(FULL)
    near, far = fault(5.5, 6.5), fault(11, 12)
    assert total(clip, *conversation(near)) > total(clip, *conversation(far))
    texts = [
        write_task_answer(TAG, TaskAnswer(Attempt((one.window,) if one else ())))
        for one in (FULL, near, far, None)
    ]
    values = [grounding_iou(read_task_rollout(text, clip, TAG)) for text in texts]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == 4


def test_a_judge_in_doubt_does_not_do_best_to_say_clean() -> None:
    """Half of the clips are broken: any finding on them must pay more than a blind 'clean'."""
    clip = broken(FULL)
    miss = fault(8, 9, (8, 0.8, 0.8, 0.9, 0.9))
    for name in ("temporal_iou", "spatial_iou", "scan_coverage"):
        reward = JUDGE_REWARDS[name]
        assert reward(judged(clip, miss)) > reward(judged(clip)) == 0
