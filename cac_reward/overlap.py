"""How well predicted windows, boxes and tubes lie on the true ones.

Plain measures are intersections over unions in [0, 1]. Shaped measures are in (-1, 1], equal the
plain ones where nothing is far apart, and still fall with the distance where nothing overlaps, so
that a learner is told which of two misses is nearer. Two empty predictions agree fully (1); an
empty and a non-empty one not at all (0, shaped -1).
"""

from __future__ import annotations

from collections.abc import Sequence

from cac_reward.report import Box, TimeWindow

Coordinates = tuple[float, float, float, float]
"""x1, y1, x2, y2 of a box."""


def window_iou(first: TimeWindow, second: TimeWindow) -> float:
    """Intersection over union of two windows.

    Example:
        >>> window_iou(TimeWindow(0.0, 2.0), TimeWindow(1.0, 3.0))
        0.3333333333333333
    """
    return window_set_iou((first,), (second,))


def window_giou(first: TimeWindow, second: TimeWindow) -> float:
    """Shaped `window_iou`: minus the gap over the hull where the windows are apart.

    Source:
        Generalised IoU, arXiv:1902.09630, in one dimension.
    """
    return window_set_giou((first,), (second,))


def window_set_iou(first: Sequence[TimeWindow], second: Sequence[TimeWindow]) -> float:
    """Seconds covered by both sets over seconds covered by either."""
    if not first or not second:
        return float(not first and not second)
    both = _covered_seconds([*first, *second])
    shared = _covered_seconds(first) + _covered_seconds(second) - both
    return _clamp(shared / both)


def window_set_giou(first: Sequence[TimeWindow], second: Sequence[TimeWindow]) -> float:
    """Shaped `window_set_iou`.

    result = IoU - mean over all windows of (gap to the other set's nearest window) / hull,
    hull = seconds from the first start to the last end. For one window a side this is the
    generalised IoU in one dimension.
    """
    if not first or not second:
        return 1.0 if not first and not second else -1.0
    everything = [*first, *second]
    hull = max(w.end_seconds for w in everything) - min(w.start_seconds for w in everything)
    gaps = [min(_gap(w, other) for other in second) for w in first]
    gaps += [min(_gap(w, other) for other in first) for w in second]
    return window_set_iou(first, second) - sum(gaps) / len(gaps) / hull


def box_iou(first: Coordinates, second: Coordinates) -> float:
    """Intersection over union of two boxes.

    Example:
        >>> box_iou((0.0, 0.0, 0.5, 1.0), (0.25, 0.0, 0.75, 1.0))
        0.3333333333333333
    """
    return _box_set_iou([first], [second])


def box_giou(first: Coordinates, second: Coordinates) -> float:
    """Shaped `box_iou`: minus the share of the hull that neither box covers.

    Source:
        Generalised IoU, arXiv:1902.09630, algorithm 1.
    """
    return box_iou(first, second) - _box_penalty(first, second)


def tube_iou(first: Sequence[Box], second: Sequence[Box]) -> float:
    """Volume shared by two tubes over the volume of either, in space and time.

    A tube is a set of boxes, each at a time; times are compared to 0.01 s, as judges write them.
    Boxes of one tube at one time count as their union. All frame times weigh the same.
    """
    if not first or not second:
        return float(not first and not second)
    one, two = _by_time(first), _by_time(second)
    shared = either = 0.0
    for time in one.keys() | two.keys():
        here, there = one.get(time, []), two.get(time, [])
        union = _covered_area([*here, *there])
        shared += _covered_area(here) + _covered_area(there) - union
        either += union
    return _clamp(shared / either)


def tube_giou(first: Sequence[Box], second: Sequence[Box]) -> float:
    """Shaped overlap of two tubes: frame by frame in space, and over the gap in time.

    agreement = mean over the times of either tube of the shaped box overlap (-1 where one tube
                has no box)
    result    = agreement - gap / hull, in seconds, gap = 0 unless one tube ends before the other
                begins; the part below 0 is halved to stay above -1
    """
    if not first or not second:
        return 1.0 if not first and not second else -1.0
    one, two = _by_time(first), _by_time(second)
    times = sorted(one.keys() | two.keys())
    values = [
        _box_set_giou(one[time], two[time]) if time in one and time in two else -1.0
        for time in times
    ]
    gap = max(0.0, min(one) - max(two), min(two) - max(one))
    hull = times[-1] - times[0]
    value = sum(values) / len(values) - (gap / hull if gap else 0.0)
    return value if value >= 0 else value / 2


def _clamp(share: float) -> float:
    """Undo the rounding by which a share may leave [0, 1]."""
    return min(1.0, max(0.0, share))


def _gap(first: TimeWindow, second: TimeWindow) -> float:
    """Seconds between two windows; 0 where they touch or overlap."""
    return max(
        0.0,
        first.start_seconds - second.end_seconds,
        second.start_seconds - first.end_seconds,
    )


def _covered_seconds(windows: Sequence[TimeWindow]) -> float:
    total, reached = 0.0, 0.0
    for window in sorted(windows):
        total += max(0.0, window.end_seconds - max(window.start_seconds, reached))
        reached = max(reached, window.end_seconds)
    return total


def _covered_area(boxes: Sequence[Coordinates]) -> float:
    """Area of a union of boxes: in each strip between two edges, the length covered."""
    edges = sorted({x for x1, _, x2, _ in boxes for x in (x1, x2)})
    total = 0.0
    for left, right in zip(edges, edges[1:], strict=False):
        length, reached = 0.0, 0.0
        for _, y1, _, y2 in sorted(
            (box for box in boxes if box[0] <= left and box[2] >= right), key=lambda box: box[1]
        ):
            length += max(0.0, y2 - max(y1, reached))
            reached = max(reached, y2)
        total += length * (right - left)
    return total


def _area(box: Coordinates) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _box_penalty(first: Coordinates, second: Coordinates) -> float:
    """Share of the common hull that neither box covers."""
    hull = _area(
        (
            min(first[0], second[0]),
            min(first[1], second[1]),
            max(first[2], second[2]),
            max(first[3], second[3]),
        )
    )
    return 1 - _clamp(_covered_area([first, second]) / hull)


def _box_set_iou(first: Sequence[Coordinates], second: Sequence[Coordinates]) -> float:
    union = _covered_area([*first, *second])
    return _clamp((_covered_area(first) + _covered_area(second) - union) / union)


def _box_set_giou(first: Sequence[Coordinates], second: Sequence[Coordinates]) -> float:
    """As `window_set_giou`, with the generalised IoU's penalty to the nearest box."""
    penalties = [min(_box_penalty(box, other) for other in second) for box in first]
    penalties += [min(_box_penalty(box, other) for other in first) for box in second]
    return _box_set_iou(first, second) - sum(penalties) / len(penalties)


def _by_time(boxes: Sequence[Box]) -> dict[float, list[Coordinates]]:
    tube: dict[float, list[Coordinates]] = {}
    for box in boxes:
        tube.setdefault(round(box.time_seconds, 2), []).append(box.coordinates)
    return tube
