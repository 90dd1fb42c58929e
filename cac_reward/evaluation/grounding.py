"""When and where: the windows and boxes of a report against those of an annotation.

Each function takes one clip. All that findings say counts, whatever the verdict.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from scipy.optimize import linear_sum_assignment

from cac_reward.overlap import tube_iou, window_iou, window_set_iou
from cac_reward.report import AnomalyReport, Box, Finding, TimeWindow

RECALL_THRESHOLDS = (0.3, 0.5, 0.7)
"""Temporal IoU from which on a clip counts as found."""
FOUND_IOU = 0.3
"""Temporal IoU from which on one finding counts as found."""
_RAW_BOX = re.compile(r'"box"\s*:\s*\[([^\]]*)\]')
_LARGEST_COORDINATE = 1000.0


def temporal_iou(predicted: Sequence[Finding], true: Sequence[Finding]) -> float:
    """Seconds in both sets of windows over seconds in either; 0 where nothing was predicted."""
    return window_set_iou(_windows(predicted), _windows(true))


def effective_temporal_f1(predicted: Sequence[Finding], true: Sequence[Finding]) -> float:
    """Overlap of windows that are matched one to one, so that neither missing nor surplus pays.

    result = 2 * (sum of IoU over the best matching) / (windows predicted + windows true)

    Windows of several findings that are the same count once.

    Returns:
        In [0, 1]; 1 where both are empty.

    Source:
        One-to-Many Temporal Grounding (arXiv:2606.06294) has a measure of this name; its formula
        was not at hand, and this one is ours.
    """
    ours, theirs = sorted(set(_windows(predicted))), sorted(set(_windows(true)))
    if not ours or not theirs:
        return float(not ours and not theirs)
    table = [[window_iou(one, other) for other in theirs] for one in ours]
    rows, columns = linear_sum_assignment(table, maximize=True)
    matched = sum(table[row][column] for row, column in zip(rows, columns, strict=True))
    return 2 * matched / (len(ours) + len(theirs))


def count_is_right(predicted: Sequence[Finding], true: Sequence[Finding]) -> float:
    """1 where there are as many different windows as there should be, else 0."""
    return float(len(set(_windows(predicted))) == len(set(_windows(true))))


def mean_box_iou(predicted: Sequence[Finding], true: Sequence[Finding]) -> float:
    """Overlap in space at the times at which the annotation has boxes, averaged over them.

    At each such time all boxes of a side are one region. A finding of the report has the boxes
    nearest in time there while its window lasts: a judge draws only into frames that it saw.

    Returns:
        In [0, 1]; NaN where the annotation has no box.
    """
    times = sorted({box.time_seconds for finding in true for box in finding.boxes})
    if not times:
        return math.nan
    values = [
        tube_iou(
            list(_boxes_at(predicted, time)),
            [box for one in true for box in one.boxes if box.time_seconds == time],
        )
        for time in times
    ]
    return sum(values) / len(values)


def dense_tube_iou(
    predicted: Sequence[Finding], true: Sequence[Finding], *, fps: float, num_frames: int
) -> float:
    """Volume of both tubes over volume of either, with both filled in to every frame.

    Between its boxes a finding keeps the nearest ones in time, as long as its window lasts, so
    that a judge that draws into few frames is not held against it.

    Args:
        predicted: Of the report.
        true: Of the annotation.
        fps: Frames per second of the clip.
        num_frames: Of the clip.

    Returns:
        In [0, 1]; NaN where the annotation has no box.
    """
    if not any(finding.boxes for finding in true):
        return math.nan
    return tube_iou(_filled(predicted, fps, num_frames), _filled(true, fps, num_frames))


def frame_labels(findings: Sequence[Finding], *, fps: float, num_frames: int) -> list[bool]:
    """Whether each frame of a clip is in a finding's window; [F]."""
    inside = [False] * num_frames
    for finding in findings:
        for index in finding.window.frame_indices(num_frames, fps):
            inside[index] = True
    return inside


def frame_scores(
    anomalous: float, findings: Sequence[Finding], *, fps: float, num_frames: int
) -> list[float]:
    """P(anomalous) of each frame of a judged clip; [F] in [0, 1].

    Ours, since a judge gives one probability for a clip: frames in the window of a finding have
    the clip's, others 0. A report without findings says nothing of where, so all have the clip's.

    Args:
        anomalous: P(anomalous) of the clip.
        findings: Of the report.
        fps: Frames per second of the clip.
        num_frames: Of the clip.
    """
    inside = frame_labels(findings, fps=fps, num_frames=num_frames)
    return [anomalous if one or not findings else 0.0 for one in inside]


def is_found(finding: Finding, predicted: Sequence[Finding]) -> bool:
    """Whether a predicted window lies on the finding's by at least `FOUND_IOU`."""
    return any(window_iou(finding.window, one.window) >= FOUND_IOU for one in predicted)


def raw_boxes(report: AnomalyReport) -> tuple[int, int]:
    """How many boxes the judge wrote in turn 2, and how many of them are none.

    A report without an error has valid boxes only: the parser refuses the whole answer otherwise.
    In a refused answer a box is invalid if it is not four numbers with 0 <= x1 < x2 <= 1000,
    likewise y.
    """
    written = _RAW_BOX.findall(report.judge_text or "")
    if report.error is None:
        return len(written), 0
    return len(written), sum(not _is_box(numbers) for numbers in written)


def _is_box(text: str) -> bool:
    try:
        x1, y1, x2, y2 = (float(number) for number in text.split(","))
    except ValueError:
        return False
    return 0 <= x1 < x2 <= _LARGEST_COORDINATE and 0 <= y1 < y2 <= _LARGEST_COORDINATE


def _windows(findings: Sequence[Finding]) -> list[TimeWindow]:
    return [finding.window for finding in findings]


def _boxes_at(findings: Sequence[Finding], time_seconds: float) -> Iterator[Box]:
    for finding in findings:
        if finding.window.holds(time_seconds):
            for box in finding.boxes_at(time_seconds):
                yield replace(box, time_seconds=time_seconds)


def _filled(findings: Sequence[Finding], fps: float, num_frames: int) -> list[Box]:
    # Frame numbers stand for times: `tube_iou` rounds to 0.01 s and would merge frames above 100
    # per second.
    return [
        replace(box, time_seconds=float(index))
        for finding in findings
        for index in finding.window.frame_indices(num_frames, fps)
        for box in finding.boxes_at(index / fps)
    ]
