"""Windows, boxes and tubes against counting cells, and against every matching."""

import math
from itertools import permutations

import pytest
import torch

from cac_reward.evaluation.grounding import (
    count_is_right,
    dense_tube_iou,
    effective_temporal_f1,
    frame_labels,
    frame_scores,
    is_found,
    mean_box_iou,
    raw_boxes,
    temporal_iou,
)
from cac_reward.overlap import window_iou
from cac_reward.report import AnomalyReport, Box, Finding, TimeWindow


def finding(start: float, end: float, *boxes: Box, kind: str = "melts") -> Finding:
    return Finding(kind, TimeWindow(start, end), boxes)


def some_findings(generator: torch.Generator, most: int = 4) -> list[Finding]:
    """Up to `most` findings with windows of whole seconds in 12 seconds."""
    count = int(torch.randint(0, most + 1, (), generator=generator))
    starts = torch.randint(0, 11, (count,), generator=generator).tolist()
    lengths = torch.randint(1, 5, (count,), generator=generator).tolist()
    return [
        finding(start, min(12, start + length))
        for start, length in zip(starts, lengths, strict=True)
    ]


def best_sum(ours: list[TimeWindow], theirs: list[TimeWindow]) -> float:
    """By trying every matching."""
    short, long = sorted((ours, theirs), key=len)
    return max(
        sum(window_iou(one, other) for one, other in zip(short, picked, strict=True))
        for picked in permutations(long, len(short))
    )


def test_windows_against_counting_seconds_and_every_matching() -> None:
    generator = torch.Generator().manual_seed(0)
    several = 0
    for _ in range(150):
        ours, theirs = some_findings(generator), some_findings(generator)
        cells = [frame_labels(side, fps=1.0, num_frames=12) for side in (ours, theirs)]
        both = sum(a and b for a, b in zip(*cells, strict=True))
        either = sum(a or b for a, b in zip(*cells, strict=True))
        assert temporal_iou(ours, theirs) == pytest.approx(both / either if either else 1.0)
        sets = [sorted({one.window for one in side}) for side in (ours, theirs)]
        total = len(sets[0]) + len(sets[1])
        expected = 2 * best_sum(*sets) / total if total else 1.0
        assert effective_temporal_f1(ours, theirs) == pytest.approx(expected)
        assert count_is_right(ours, theirs) == (len(sets[0]) == len(sets[1]))
        several += len(sets[0]) > 1 and len(sets[1]) > 1
    assert several > 30


def test_one_long_window_over_many_does_not_pay() -> None:
    true = [finding(0, 1), finding(2, 3), finding(4, 5)]
    assert effective_temporal_f1([finding(0, 5)], true) == pytest.approx(2 * 0.2 / 4)
    assert effective_temporal_f1(true, true) == 1
    assert count_is_right([finding(0, 5)], true) == 0


def test_boxes_are_compared_where_the_annotation_has_them() -> None:
    true = [finding(0, 2, Box(0.0, 0, 0, 0.5, 1), Box(1.0, 0.5, 0, 1, 1))]
    same = [finding(0, 2, Box(0.5, 0, 0, 0.5, 1))]
    # At 0 s the box lies on the true one, at 1 s beside it.
    assert mean_box_iou(same, true) == pytest.approx(0.5)
    assert mean_box_iou([finding(0, 0.5, Box(0.2, 0, 0, 0.5, 1))], true) == pytest.approx(0.5)
    assert mean_box_iou([finding(1.5, 2, Box(1.6, 0.5, 0, 1, 1))], true) == 0
    assert mean_box_iou([], true) == 0
    assert math.isnan(mean_box_iou(same, [finding(0, 2)]))
    assert math.isnan(dense_tube_iou(same, [finding(0, 2)], fps=8, num_frames=16))


@pytest.mark.parametrize("fps", [4.0, 125.0])
def test_tubes_against_counting_cells(fps: float) -> None:
    true = [finding(0, 8 / fps, Box(0.0, 0, 0, 0.5, 0.5), Box(6 / fps, 0.5, 0.5, 1, 1))]
    ours = [finding(2 / fps, 12 / fps, Box(3 / fps, 0.25, 0, 0.75, 1))]
    cells = torch.zeros(2, 16, 4, 4, dtype=torch.bool)
    # Between the true boxes at frames 0 and 6, frame 3 is as near to both and has both.
    cells[0, :4, :2, :2] = True
    cells[0, 3:8, 2:, 2:] = True
    cells[1, 2:12, :, 1:3] = True
    expected = (cells[0] & cells[1]).sum() / (cells[0] | cells[1]).sum()
    found = dense_tube_iou(ours, true, fps=fps, num_frames=16)
    assert found == pytest.approx(expected.item())
    assert dense_tube_iou(true, true, fps=fps, num_frames=16) == 1
    assert dense_tube_iou([], true, fps=fps, num_frames=16) == 0


def report(score: float | None = 0.2, **given: object) -> AnomalyReport:
    values: dict = {"judge_id": "judge", "fps": 4.0, "num_frames": 8, "score": score, **given}
    return AnomalyReport(**values)


def test_frames_have_the_clips_probability_where_something_is_found() -> None:
    found = (finding(0.5, 1.0),)
    assert frame_scores(0.8, found, fps=4, num_frames=8) == [0, 0, 0.8, 0.8, 0, 0, 0, 0]
    assert frame_scores(0.8, (), fps=4, num_frames=8) == [0.8] * 8


def test_a_finding_is_found_from_three_tenths_on() -> None:
    assert is_found(finding(0, 3), [finding(8, 9), finding(0, 10)])
    assert not is_found(finding(0, 2.9), [finding(0, 10)])
    assert not is_found(finding(0, 3), [])


def test_invalid_boxes_are_counted_in_refused_answers() -> None:
    text = (
        '{"findings": [{"boxes": [{"time": 0, "box": [10, 20, 30, 40]}, '
        '{"time": 0, "box": [30, 20, 10, 40]}, {"time": 0, "box": [0, 0, 1001, 1]}, '
        '{"time": 0, "box":[1, 2, 3]}, {"time": 0, "box": ["a", 2, 3, 4]}]}]}'
    )
    refused = report(score=None, error="findings: box", judge_text=text)
    assert raw_boxes(refused) == (5, 4)
    assert raw_boxes(report(judge_text='{"box": [0, 0, 1280, 720]}')) == (1, 0)
    assert raw_boxes(report()) == (0, 0)
