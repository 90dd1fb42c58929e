"""The rewards of GRPO for judges: pure functions of one rollout, each in [0, 1].

Rules that hold for all of them:

* NaN means that the annotation does not say, never that the answer is bad. It depends on the clip
  and the task alone, so all answers to one question have a value or none has.
* An answer that cannot be read earns 0 wherever it could have earned anything.
* A clean clip that is called clean earns every localisation reward in full; one that is called
  anomalous earns 0, and so does an anomalous clip that is called clean.
* Overlaps are shaped, reward = (1 + shaped overlap) / 2: what does not overlap still earns more the
  nearer it is, always more than 0, and only the truth earns 1. On an anomalous clip a wrong window
  or box so earns more than 'clean', which plain IoU does not grant: with it a judge in doubt does
  best to say 'clean'.

Seconds and boxes follow `cac_reward.overlap`; windows of one side that touch count as one. What is
called SRPO's or VAU-R1's is theirs; CaC's formulas are not public, so its two are CaC-style here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from cac_reward.overlap import tube_giou, window_set_giou, window_set_iou
from cac_reward.report import UNSPECIFIED, VERDICTS, Box, Finding, TimeWindow
from cac_reward.training.rollouts import JudgedRollout, Rollout, TaskRollout
from cac_reward.training.task_answers import Attempt, Value
from cac_reward.training.tasks import right_value

GROUNDED_IOU = 0.5
"""Temporal IoU from which on a grounding counts as right where right or wrong is asked."""
COVERAGE_BETA = 2.0
"""Its square is how much more a missed second counts than a needless one in `scan_coverage`."""
REFLECTION_TABLE: Mapping[tuple[bool | None, bool], float] = {
    (False, True): 1.0,
    (True, True): 0.75,
    (None, True): 0.5,
    (True, False): 0.25,
    (False, False): 0.0,
    (None, False): 0.0,
}
"""By whether the first and the final answer are right; None where there is no first one."""
JudgeReward = Callable[[JudgedRollout], float]
TaskReward = Callable[[TaskRollout], float]


def accuracy(rollout: JudgedRollout) -> float:
    """Whether the verdict is right.

    result = 1 if verdict = truth, else 0; NaN where nobody has said whether the clip is anomalous

    Source:
        CaC's conventional reward, arXiv:2605.11723.
    """
    if rollout.clip.verdict is None:
        return math.nan
    return float(rollout.verdict == rollout.clip.verdict)


def temporal_iou(rollout: JudgedRollout) -> float:
    """How well the windows of the findings, all together, lie on the true ones.

    result = (1 + shaped IoU of the two sets of windows) / 2, see `overlap.window_set_giou`;
             NaN where the windows are not annotated

    The findings are scored, not what turn 1 asked to see: they stand before the verdict, so they
    are the intermediate localisation that CaC's T-IoU supervises, they are what reports and
    evaluation use, and turn 1 sees too few frames to know ends to the frame. Turn 1 has
    `scan_coverage`.

    Source:
        CaC-style (arXiv:2605.11723 gives no formula); shape: generalised IoU, arXiv:1902.09630.
    """
    known = _localised(rollout)
    if known is not None:
        return known
    found, true = _stretches(rollout.findings), _stretches(rollout.clip.findings)
    return (1 + window_set_giou(found, true)) / 2


def scan_coverage(rollout: JudgedRollout) -> float:
    """Whether turn 1 asked to see the true windows, at little expense.

    result = (1 + F - away) / 2
    F      = (1 + b^2) * hit / ((1 + b^2) * hit + b^2 * missed + needless), b = COVERAGE_BETA
    away   = mean over all windows of (gap to the other side's nearest window) / hull
             (hull: seconds from the first start to the last end)

    hit, missed, needless: seconds that are true and asked for, only true, only asked for. A missed
    second is lost to turn 2 while a needless one only thins out its frames, so it counts four
    times as much; pure recall would be earned by asking for the whole clip. NaN where the windows
    are not annotated. Turn 1 earns this whatever becomes of turn 2, so that a good second look is
    not unlearned for what follows; but a clean clip must end in a clean verdict.

    Source:
        Ours.
    """
    true = _stretches(rollout.clip.findings)
    if not true:
        known = _localised(rollout)
        assert known is not None
        return known
    asked = _merged(rollout.windows)
    if not asked:
        return 0.0
    # Shares of the seconds of either side: hit + missed + needless = 1.
    hit = window_set_iou(asked, true)
    missed = 1 - window_set_iou(asked, [*asked, *true])
    needless = max(0.0, 1 - hit - missed)
    weight = COVERAGE_BETA**2
    score = (1 + weight) * hit / ((1 + weight) * hit + weight * missed + needless)
    return (1 + score - _distance(asked, true)) / 2


def spatial_iou(rollout: JudgedRollout) -> float:
    """How well the boxes lie on the true ones, at the times at which there are true ones.

    result = (1 + shaped overlap of the tubes) / 2, see `overlap.tube_giou`

    At an annotated time a finding of either side has its boxes nearest in time as long as its
    window lasts: a judge draws only into frames that it saw. If the judge has none at such a time,

    result = (1 - away) / 4, away as in `scan_coverage`, of the windows of findings with boxes

    and 0 where there is no box at all. Times at which a true fault is on whose place is not
    annotated are left out: what is drawn there may be right. NaN where nothing is left. Times
    without a true box are the business of `temporal_iou`.

    Source:
        CaC-style (arXiv:2605.11723 gives no formula); shape: generalised IoU, arXiv:1902.09630.
    """
    clip = rollout.clip
    times = _box_times(clip.findings)
    if not times and clip.verdict != VERDICTS[0]:
        return math.nan
    known = _localised(rollout)
    if known is not None:
        return known
    found = _boxes_at(times, rollout.findings)
    if found:
        return (1 + tube_giou(found, _boxes_at(times, clip.findings))) / 2
    drawn = _stretches([finding for finding in rollout.findings if finding.boxes])
    if not drawn:
        return 0.0
    shown = _stretches([finding for finding in clip.findings if finding.boxes])
    return (1 - _distance(drawn, shown)) / 4


def type_match(rollout: JudgedRollout) -> float:
    """Whether the findings name the true kinds of fault.

    result = 2 * |named & true| / (|named| + |true|), over different names (Dice); NaN where a
             true fault's kind is not annotated ('unspecified')

    Source:
        Ours.
    """
    true = {finding.type for finding in rollout.clip.findings}
    if UNSPECIFIED in true:
        return math.nan
    known = _localised(rollout)
    if known is not None:
        return known
    named = {finding.type for finding in rollout.findings}
    return 2 * len(named & true) / (len(named) + len(true))


def follows_form(rollout: Rollout) -> float:
    """Whether every turn parses and the conversation is whole.

    result = 1 or 0; never NaN

    Source:
        VAU-R1 (arXiv:2505.23504), whose format reward is 1 for a full match; SRPO's is 0.5.
    """
    return float(rollout.follows_form)


def question_answer(rollout: TaskRollout) -> float:
    """Whether the final answer is right, letter by letter.

    result = 1 if the letter or class is the right one, else 0; for 'grounding' whether 'Normal' or
             'Anomaly' is; NaN where the truth is not annotated, and for 'description'

    Source:
        VAU-R1's answer reward, arXiv:2505.23504.
    """
    if rollout.task.kind == "grounding":
        if rollout.clip.verdict is None:
            return math.nan
        said = None if rollout.answer is None else VERDICTS[bool(rollout.answer.value)]
        return float(said == rollout.clip.verdict)
    truth = right_value(rollout.task, rollout.clip)
    if truth is None or rollout.task.kind == "description":
        return math.nan
    return float(rollout.answer is not None and rollout.answer.value == truth)


def grounding_iou(rollout: TaskRollout) -> float:
    """How well the windows of a grounding answer lie on the true ones.

    result = (1 + shaped IoU of the two sets of windows) / 2; 1 where both have none ('Normal' for
             a clean clip), 0 where one has; NaN where the windows are not annotated and for other
             tasks

    Source:
        VAU-R1's IoU reward (arXiv:2505.23504) with clean clips told by the verdict, not by a pair
        of numbers, and with disjoint windows told apart.
    """
    truth = right_value(rollout.task, rollout.clip)
    if rollout.task.kind != "grounding" or truth is None:
        return math.nan
    if rollout.answer is None:
        return 0.0
    return (1 + window_set_giou(_spans(rollout.answer.value), _spans(truth))) / 2


def reflection_quality(rollout: TaskRollout) -> float:
    """Whether looking back made the answer better, or at least not worse.

    result = 1 wrong then right, 0.75 right twice, 0.5 right at once without a second answer,
             0.25 right then wrong, 0 wrong twice; NaN for tasks without reflection and where the
             truth is not annotated

    A grounding is right if its 'Normal' or 'Anomaly' is and its windows have an IoU of
    GROUNDED_IOU (ours). 'Wrong then right' earns most: a judge may learn to be wrong at first.
    Weigh it below `question_answer`, or reward the first answer too.

    Source:
        SRPO's accuracy table, https://github.com/SUSTechBruce/SRPO_MLLMs. SRVAU-R1
        (arXiv:2602.01004) has such a reward; its formula is not public.
    """
    truth = right_value(rollout.task, rollout.clip)
    if not rollout.task.reflection or truth is None:
        return math.nan
    if rollout.answer is None:
        return 0.0
    first = None if rollout.answer.first is None else _is_right(rollout.answer.first, truth)
    return REFLECTION_TABLE[first, _is_right(rollout.answer.final, truth)]


def reflection_length(rollout: TaskRollout) -> float:
    """Whether the whole answer is about twice as long as the first attempt in it.

    result = exp(-((L - 2 * l) / (0.5 * l))^2), L and l tokens of the whole and of the first
             thinking and answer; 0 without a first attempt; NaN for tasks without reflection

    Source:
        SRPO's length reward, https://github.com/SUSTechBruce/SRPO_MLLMs, with its weight 0.1.
    """
    if not rollout.task.reflection:
        return math.nan
    first = rollout.num_first_tokens
    if not first:
        return 0.0
    return math.exp(-(((rollout.num_tokens - 2 * first) / (0.5 * first)) ** 2))


JUDGE_REWARDS: Mapping[str, JudgeReward] = {
    "accuracy": accuracy,
    "temporal_iou": temporal_iou,
    "spatial_iou": spatial_iou,
    "scan_coverage": scan_coverage,
    "type_match": type_match,
    "format": follows_form,
}
"""Of the two-turn conversation, by their names in a YAML."""
TASK_REWARDS: Mapping[str, TaskReward] = {
    "question_answer": question_answer,
    "grounding_iou": grounding_iou,
    "reflection_quality": reflection_quality,
    "reflection_length": reflection_length,
    "format": follows_form,
}
"""Of the tasks of a single turn, by their names in a YAML."""
REWARDS: Mapping[str, JudgeReward | TaskReward] = {**JUDGE_REWARDS, **TASK_REWARDS}
"""All of them."""


def rewards_of(lesson: str, *, reflects: bool = False) -> tuple[str, ...]:
    """Names of the rewards that answers to a lesson can earn.

    Args:
        lesson: 'inspect', or a task of a single turn.
        reflects: whether any of its answers is looked back at.
    """
    if lesson == "inspect":
        return tuple(JUDGE_REWARDS)
    return tuple(
        name
        for name in TASK_REWARDS
        if (reflects or not name.startswith("reflection"))
        and (lesson == "grounding" or name != "grounding_iou")
    )


def measure(rollout: Rollout, names: Sequence[str]) -> dict[str, float]:
    """The named rewards of a rollout; NaN for one of the other kind of rollout, which has none.

    Raises:
        ValueError: If a name is unknown.
    """
    table: Mapping[str, Callable] = (
        JUDGE_REWARDS if isinstance(rollout, JudgedRollout) else TASK_REWARDS
    )
    for name in names:
        if name not in REWARDS:
            raise ValueError(f"rewards must be of {', '.join(REWARDS)}, got {name!r}")
    return {name: table[name](rollout) if name in table else math.nan for name in names}


def _localised(rollout: JudgedRollout) -> float | None:
    """A localisation reward where windows and boxes have no say in it, else None."""
    clip = rollout.clip
    if clip.verdict == VERDICTS[0]:
        return float(rollout.verdict == VERDICTS[0])
    if not clip.findings:
        return math.nan
    return None if rollout.verdict == VERDICTS[1] else 0.0


def _merged(windows: Sequence[TimeWindow]) -> list[TimeWindow]:
    """Windows as stretches that do not touch, so that saying one twice weighs nothing."""
    merged: list[TimeWindow] = []
    for window in sorted(windows):
        if merged and window.start_seconds <= merged[-1].end_seconds:
            before = merged.pop()
            end = max(before.end_seconds, window.end_seconds)
            window = TimeWindow(before.start_seconds, end)
        merged.append(window)
    return merged


def _stretches(findings: Sequence[Finding]) -> list[TimeWindow]:
    return _merged([finding.window for finding in findings])


def _distance(first: Sequence[TimeWindow], second: Sequence[TimeWindow]) -> float:
    """Mean gap of a window to the other side's nearest, as a share of the hull; in [0, 1)."""
    return window_set_iou(first, second) - window_set_giou(first, second)


def _box_times(findings: Sequence[Finding]) -> list[float]:
    """Times with boxes, but for those at which a fault is on whose place is not annotated."""
    placeless = [finding.window for finding in findings if not finding.boxes]
    times = {box.time_seconds for finding in findings for box in finding.boxes}
    return sorted(time for time in times if not any(window.holds(time) for window in placeless))


def _boxes_at(times: Sequence[float], findings: Sequence[Finding]) -> list[Box]:
    return [
        replace(box, time_seconds=time)
        for time in times
        for finding in findings
        if finding.window.holds(time)
        for box in finding.boxes_at(time)
    ]


def _spans(value: Value) -> list[TimeWindow]:
    assert not isinstance(value, str)
    return _merged(value)


def _is_right(attempt: Attempt, truth: Value) -> bool:
    if isinstance(attempt.value, str) or isinstance(truth, str):
        return attempt.value == truth
    return window_set_iou(attempt.value, truth) >= GROUNDED_IOU
